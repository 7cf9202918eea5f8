#!/usr/bin/env bash
set -euo pipefail
# fschat 0.2.36. One expects the prompt of an unknown model to hold the question and little else, and that of a known
# family to be the family's own. A name that it does not match, such as Llama 3.1's or a run's own, gets a conversation
# of 2,000 characters in front, about ideas for a party, with "### Human" and "### Assistant" for the roles.
# No warning is given. MT-Bench answers are generated this way, so such a model answers another prompt than its own.
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
cd "$tmp"
python3 -m venv venv
venv/bin/pip install -q 'torch==2.13.0' 'transformers==5.24.0' 'accelerate==1.15.0' 'requests==2.32.5'
venv/bin/pip install -q --no-deps 'fschat==0.2.36'
HF_HUB_OFFLINE=1 venv/bin/python - <<'EOF'
import fastchat
from fastchat.model.model_adapter import get_conversation_template

print("fschat", fastchat.__version__)
seen = {}
for name in ("my-dpo-run", "Llama-3.1-8B-Instruct", "gemma-2-9b-it-sppo", "zephyr-7b-dpo"):
    chat = get_conversation_template(name)
    chat.append_message(chat.roles[0], "Hello")
    chat.append_message(chat.roles[1], None)
    seen[name] = chat.name
    print(f"{name}: template {chat.name}, {len(chat.get_prompt())} characters for 'Hello'")
assert list(seen.values()) == ["one_shot", "one_shot", "one_shot", "zephyr"], "behaviour has changed"
EOF
