#!/usr/bin/env bash
set -euo pipefail
# trl 1.16.0. One expects label_smoothing to turn DPO's loss, "sigmoid", into conservative DPO: in 0.24.0 it did.
# Now the setting is accepted and has no effect there, with no warning. It still acts on "robust" and on "aot".
# An older recipe for noisy preferences therefore trains plain DPO.
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
cd "$tmp"
python3 -m venv venv
venv/bin/pip install -q 'torch==2.13.0' 'transformers==5.24.0' 'datasets==5.2.0' 'trl==1.16.0'
HF_HUB_OFFLINE=1 HF_HOME="$tmp/hf" venv/bin/python - 2>log <<'EOF' || { cat log; exit 1; }
import torch
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

words = Tokenizer(models.WordLevel({w: i for i, w in enumerate("<pad> </s> a b c d e f g".split())}))
words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", pad_token="<pad>")
pairs = Dataset.from_list([{"prompt": "a b ", "chosen": "c d </s>", "rejected": "e f g </s>"}] * 2)


def loss(kind, smoothing):
    torch.manual_seed(0)
    policy, reference = (LlamaForCausalLM(LlamaConfig(
        vocab_size=9, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        initializer_range=0.2)) for _ in range(2))
    config = trl.DPOConfig("out", loss_type=[kind], label_smoothing=smoothing, beta=1.0, use_cpu=True, bf16=False,
                           report_to=[], disable_tqdm=True)
    return trl.DPOTrainer(policy, reference, config, train_dataset=pairs, eval_dataset=pairs,
                          processing_class=tokenizer).evaluate()["eval_loss"]


losses = {kind: (loss(kind, 0.0), loss(kind, 0.3)) for kind in ("sigmoid", "robust", "aot")}
print("trl", trl.__version__)
for kind, (plain, smooth) in losses.items():
    print(f"{kind}: loss {plain:.4f} with label_smoothing 0, {smooth:.4f} with 0.3")
assert [plain == smooth for plain, smooth in losses.values()] == [True, False, False], "behaviour has changed"
EOF
