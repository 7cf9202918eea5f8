#!/usr/bin/env bash
set -euo pipefail
# transformers 5.24.0 and 4.57.6. One expects 4.57.6 either to read a model that 5.24.0 saved or to complain.
# It loads the weights without a word, but 5.24.0 writes rope_parameters where 4.57.6 looks for rope_theta. Any other
# theta becomes the default 10000, and the log-probabilities differ. A judge, sampler or benchmark pinned to 4.x
# therefore measures another model than the one that was trained.
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
cd "$tmp"
python3 -m venv venv
venv/bin/pip install -q 'torch==2.13.0' 'transformers==5.24.0'
venv/bin/pip install -q 'requests==2.32.5'
venv/bin/pip install -q --no-deps --target old 'transformers==4.57.6' 'huggingface-hub==0.36.2' 'tokenizers==0.22.2'
cat >check.py <<'EOF'
import sys

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

if sys.argv[1] == "5.24.0":
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        initializer_range=0.3, rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    )).save_pretrained("model")
assert transformers.__version__ == sys.argv[1]
model, problems = LlamaForCausalLM.from_pretrained("model", output_loading_info=True)
assert not any(problems.values())
with torch.no_grad():
    logp = model.eval()(torch.arange(40)[None]).logits.log_softmax(-1)[0, -1, 0].item()
theta = 1 / model.model.rotary_emb.inv_freq[1].item() ** 8  # the head size is 16
print(f"transformers {transformers.__version__}: theta {theta:.0f}, log-probability of token 0: {logp:.4f}")
assert abs(theta / float(sys.argv[2]) - 1) < 1e-4, "behaviour has changed"
EOF
export HF_HUB_OFFLINE=1
venv/bin/python check.py 5.24.0 500000
PYTHONPATH=old venv/bin/python check.py 4.57.6 10000
