"""Memory of the rows of an iteration: bytes a token of a response in memory, and at most while they are read.

    python tests/bench_rows.py          a minute: 800 prompts x 5 responses x 1,024 tokens, 4 characters a token

Each figure comes from a process of its own: the growth of its resident memory, over the tokens. `lists` is the same
with json.loads alone, whose token ids are lists of ints.
"""

import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measure import common, cpu, make_parser, record, show

PROMPTS, K, TOKENS = 800, 5, 1024


def make_rows(file):
    """A responses.jsonl like that of a run, a row at a time."""
    rng = random.Random(0)
    with open(file, "w") as lines:
        for n in range(PROMPTS):
            row = {"prompt": [{"role": "user", "content": str(n)}], "prompt_ids": rng.choices(range(32000), k=64)}
            ids = [rng.choices(range(32000), k=TOKENS) for _ in range(K)]
            row["responses"] = [{"text": f"{n:3} " * TOKENS, "ids": y, "finished": True} for y in ids]
            lines.write(json.dumps(row) + "\n")


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def measure_reading(file, way):
    """(bytes a token of the rows, at most while they are read or written again)."""
    before, tokens = resident(), PROMPTS * K * TOKENS
    if way == "lists":
        rows = [json.loads(line) for line in Path(file).read_text().split("\n")[:-1]]
    else:
        rows = common.read_jsonl(Path(file))
    held = resident() - before
    if way == "read, then written":
        common.write_jsonl(Path(file).with_name("again.jsonl"), rows)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    print(json.dumps([held / tokens, peak / tokens]))


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--child", nargs=2, metavar=("FILE", "WAY"))
    args = parser.parse_args()
    if args.child:
        return measure_reading(*args.child)
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        file = f"{folder}/responses.jsonl"
        make_rows(file)
        for way in ("lists", "read", "read, then written"):
            child = [sys.executable, __file__, "--child", file, way]
            done = subprocess.run(child, capture_output=True, text=True, check=True)
            results[way] = json.loads(done.stdout)
    table = show("bytes a token", {"in memory": ".1f", "at most": ".1f"}, results, lambda _, found: found)
    args.device = "cpu"
    record(args, f"{cpu()}; Python {sys.version.split()[0]}; {time.strftime('%Y-%m-%d')}", rows=table)


if __name__ == "__main__":
    main()
