#!/usr/bin/env bash
set -euo pipefail
# datasets 5.2.0. One expects that map() gives a column the type of the new values, as it does for an integer column.
# A column of booleans stays boolean, however: the score 0.25 that replaces a label is stored as True, with no warning.
# The same score under a new name is kept. An integer column keeps its type when its values become strings of digits.
# Whoever turns yes/no labels into preference probabilities in place trains on labels that are all True.
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
cd "$tmp"
python3 -m venv venv
venv/bin/pip install -q 'datasets==5.2.0'
HF_HUB_OFFLINE=1 venv/bin/python - <<'EOF'
import datasets
from datasets import Dataset

datasets.disable_progress_bars()
print("datasets", datasets.__version__)
labels = Dataset.from_dict({"label": [True, False]})
counts = Dataset.from_dict({"label": [1, 0]})
score = lambda row: {"label": 0.25}
seen = {
    "boolean, same name": labels.map(score)["label"][:],
    "boolean, new name": labels.map(lambda row: {"score": 0.25})["score"][:],
    "integer, same name": counts.map(score)["label"][:],
    "integer to text": counts.map(lambda row: {"label": "00" + str(row["label"])})["label"][:],
}
for what, values in seen.items():
    print(f"{what}: {values}")
assert seen == {
    "boolean, same name": [True, True],
    "boolean, new name": [0.25, 0.25],
    "integer, same name": [0.25, 0.25],
    "integer to text": [1, 0],
}, "behaviour has changed"
EOF
