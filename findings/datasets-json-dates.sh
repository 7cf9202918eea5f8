#!/usr/bin/env bash
set -euo pipefail
# datasets 5.2.0. One expects that a JSON string loads as a string, all the more so where features= says "string".
# If every string of a field looks like a date, the loader returns datetime objects, in chat messages too.
# With features= the strings come back, but rewritten: "1969-07-20" has become "1969-07-20 00:00:00".
# One other string in the field keeps them all as they were. `chosen` can so differ from `rejected` in type, and an
# answer that a model is trained on, or an exact match is counted against, is not the one in the file.
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
cd "$tmp"
python3 -m venv venv
venv/bin/pip install -q 'datasets==5.2.0'
HF_HUB_OFFLINE=1 HF_DATASETS_CACHE="$tmp/cache" venv/bin/python - <<'EOF'
import datetime
import json

import datasets

datasets.disable_progress_bars()
print("datasets", datasets.__version__)


def load(name, rows, features=None):
    with open(name, "w") as f:
        f.writelines(json.dumps(row) + "\n" for row in rows)
    data = datasets.load_dataset("json", data_files=name, split="train", features=features)
    print(name, data[:])
    return data[:]


text = datasets.Value("string")
date = {"chosen": "1969-07-20", "rejected": "no idea"}
day = datetime.datetime(1969, 7, 20)
assert load("dates", [date, date])["chosen"] == [day, day]
assert load("mixed", [date, {**date, "chosen": "in July"}])["chosen"] == ["1969-07-20", "in July"]
declared = load("declared", [date], datasets.Features({"chosen": text, "rejected": text}))
assert declared["chosen"] == ["1969-07-20 00:00:00"]
chat = load("chat", [{"messages": [{"role": "assistant", "content": "1969-07-20"}]}])
assert chat["messages"][0][0]["content"] == day
EOF
