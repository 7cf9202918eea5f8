#!/usr/bin/env bash
set -euo pipefail
# torch 2.13.0. One expects load_state_dict() of an optimizer to restore what state_dict() saved.
# It casts all state of a bfloat16 parameter to bfloat16, except an entry called "step": float32 moments lose 16 bits,
# and an integer counter becomes a rounded float. An optimizer that keeps float32 state for bfloat16 weights so goes on
# from other numbers after a resume, and in a lower precision, with no warning.
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
cd "$tmp"
python3 -m venv venv
venv/bin/pip install -q 'torch==2.13.0'
venv/bin/python -W ignore - <<'EOF'
import torch


class Keeper(torch.optim.Optimizer):
    def step(self):
        for p in self.param_groups[0]["params"]:
            self.state[p] = {
                "moment": torch.full((2,), 0.123456789),
                "tokens": torch.tensor([1_000_001, 257]),
                "step": torch.tensor([1_000_001, 257]),
            }


print("torch", torch.__version__)
weight = torch.nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))
first, second = Keeper([weight], {}), Keeper([weight], {})
first.step()
second.load_state_dict(first.state_dict())
for name, value in first.state[weight].items():
    print(name, "saved", value.tolist(), value.dtype, "loaded", second.state[weight][name].tolist(),
          second.state[weight][name].dtype)
loaded = second.state[weight]
assert loaded["moment"].dtype == torch.bfloat16 and loaded["moment"][0].item() == 0.12353515625
assert loaded["tokens"].dtype == torch.bfloat16 and loaded["tokens"].tolist() == [999424, 256]
assert loaded["step"].tolist() == [1_000_001, 257]
EOF
