#!/usr/bin/env bash
set -euo pipefail
# wandb 0.31.0, offline. One expects run.summary to hold the last value logged, during the run and after it.
# With log(..., step=n) it lags one step: step n enters when a later one begins. Without step= it is up to date.
# After finish() the summary is empty. Code that keeps the checkpoint with the best win rate, and reads that from the
# summary, keeps the wrong one; a script that reports the summary at the end reports nothing.
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
cd "$tmp"
python3 -m venv venv
venv/bin/pip install -q 'wandb==0.31.0'
export HOME="$tmp" WANDB_MODE=offline WANDB_SILENT=true WANDB_ERROR_REPORTING=false
venv/bin/python - <<'EOF'
import wandb

print("wandb", wandb.__version__)
run = wandb.init(project="p")
seen = []
for step, wins in enumerate([0.5, 0.6, 0.7]):
    run.log({"wins": wins}, step=step)
    seen.append(run.summary.get("wins"))
    print("logged", wins, "at step", step, "summary", seen[-1])
run.log({"wins": 0.8})
seen.append(run.summary.get("wins"))
print("logged 0.8 without a step, summary", seen[-1])
run.finish()
print("after finish:", dict(run.summary))
assert seen == [None, 0.5, 0.6, 0.8] and not dict(run.summary), "behaviour has changed"
EOF
