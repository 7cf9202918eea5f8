"""The three methods on a real model and real text: what comes out, for better or worse.

    python tests/real_text.py sppo        self-play on questions of AlpacaEval and HH-RLHF, judged by sentiment
    python tests/real_text.py dno         the same with the student's own pairs
    python tests/real_text.py sr_dpo      DPO, Sr-DPO, IPO and Sr-IPO on pairs of HH-RLHF; log-probs behind each p

each for three seeds; --data FILE where the hub cannot be reached; --device cuda for a GPU, where it takes more data and
runs four jobs at a time. They print means and standard deviations over the seeds and write
tests/claims/results/real_*.json.

The policy is SmolLM2-135M-Instruct (smollm2.py). The judge of sppo and dno is VADER's sentiment, a lexicon with rules:
P(y > y') = sigmoid(4 (s - s')), s from -1 to 1. A reader can check it, and so can see when a policy plays it. The
questions are those of one line, at most 80 characters and no negative word; each asks for one short sentence, so that
less than a tenth of the start's answers are cut.
"""

import argparse
import multiprocessing
import random
import shlex
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import mean, stdev

import measure  # first: it says where the scripts are

# isort: split
import smollm2
import torch
import transformers

import dno
import sppo
import sr_dpo
from measure import common

SCRIPTS = {"sppo": sppo, "dno": dno, "sr_dpo": sr_dpo}
ALPACA = "hf://datasets/tatsu-lab/alpaca_eval/alpaca_eval.json"
HH = "hf://datasets/Anthropic/hh-rlhf/harmless-base/test.jsonl.gz"
DATA = {"sppo": [ALPACA, HH], "dno": [ALPACA, HH], "sr_dpo": [HH]}
SELF_PLAY = {"judge": "sentiment", "limit": 384, "n_eval": 64, "iterations": 2, "k": 3}
OFFLINE = {"judge": "", "limit": 192, "n_eval": 48, "max_prompt_tokens": 160, "refine_prompt": "usefulness"}
SETTINGS = {"sppo": SELF_PLAY, "dno": {**SELF_PLAY, "limit": 300, "gold": "", "sft_alpha": 0.0}, "sr_dpo": OFFLINE}
ALL = {"limit": 0, "n_eval": 200}
LARGE = {"sppo": {**ALL, "iterations": 3, "k": 5}, "dno": {**ALL, "iterations": 3, "k": 5}}  # on a GPU
LARGE["sr_dpo"] = {**ALL, "max_prompt_tokens": 512, "max_new_tokens": 160, "micro_tokens": 8192}
SIZES = {"cpu": (1, 200), "cuda": (3, 500)}  # turns of a pair's prompt, characters of its answers: at most
METHODS = {"DPO": ("sr_dpo", 0.0), "Sr-DPO": ("sr_dpo", 0.3), "IPO": ("sr_ipo", 0.0), "Sr-IPO": ("sr_ipo", 0.3)}


class Sentiment:
    """VADER's compound sentiment of an answer as a judge."""

    def __init__(self):
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

        self.score = SentimentIntensityAnalyzer().polarity_scores

    def sentiment(self, responses):
        return torch.tensor([[self.score(y)["compound"] for y in texts] for texts in responses])

    def __call__(self, prompts, responses):
        s = self.sentiment(responses)
        return torch.sigmoid(4 * (s[:, :, None] - s[:, None, :]))

    def metrics(self, prompts, responses):
        return {"sentiment": self.sentiment(responses).mean().item()}


def questions(sources, file):
    """Write the questions in `sources` of one short line without a negative word, each asking for a short answer."""
    score, texts = Sentiment().score, {}
    for source in sources:
        texts |= dict.fromkeys(prompt[0]["content"] for prompt in common.load_prompts(source))
    kept = [x for x in texts if len(x) <= 80 and x.endswith("?") and "\n" not in x and score(x)["neg"] == 0]
    random.Random(0).shuffle(kept)
    system = {"role": "system", "content": "Be brief."}  # shorter than the template's own
    asked = [{"role": "user", "content": f"{text} Answer in one short sentence."} for text in kept]
    common.write_jsonl(file, [{"prompt": [system, question]} for question in asked])


def short_pairs(sources, file, turns, longest):
    """Write the pairs in `sources` of at most so many turns, and answers of at most so many characters."""
    pairs = [pair for source in sources for pair in common.load_pairs(source)]
    texts = [(len(pair["prompt"]), *(pair[name] for name in ("chosen", "rejected"))) for pair in pairs]
    kept = [pair for pair, (n, *ys) in zip(pairs, texts, strict=True) if n <= turns and max(map(len, ys)) <= longest]
    common.write_jsonl(file, kept)


def run(script, settings, seed, name, model):
    """(metrics of each iterate, [chosen, rejected] log-ratio of each step, five answers of start and end)."""
    common.JUDGES["sentiment"] = lambda _: Sentiment()
    common.MODELS["smollm2-135m"] = model  # so that the scripts take its recipe
    argv = [f"--{key}={value}" for key, value in {**settings, "seed": seed, "name": name}.items()]
    module = SCRIPTS[script]
    common.cli(module.main, module.Args, module.RECIPES, module.__doc__, argv)
    folder = Path("runs") / name
    table = common.read_jsonl(folder / "metrics.jsonl")
    steps = [row for t in range(1, len(table)) for row in common.read_jsonl(folder / f"iter_{t}" / "steps.jsonl")]
    log_ratios = [[row["chosen_log_ratio"], row["rejected_log_ratio"]] for row in steps]
    rows = [common.read_jsonl(folder / f"iter_{t}" / "answers.jsonl")[:5] for t in (0, len(table) - 1)]
    answers = [
        {"prompt": a["prompt"][-1]["content"], "start": a["responses"][0]["text"], "end": b["responses"][0]["text"]}
        for a, b in zip(*rows, strict=True)
    ]
    return table, log_ratios, answers


def premise(model, file, device):
    """Mean log-probs of chosen and rejected answers behind each of the named prompts, less those without: 96 pairs."""
    policy, tokenizer = common.load_policy(model, device)
    found, plain = {}, None
    for name, p in {"none": "", **sr_dpo.REFINE_PROMPTS}.items():
        args = sr_dpo.Args(refine_prompt=p or "none", max_prompt_tokens=999, max_new_tokens=96)
        rows = common.encode_rows(policy, tokenizer, common.load_pairs(file, 96), args, "", ["chosen", "rejected"])
        rows = common.encode_rows(policy, tokenizer, rows, args, change=lambda x, p=p: sr_dpo.refine(x, p))
        rows = [{**row, "responses": [row["chosen"], row["rejected"]]} for row in rows]
        rows = common.add_logps(policy, rows, "logps", args.micro_tokens, "refined_ids")
        logps = torch.tensor([row["logps"] for row in rows])
        plain = logps if plain is None else plain
        chosen, rejected = (logps - plain).mean(0).tolist()
        margin = (logps[:, 0] - logps[:, 1]) - (plain[:, 0] - plain[:, 1])
        found[name] = {"chosen": chosen, "rejected": rejected, "margin": margin.mean().item()}
        found[name]["se of margin"] = margin.std().item() / len(rows) ** 0.5
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("script", choices=SCRIPTS)
    parser.add_argument("--data", nargs="+", help="files, or datasets on the hub; by default the published ones")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    args, began = parser.parse_args(), time.time()
    cuda, model = args.device == "cuda", str(smollm2.make())
    file, sources = Path("runs") / f"real-{args.script}.jsonl", args.data or DATA[args.script]
    short_pairs(sources, file, *SIZES[args.device]) if args.script == "sr_dpo" else questions(sources, file)
    settings = {"model": "smollm2-135m", **SETTINGS[args.script], **(LARGE[args.script] if cuda else {})}
    settings |= {"device": args.device, "pairs" if args.script == "sr_dpo" else "prompts": file}
    variants = {args.script: {}}
    if args.script == "sr_dpo":
        variants = {name: {"loss": loss, "lam": lam} for name, (loss, lam) in METHODS.items()}
    stamp, tables, log_ratios, answers = time.strftime("%Y%m%d-%H%M%S"), {}, {}, []
    jobs = [(seed, name) for seed in range(1, args.seeds + 1) for name in variants]
    with ProcessPoolExecutor(4 if cuda else 1, multiprocessing.get_context("spawn")) as pool:
        running = []
        for seed, name in jobs:
            job = {**settings, **variants[name]}, seed, f"real-{stamp}-{name.lower()}-s{seed}"
            running.append(pool.submit(run, args.script, *job, model))
        for (seed, name), job in zip(jobs, running, strict=True):
            table, steps, some = job.result()
            tables.setdefault(name, []).append(table)
            log_ratios.setdefault(name, []).append(steps)
            answers += some if seed == 1 and args.script != "sr_dpo" else []
    minutes = (time.time() - began) / 60 / args.seeds
    print(f"\nmean ± standard deviation over {args.seeds} seeds, {minutes:.0f} minutes each")
    for name, seeds in tables.items():
        for t, rows in enumerate(zip(*seeds, strict=True)):
            figures = [key for key, value in rows[0].items() if isinstance(value, float) and key != "seconds"]
            lists = {key: [row[key] for row in rows] for key in figures}
            spread = {key: (mean(v), stdev(v) if len(v) > 1 else 0.0) for key, v in lists.items()}
            print(f"{name} [{t}]", ", ".join(f"{key} {m:.3g} ± {s:.2g}" for key, (m, s) in spread.items()))
    for row in answers:
        print(f"\n{row['prompt']}\n    start: {row['start']}\n    end:   {row['end']}")
    words = [Path(word).name if word in (args.data or ()) else word for word in sys.argv[1:]]  # no path
    where = torch.cuda.get_device_name() if cuda else f"{measure.cpu()}, {torch.get_num_threads()} threads"
    result = {"command": shlex.join(["python", "tests/real_text.py", *words]), "date": time.strftime("%Y-%m-%d")}
    result |= {"where": f"{where}; torch {torch.__version__}, transformers {transformers.__version__}"}
    result |= {"seeds": args.seeds, "minutes per seed": minutes, "settings": {**settings, "model": "smollm2-135m"}}
    result["settings"] = {key: str(value) for key, value in result["settings"].items()}
    result |= {"tables": tables, "log_ratios": log_ratios, "answers": answers}
    if args.script == "sr_dpo":
        result["behind p, less without"] = premise(model, str(file), args.device)
        for name, figures in result["behind p, less without"].items():
            print(f"behind {name!r}, less without:", ", ".join(f"{key} {x:+.2f}" for key, x in figures.items()))
    measure.write(f"real_{args.script}" + "_cuda" * cuda, result)


if __name__ == "__main__":
    main()
