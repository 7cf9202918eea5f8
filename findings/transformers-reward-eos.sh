#!/usr/bin/env bash
set -euo pipefail
# transformers 5.24.0. One expects a sequence classifier, such as a reward model, to read its score at the last token
# that the attention mask covers. The mask has no say: it reads the last token that differs from pad_token_id.
# If padding is done with the end-of-sequence token, as is common, the score is read one token early, and it is the same
# whether the answer ended or was cut off. A reward model so trained cannot tell the two apart.
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
cd "$tmp"
python3 -m venv venv
venv/bin/pip install -q 'torch==2.13.0' 'transformers==5.24.0'
HF_HUB_OFFLINE=1 venv/bin/python - <<'EOF'
import torch
import transformers
from transformers import LlamaConfig, LlamaForSequenceClassification

print("transformers", transformers.__version__)
torch.manual_seed(0)
EOS, OTHER = 2, 0
config = LlamaConfig(vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                     num_labels=1, eos_token_id=EOS, pad_token_id=EOS, initializer_range=0.3)
model = LlamaForSequenceClassification(config).eval()


def score(pad, *ids):
    model.config.pad_token_id = pad
    ids = torch.tensor([ids])
    with torch.no_grad():
        return model(ids, attention_mask=torch.ones_like(ids)).logits.item()


same = score(EOS, 5, 6, 7, EOS), score(EOS, 5, 6, 7)
apart = score(OTHER, 5, 6, 7, EOS), score(OTHER, 5, 6, 7)
print("pad = eos: ended %.4f, cut off %.4f" % same)
print("pad is another token: ended %.4f, cut off %.4f" % apart)
assert abs(same[0] - same[1]) < 1e-5 < 1e-2 < abs(apart[0] - apart[1]), "behaviour has changed"
EOF
