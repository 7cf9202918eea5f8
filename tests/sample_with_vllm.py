"""Sample an iteration of sppo.py or dno.py with vLLM; not run on a GPU here.

    python sppo.py --model mistral-7b --name NAME       stop it by Ctrl-C once it samples
    python tests/sample_with_vllm.py runs/NAME 1        iteration 1; writes runs/NAME/iter_1/responses.jsonl
    python sppo.py --resume runs/NAME                   takes these responses as its own

Any other engine will do: a line of the file is a row of `common.split_prompts`, in that order, with "responses", K of
{"text", "ids", "finished"}. ids end with the token that ended the answer; finished says whether there is one.
"""

import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common


def main(run, t):
    from vllm import LLM, SamplingParams

    args = SimpleNamespace(**{**common.read_config(run), "resume": run})
    model = f"{run}/iter_{t - 1}/policy" if t > 1 else args.model
    policy, tokenizer = common.load_policy(model)  # on the CPU, for its chat template and what ends its answers
    parts, _ = common.split_prompts(policy, tokenizer, args)
    chat, rows = common.Chat(policy, tokenizer), parts[t - 1]
    engine = LLM(model=str(common.load_config(model)[1]), dtype="bfloat16", seed=1000 * args.seed + t)
    lengths = {"max_tokens": args.max_new_tokens, "stop_token_ids": chat.stops}
    settings = SamplingParams(n=args.k, temperature=args.temperature, top_p=args.top_p, **lengths)
    found = engine.generate([{"prompt_token_ids": list(row["prompt_ids"])} for row in rows], settings)
    answers = [[chat.sampled(list(y.token_ids)) for y in one.outputs] for one in found]
    rows = [{**row, "responses": ys} for row, ys in zip(rows, answers, strict=True)]
    common.write_jsonl(Path(run) / f"iter_{t}" / "responses.jsonl", rows)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
