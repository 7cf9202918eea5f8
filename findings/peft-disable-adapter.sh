#!/usr/bin/env bash
set -euo pipefail
# peft 0.21.2. One expects that disable_adapter() gives back the base model: its documentation says so.
# With init_lora_weights="pissa" or "olora" it gives another model: these move a part of the base weights into the
# adapter. With the usual initialisation it is exact. DPO with LoRA takes its reference from disable_adapter(), so
# there the reference is not the model that training started from, and the log-ratios do not start at 0.
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
cd "$tmp"
python3 -m venv venv
venv/bin/pip install -q 'torch==2.13.0' 'transformers==5.24.0' 'peft==0.21.2'
HF_HUB_OFFLINE=1 venv/bin/python -W ignore - <<'EOF'
import copy

import peft
import torch
from transformers import LlamaConfig, LlamaForCausalLM

print("peft", peft.__version__)
torch.manual_seed(0)
config = LlamaConfig(vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                     num_attention_heads=4, initializer_range=0.3)
model = LlamaForCausalLM(config).eval()
tokens = torch.arange(10)[None]
logp = lambda m: m(tokens).logits.log_softmax(-1)
with torch.no_grad():
    base = logp(model)
    off = {}
    for init in (True, "pissa", "olora"):
        adapted = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=4, init_lora_weights=init)).eval()
        with adapted.disable_adapter():
            off[init] = (logp(adapted) - base).abs().max().item()
        print(f"init {init}: largest change of a log-probability: adapter on "
              f"{(logp(adapted) - base).abs().max():.6f}, disabled {off[init]:.6f}")
assert off[True] == 0 and off["pissa"] > 0.1 and off["olora"] > 0.1, "behaviour has changed"
EOF
