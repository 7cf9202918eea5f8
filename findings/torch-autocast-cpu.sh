#!/usr/bin/env bash
set -euo pipefail
# torch 2.13.0. One expects autocast to run log_softmax, softmax and logsumexp in float32, as its rules for CUDA say.
# On the CPU they stay in bfloat16, while cross_entropy runs in float32. The log-probabilities of one model then depend
# on which of the two computes them, by several hundredths a token. The log-ratios of preference losses are of that
# size, so a run that is checked on the CPU under autocast says little about the run on the GPU.
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
cd "$tmp"
python3 -m venv venv
venv/bin/pip install -q 'torch==2.13.0'
venv/bin/python -W ignore - <<'EOF'
import torch
import torch.nn.functional as F

print("torch", torch.__version__)
torch.manual_seed(0)
logits = torch.randn(64, 50_000).mul(3).bfloat16()
labels = torch.arange(64)
with torch.autocast("cpu", dtype=torch.bfloat16):
    picked = F.log_softmax(logits, -1).gather(1, labels[:, None])[:, 0]
    entropy = -F.cross_entropy(logits, labels, reduction="none")
    softmax, total = logits.softmax(-1).dtype, logits.logsumexp(-1).dtype
gap = (picked - entropy).abs().max().item()
print("log_softmax", picked.dtype, "softmax", softmax, "logsumexp", total, "cross_entropy", entropy.dtype)
print(f"largest gap between the two log-probabilities of a token: {gap:.4f}")
kernel = torch._C._dispatch_has_kernel_for_dispatch_key
rule = {key: kernel("aten::log_softmax.int", key) for key in ("AutocastCUDA", "AutocastCPU")}
print("log_softmax has a rule for autocast:", rule)
assert picked.dtype == softmax == total == torch.bfloat16 and entropy.dtype == torch.float32
assert gap > 0.01 and rule == {"AutocastCUDA": True, "AutocastCPU": False}, "behaviour has changed"
EOF
