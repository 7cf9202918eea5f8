"""The three methods on a real model: SmolLM2-135M-Instruct learns to keep instructions that anybody can check.

    python tests/real_text.py sppo 1        a run with seed 1, half an hour on one core; also: dno, dno_teacher
    python tests/real_text.py dpo 1         on the pairs of sppo's first iteration with seed 1; also: sr_dpo
    python tests/real_text.py table         the tables and the answers of README.md and tests/README.md

A prompt asks for a sentence about a topic and gives one of two instructions: 'Do not use commas.' or 'Use the word
"water".' The judge is a set of rules: P(y > y') = sigmoid(6 (s - s')), s from 0 to 1 the mean of how nearly the answer
is one sentence and keeps the instruction. The base model does both in about 40 % of its answers: what it never does it
cannot learn from its own samples. Each iterate answers prompts that no training prompt is like, on unseen topics, with
one instruction and with both. The teacher of dno_teacher is the base model: the best of 16 answers, by the same rules.
Results: tests/claims/results/real_METHOD_SEED.json.
"""

import argparse
import json
import random
import re
import shlex
import sys
import time
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

TOPICS = """a volcano, the moon, bread, honey, a bicycle, the sea, a library, gold, tea, a violin, chess, a bridge,
rain, a desert, cheese, a whale, glass, a garden, music, the sun, a clock, paper, a horse, coffee, a castle, snow, a
kite, salt, a forest, a train, soap, an island, a mirror, rice, a lighthouse, cotton, a dolphin, a map, silver, a
piano, football, a river, thunder, a museum, chocolate, an owl, wood, a park, painting, a star, a lamp, wool, a camel,
milk, a tower, ice, a ball, sugar, a mountain, a ship, ink, a cave, a window, corn, a farm, silk, a shark, a calendar,
iron, a drum, tennis, a lake, wind, a school, butter, an eagle, stone, a market, dancing, a comet, a candle, leather,
an elephant, oil, a palace, fog, a puzzle, pepper""".replace("\n", " ").split(", ")
ASK = (
    "Describe {} in one short sentence.",
    "What is {}? Answer in one short sentence.",
    "Tell me one short fact about {}.",
)
WORDS = "always", "often", "people", "world", "small", "water", "beautiful", "natural"


def words(text):
    return re.findall(r"[^\W_]+(?:['’-][^\W_]+)*", text.lower())


RULES = {  # instruction -> how nearly an answer keeps it, 1: it does; {} stands for one of WORDS
    "Do not use commas.": lambda text, _: 1 / (1 + text.count(",")),
    'Use the word "{}".': lambda text, word: float(word in words(text)),
}


class Rules:
    """The judge: an answer of one sentence that keeps the prompt's instructions is worth 1."""

    def shares(self, prompt, text):
        """How nearly an answer keeps each instruction: a list of numbers from 0 to 1; of no word, 0."""
        found = [len(re.findall(r"[.!?]+(?=\s|$|[\"'])", text)) == 1 and "\n" not in text.strip()]  # one sentence
        for rule, check in RULES.items():
            if match := re.search(re.escape(rule).replace(r"\{\}", "(.+?)"), prompt):
                found.append(check(text, match[1] if match.groups() else None))
        return [float(share) * bool(words(text)) for share in found]

    def scores(self, prompts, responses):
        rows = zip((prompt[-1]["content"] for prompt in prompts), responses, strict=True)
        return torch.tensor([[mean(self.shares(prompt, text)) for text in texts] for prompt, texts in rows])

    def __call__(self, prompts, responses):
        s = self.scores(prompts, responses)
        return torch.sigmoid(6 * (s[:, :, None] - s[:, None, :]))

    def metrics(self, prompts, responses):
        s = self.scores(prompts, responses)
        return {"kept": (s == 1).float().mean().item(), "score": s.mean().item()}


def make_prompts(n, topics, rules, seed):
    """n different prompts: a topic, and the instructions of one of `rules`, tuples of places in RULES, in turn."""
    rng, texts = random.Random(f"prompts {seed}"), {}
    while len(texts) < n:
        told = [[*RULES][i].format(rng.choice(WORDS)) for i in rules[len(texts) % len(rules)]]
        texts[" ".join([rng.choice(ASK).format(rng.choice(topics)), *told])] = None
    system = {"role": "system", "content": "Be brief."}  # shorter than the template's own
    return [[system, {"role": "user", "content": text}] for text in texts]


UNSEEN = 64, 32  # prompts on unseen topics: with one instruction, and with two


def all_prompts():
    """The training prompts, on 64 topics, and the unseen prompts, on the others."""
    topics = random.Random(0).sample(TOPICS, len(TOPICS))
    train = make_prompts(360, topics[:64], [(0,), (1,)], 0)
    unseen = make_prompts(UNSEEN[0], topics[64:], [(0,), (1,)], 1)
    return train, unseen + make_prompts(UNSEEN[1], topics[64:], [(0, 1), (1, 0)], 2)


# Chosen on seed 1; tests/README.md has what else was tried.
OWN = {"judge": "rules", "limit": 320, "n_eval": 64, "iterations": 2, "k": 4, "max_prompt_tokens": 96}
OWN |= {"max_new_tokens": 64, "temperature": 0.7, "top_p": 1.0, "epochs": 1, "batch_size": 8, "warmup_steps": 0.2}
OWN |= {"learning_rate": 1e-5, "micro_tokens": 1024}
GIVEN = {key: value for key, value in OWN.items() if key not in ("limit", "iterations", "k")}
GIVEN["learning_rate"] = 3e-6  # losses without a target overshoot at 1e-5
DNO = {**GIVEN, "limit": 160, "iterations": 2, "k": 4, "sft_alpha": 0.0}  # it makes three pairs of a prompt
METHODS = {
    "sppo": (sppo, OWN),
    "dno": (dno, {**DNO, "gold": ""}),
    "dno_teacher": (dno, DNO),
    "dpo": (sr_dpo, {**GIVEN, "loss": "sr_dpo", "lam": 0.0}),
    "sr_dpo": (sr_dpo, {**GIVEN, "loss": "sr_dpo", "lam": 0.3}),
}


ARGS = sppo.Args(**{name: OWN[name] for name in ("max_prompt_tokens", "max_new_tokens", "temperature", "top_p")})


def answer(policy, tokenizer, prompts, k, seed):
    """k answers to each prompt, as texts: a list of lists."""
    rows = common.encode_rows(policy, tokenizer, [{"prompt": prompt} for prompt in prompts], ARGS)
    rows = common.sample_responses(policy, tokenizer, rows, k, seed, ARGS)
    return [[y["text"] for y in row["responses"]] for row in rows]


def write_gold(file, prompts, model):
    """The teacher's answers: the best of 16 of the base model's, the first of the best."""
    answers = answer(*common.load_policy(model), prompts, 16, "teacher")
    best = [texts[i] for texts, i in zip(answers, Rules().scores(prompts, answers).argmax(1).tolist(), strict=True)]
    common.write_jsonl(file, [{"prompt": x, "gold": y} for x, y in zip(prompts, best, strict=True)])


def beside(policy, tokenizer, prompts, texts):
    """Measures that no judge saw, of answers on unseen topics: the topic is named, distinct-2, nats per token."""
    topics = [
        re.search(r"(?:Describe|What is|about) (?:an? |the )?(\w+)", prompt[-1]["content"])[1] for prompt in prompts
    ]
    named = mean(topic in text.lower() for topic, text in zip(topics, texts, strict=True))
    twos = [pair for text in texts for pair in zip(words(text), words(text)[1:], strict=False)]
    rows = [{"prompt": x, "answer": y} for x, y in zip(prompts, texts, strict=True) if y.strip()]
    rows = common.encode_rows(policy, tokenizer, rows, ARGS, answers=["answer"])
    rows = common.add_logps(policy, [{**row, "responses": [row["answer"]]} for row in rows], "logps", 1024)
    tokens = sum(len(row["answer"]["ids"]) for row in rows)
    logp = sum(row["logps"][0] for row in rows) / tokens  # under the base model
    return {"topic named": named, "distinct-2": len(set(twos)) / max(1, len(twos)), "logp per token": logp}


def run(method, seed, settings):
    """Train; returns the result as a dict, in which the row of each iterate has the figures of unseen prompts, too."""
    module, flags = METHODS[method]
    model, folder, began = str(smollm2.make()), Path("runs") / f"real-{method}-s{seed}", time.time()
    common.JUDGES["rules"] = lambda _: Rules()
    train, prompts = all_prompts()
    flags = {"model": model, **flags, **settings, "recipe": "small", "seed": seed}
    if module is not sr_dpo:
        flags["prompts"] = Path("runs/train.jsonl")
        common.write_jsonl(flags["prompts"], [{"prompt": prompt} for prompt in train])
    if method == "dno_teacher":
        flags["gold"] = Path(f"runs/gold-s{seed}.jsonl")
        write_gold(flags["gold"], train[: int(flags["limit"])], flags["model"])
    if module is sr_dpo:
        flags["pairs"] = file = Path(f"runs/pairs-{method}-s{seed}.jsonl")
        pairs = common.read_jsonl(Path(f"runs/real-sppo-s{seed}/iter_1/pairs.jsonl"))
        texts = [(pair["prompt"], *(y["text"] for y in pair["responses"])) for pair in pairs]
        common.write_jsonl(file, [{"prompt": x, "chosen": a, "rejected": b} for x, a, b in texts])
    argv = [f"--{key}={value}" for key, value in {**flags, "name": folder.name}.items()]
    argv = [f"--resume={folder}"] if folder.exists() else argv
    common.cli(module.main, module.Args, module.RECIPES, module.__doc__, argv)
    table, minutes = common.read_jsonl(folder / "metrics.jsonl"), (time.time() - began) / 60

    base, tokenizer, answers, log_ratios = *common.load_policy(flags["model"]), [], []
    for t, row in enumerate(table):
        iterate = folder / f"iter_{t}"
        policy = common.load_policy(iterate / "policy")[0] if t else base
        texts = [text for (text,) in answer(policy, tokenizer, prompts, 1, f"{seed} evaluate {t}")]
        kept = [min(Rules().shares(x[-1]["content"], y)) == 1 for x, y in zip(prompts, texts, strict=True)]
        row["unseen"] = {"kept": mean(kept[: UNSEEN[0]]), "kept of two": mean(kept[UNSEEN[0] :])}
        row["unseen"] |= beside(base, tokenizer, prompts, texts)
        answers.append(texts)
        steps = common.read_jsonl(iterate / "steps.jsonl")
        log_ratios += [[step["chosen_log_ratio"], step["rejected_log_ratio"]] for step in steps]
    some = [*zip((x[-1]["content"] for x in prompts), answers[0], answers[-1], strict=True)][::5]
    result = {"command": shlex.join(["python", "tests/real_text.py", *sys.argv[1:]]), "date": time.strftime("%Y-%m-%d")}
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    result |= {"where": f"{measure.cpu()}, {torch.get_num_threads()} threads; {versions}", "minutes": minutes}
    flags["model"] = Path(flags["model"]).name
    result |= {"settings": {key: str(x) for key, x in flags.items()}, "table": table, "log_ratios": log_ratios}
    return result | {"answers": [dict(zip(("prompt", "before", "after"), row, strict=True)) for row in some]}


NAMES = {"sppo": "SPPO", "dno_teacher": "DNO, teacher", "dno": "DNO", "dpo": "DPO", "sr_dpo": "Sr-DPO"}
COLUMNS = {"wins_vs_start": 3, "wins_at_equal_length": 3, "logp_drop": 2, "tokens": 1, "truncated": 3}
UNSEEN_COLUMNS = {"kept": 3, "kept of two": 3, "topic named": 2, "distinct-2": 2, "logp per token": 2}


def rows_of_table(results=measure.RESULTS):
    """A line of Markdown for each method and iterate: means, ± standard deviations where there are several seeds."""
    for method, name in NAMES.items():
        seeds = [json.loads(file.read_text())["table"] for file in sorted(results.glob(f"real_{method}_[0-9].json"))]
        for t in range(len(seeds[0]) if seeds else 0):
            cells = [f"{name}, {len(seeds)} seed" + "s" * (len(seeds) > 1), str(t)]
            for columns, part in ((UNSEEN_COLUMNS, lambda row: row["unseen"]), (COLUMNS, lambda row: row)):
                for column, digits in columns.items():
                    values = [part(table[t]).get(column) for table in seeds]
                    known = None not in values
                    cells.append(f"{mean(values):.{digits}f}" if known else "-")
                    if known and len(values) > 1:
                        cells[-1] += f" ± {stdev(values):.{digits}f}"
            yield f"| {' | '.join(cells)} |"


def rows_of_summary(results=measure.RESULTS):
    """A line of Markdown for each method: what changes from the base model to the last iterate, as means over seeds."""
    for method, name in NAMES.items():
        seeds = [json.loads(file.read_text())["table"] for file in sorted(results.glob(f"real_{method}_[0-9].json"))]
        if seeds:
            cells = [f"{name}, {len(seeds)} seed" + "s" * (len(seeds) > 1)]
            for column in ("kept", "kept of two", "topic named"):
                cells.append(" → ".join(f"{mean(rows[t]['unseen'][column] for rows in seeds):.2f}" for t in (0, -1)))
            cells += [f"{mean(rows[-1][x] for rows in seeds):.3f}" for x in ("wins_vs_start", "wins_at_equal_length")]
            yield f"| {' | '.join(cells)} |"


def lines_of_answers(results=measure.RESULTS):
    """A line of Markdown for each of the twenty prompts of SPPO's first seed."""
    for row in json.loads((results / "real_sppo_1.json").read_text())["answers"]:
        before, after = (json.dumps(row[name], ensure_ascii=False) for name in ("before", "after"))
        yield f"- {row['prompt']} before: {before} after: {after}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", choices=[*METHODS, "table"])
    parser.add_argument("seed", type=int, nargs="?", default=1)
    parser.add_argument("--set", nargs="*", default=[], metavar="FLAG=VALUE", help="other settings, to try them")
    parser.add_argument("--name", default="", help="ending of the result's name")
    args = parser.parse_args()
    if args.method == "table":
        print(*rows_of_table(), *lines_of_answers(), sep="\n")
    else:
        result = run(args.method, args.seed, dict(word.split("=") for word in args.set))
        measure.write(f"real_{args.method}_{args.seed}{args.name}", result)


if __name__ == "__main__":
    main()
