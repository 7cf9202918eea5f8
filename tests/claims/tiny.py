"""The papers' claims, tried on the built-in task: which of them hold for a language model of 0.46 M parameters.

    OMP_NUM_THREADS=1 python tests/claims/tiny.py NAME [--seeds 3]      NAME is one of CLAIMS, below, or all

trains the variants of a claim over seeds, prints their figures and a verdict, and writes results/NAME.json beside this
file. Runs go to runs/claims-*. A finished run there is read, not repeated, so claims share runs.

A claim is a list of comparisons. Each says that a difference between variants, taken seed by seed, is above a number:
0, or -SLACK where it says "no worse". It holds where the 95 % interval of the mean difference (Student's t) is above
the number, does not where it is below, and is within the spread otherwise; a claim is as good as the worst of its
comparisons. The rule was fixed before any comparison was made; a claim's source says what was added after a result.
What fails on this task may hold where the paper made it. Figures are the last iterate's unless they say otherwise.
"""

import argparse
import contextlib
import json
import math
import os
import shlex
import sys
import time
from collections import namedtuple
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev
from types import SimpleNamespace
from unittest import mock

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # tests
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # where the scripts are
from samples import win_rates_of_two

import common
import dno
import sppo
import sr_dpo
from measure import RESULTS, cpu, rounded


def main_of_two(args):
    """sppo.main with win_rates_of_two in the place of win_rates."""
    with mock.patch.object(sppo, "win_rates", win_rates_of_two):
        return sppo.main(args)


SCRIPTS = {"sppo": sppo, "dno": dno, "sr_dpo": sr_dpo}
SCRIPTS["sppo_of_two"] = SimpleNamespace(main=main_of_two, Args=sppo.Args)
SLACK = 0.02  # a win rate that is less than this below another one is no worse
STUDENT = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}  # 95 %, by seeds
VERDICTS = ("holds", "within the spread", "does not hold")


# Runs ----------------------------------------------------------------------------------------------------------------

Run = namedtuple("Run", "folder rows")  # a finished run: its folder, and its metrics, a row per iterate


def command_of(script, settings):
    """The command line of a run, less its seed."""
    words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    command = shlex.join(["python", f"{script.removesuffix('_of_two')}.py", *words])
    return f"{command}, win_rates_of_two in the place of win_rates" if script == "sppo_of_two" else command


def run(script, settings, seed):
    """The run of `script` with these settings and seed: read from runs/ if it is finished there, else made."""
    parts = [f"{name}-{value}" for name, value in settings.items()]
    folder = Path("runs") / f"{'-'.join(['claims', script, *parts])[:90]}-s{seed}"  # a name has at most 100 characters
    args = SCRIPTS[script].Args(**settings, seed=seed, name=folder.name)
    rows = common.read_jsonl(folder / "metrics.jsonl")
    if len(rows) <= getattr(args, "iterations", 1):  # of a finished run: the base model's row, and one per iterate
        if folder.exists():
            sys.exit(f"{folder} is of a run that did not finish: remove it")
        print(f"{folder}: {command_of(script, settings)} --seed {seed}", file=sys.stderr, flush=True)
        with contextlib.redirect_stdout(sys.stderr):
            SCRIPTS[script].main(args)
    config = json.loads((folder / "config.json").read_text())
    if any(config[name] != value for name, value in {**settings, "seed": seed}.items()):
        sys.exit(f"{folder} is of another run: remove it")
    return Run(folder, common.read_jsonl(folder / "metrics.jsonl"))


def of(name, iterate=-1):
    """A figure of an iterate: of the start (0), the first one, which learned from the start's samples, or the last."""
    return lambda run: run.rows[iterate][name]


def total(name):
    """The sum of a figure over the iterates."""
    return lambda run: sum(row.get(name, 0) for row in run.rows)


def log_ratio_steps(run):
    """[chosen, rejected] log-ratio of each step of the first iteration."""
    steps = common.read_jsonl(run.folder / "iter_1" / "steps.jsonl")
    return [[step["chosen_log_ratio"], step["rejected_log_ratio"]] for step in steps]


# Claims --------------------------------------------------------------------------------------------------------------


# `measure` of the variants `more`, less that of the variants `less`, is above `least`. Of several variants the mean is
# taken; a number in the place of a variant stands for itself.
Comparison = namedtuple("Comparison", "text measure more less least", defaults=[0.0])


@dataclass
class Claim:
    text: str
    source: str
    variants: dict  # {label: (script, settings)}
    measures: dict  # {label: what it is of a Run}
    comparisons: list = field(default_factory=list)
    reading: str = ""


WINS, EXACT = "wins vs start", "exact match"
QUALITY = {WINS: of("wins_vs_start"), EXACT: of("exact_match")}
CHOSEN, REJECTED = "log-ratio chosen, iteration 1", "log-ratio rejected, iteration 1"
LOG_RATIOS = {CHOSEN: of("chosen_log_ratio", 1), REJECTED: of("rejected_log_ratio", 1)}
PAIRS = {"pairs": total("pairs"), "steps": of("step")}
PAIRS |= {"t>s": total("teacher_student"), "s>t": total("student_teacher")}  # who wins them

# Half of the prompts: half the time, and farther from what a perfect policy wins against the start.
SHORT = {"limit": 2816}
SPPO, SPPO_2 = ("sppo", SHORT), ("sppo", {"k": 2, **SHORT})
DNO, RESTRICTIVE, SPIN = ("dno", {}), {"variant": "restrictive"}, {"variant": "spin"}
# Iterated DPO: dno.py without teacher, margin, replay and SFT term. As in SPPO_2 its pairs are the better and the worse
# of two samples to the same prompts, at the same rate; in iteration 1 they are the same pairs, and only the loss
# differs. dno.py's eta is DPO's beta; 0.1 is 1 / eta of SPPO, untuned: there it collapses. 2 is dno.py's own.
DPO = {"eta": 0.1, "gold": "", "k": 2, "variant": "all", "sft_alpha": 0.0, "replay": 0.0}
DPO |= {"epochs": 3, "batch_size": 16, "learning_rate": 2e-4, **SHORT}
DPO_2 = {**DPO, "eta": 2.0}
# Pairs of the same prompts, all sampled from the start. They are more than on-policy ones, since the start errs more
# often; with 90 to a step instead of 64 there are about as many steps.
OFFLINE = {"iterations": 1, "batch_size": 90}
OFFERED = {"DPO": ("sr_dpo", {"lam": 0.0}), "Sr-DPO": ("sr_dpo", {})}
BEHIND = "accuracy behind p, less accuracy"
LAMBDAS = (0.0, 0.1, 0.3, 0.5, 1.0)


def better(a, b, measure=WINS):
    return Comparison(f"{measure}: {a} above {b}", measure, (a,), (b,))


def no_worse(a, b, measure=WINS):
    return Comparison(f"{measure}: {a} no worse than {b}", measure, (a,), (b,), -SLACK)


CLAIMS = {
    "default": Claim(
        "No claim: the learning curves of the three scripts as they are",
        "README.md",
        {"sppo": ("sppo", {}), "dno": ("dno", {}), "sr_dpo": ("sr_dpo", {})},
        {**QUALITY, "seconds": total("seconds")},
    ),
    "log_ratios": Claim(
        "SPPO lifts the log-ratio of the chosen response above 0 and lowers the rejected one's; DPO lowers both",
        "ours: SPPO, arXiv 2405.00675, section 4.5, cites Pal et al. for DPO and has no experiment of it",
        {"SPPO": SPPO_2, "DNO": DNO, "DPO": ("dno", DPO_2)},
        {**LOG_RATIOS, **QUALITY},
        [
            Comparison("SPPO: the chosen one's is above 0", CHOSEN, ("SPPO",), (0.0,)),
            Comparison("SPPO: the rejected one's is below 0", REJECTED, (0.0,), ("SPPO",)),
            Comparison("DPO: the chosen one's is below 0", CHOSEN, (0.0,), ("DPO",)),
            Comparison("DPO: the rejected one's is below 0", REJECTED, (0.0,), ("DPO",)),
        ],
        reading="SPPO has a target for each of the two, DPO for their difference. DPO at beta 2; see `iterative_dpo`.",
    ),
    "iterative_dpo": Claim(
        "After three iterations SPPO is better than DPO on the same kind of pairs (LC win rate 28.53 against 22.30)",
        "SPPO, arXiv 2405.00675, section 5.2, table 1; beta = 2 was added after the result of 0.1 was seen",
        {"SPPO": SPPO_2, "DPO, beta 0.1": ("dno", DPO), "DPO, beta 2": ("dno", DPO_2)},
        {**QUALITY, "first iterate wins": of("wins_vs_start", 1), **LOG_RATIOS},
        [better("SPPO", "DPO, beta 0.1"), better("SPPO", "DPO, beta 2")],
        reading="Neither beta nor rate was tuned for DPO: the rate is SPPO's. At beta = 0.1 it collapses.",
    ),
    "k": Claim(
        "P estimated from best and worst of five alone (figure 4's K = 2) is as good as P estimated from all five",
        "SPPO, arXiv 2405.00675, section 5.3 and figure 4",
        {
            "from five": SPPO,
            "from the two": ("sppo_of_two", SHORT),
            "from the two, eta 16": ("sppo_of_two", {"eta": 16.0, **SHORT}),
        },
        {**QUALITY, "first iterate wins": of("wins_vs_start", 1), "pairs": total("pairs"), "seconds": total("seconds")},
        [no_worse("from the two", "from five")],
        reading="All train on best and worst of five. Targets from the two are 5/8 as far from 1/2: hence eta 16.",
    ),
    "teacher": Claim(
        "DNO is better than DNO-Restrictive and than SPIN (24.97 against 19.21 and 16.13)",
        "DNO, arXiv 2404.03715, AlpacaEval 2.0 after iteration 3",
        {"DNO": DNO, "restrictive": ("dno", RESTRICTIVE), "SPIN": ("dno", SPIN)},
        {**QUALITY, **PAIRS},
        [better("DNO", "restrictive"), better("DNO", "SPIN")],
        reading="In one epoch DNO takes more steps than both: see `teacher_steps`. No student beats this teacher.",
    ),
    "teacher_steps": Claim(
        "DNO is better than DNO-Restrictive and than SPIN where these, which have fewer pairs, take three epochs",
        "not of the paper: a control of `teacher`, added after its result was seen",
        {"DNO": DNO, "restrictive": ("dno", {**RESTRICTIVE, "epochs": 3}), "SPIN": ("dno", {**SPIN, "epochs": 3})},
        {**QUALITY, **PAIRS},
        [better("DNO", "restrictive"), better("DNO", "SPIN")],
        reading="This teacher is always right. The paper's gain needs a student that beats it at times.",
    ),
    "on_policy": Claim(
        "Three iterations on the policy's own samples are better than one on as many prompts (24.97 against 18.22)",
        "DNO, arXiv 2404.03715, against offline DPO",
        {"on-policy": ("dno", {"replay": 0.0}), "offline": ("dno", OFFLINE)},
        {**QUALITY, **PAIRS},
        [better("on-policy", "offline")],
        reading="The offline run works on the start's errors after these have become rare.",
    ),
    "marginal": Claim(
        "Sr-DPO has a lower marginal than DPO at the same accuracy, as good an accuracy behind p, and a marginal that "
        "is more correlated with quality (0.26 against 0.21)",
        "Sr-DPO, arXiv 2405.21040, marginal, accuracy and correlation",
        OFFERED,
        {
            **{name: of(name.lower()) for name in ("marginal", "accuracy", "Pearson", "Spearman", "Kendall")},
            "accuracy behind p": of("accuracy_p"),
            BEHIND: lambda run: run.rows[-1]["accuracy_p"] - run.rows[-1]["accuracy"],
            **QUALITY,
        },
        [
            Comparison("Sr-DPO: the lower marginal", "marginal", ("DPO",), ("Sr-DPO",)),
            no_worse("Sr-DPO", "DPO", "accuracy"),
            Comparison("Sr-DPO: no less accurate behind p", BEHIND, ("Sr-DPO",), (0.0,), -SLACK),
            *(better("Sr-DPO", "DPO", measure) for measure in ("Pearson", "Spearman", "Kendall")),
        ],
        reading="By eq. 13 a pair with Delta > 0 has to be moved farther, which makes the marginal higher.",
    ),
    "lam": Claim(
        "The win rate rises with lambda, then falls; lambda = 0 is the worst",
        "Sr-DPO, arXiv 2405.21040, win rate over lambda",
        {f"{lam:g}": ("sr_dpo", {} if lam == 0.3 else {"lam": lam}) for lam in LAMBDAS},  # 0.3 is the default
        {**QUALITY, "marginal": of("marginal"), "KL": of("kl")},
        [
            Comparison("0.1, 0.3 and 0.5: in the mean above 0", WINS, ("0.1", "0.3", "0.5"), ("0",)),
            Comparison("0.1, 0.3 and 0.5: in the mean above 1", WINS, ("0.1", "0.3", "0.5"), ("1",)),
            Comparison("1: above 0", WINS, ("1",), ("0",)),
        ],
    ),
}


# Verdicts ------------------------------------------------------------------------------------------------------------


def compare(comparison, figures):
    """{"text", "least", "difference", "low", "high", "verdict"}: the mean difference and its 95 % interval."""

    def value(label, seed):
        return label if isinstance(label, float) else figures[label][comparison.measure][seed]

    n = max(len(values.get(comparison.measure, [])) for values in figures.values())  # seeds
    more = [mean(value(label, seed) for label in comparison.more) for seed in range(n)]
    less = [mean(value(label, seed) for label in comparison.less) for seed in range(n)]
    differences = [a - b for a, b in zip(more, less, strict=True)]
    half = STUDENT[n] * stdev(differences) / math.sqrt(n)
    low, high = mean(differences) - half, mean(differences) + half
    verdict = VERDICTS[0] if low > comparison.least else VERDICTS[2] if high < comparison.least else VERDICTS[1]
    found = {"text": comparison.text, "least": comparison.least, "difference": mean(differences)}
    return {**found, "low": low, "high": high, "verdict": verdict}


def try_claim(name, n_seeds):
    """Make or read the runs of a claim, print what they say, and write results/NAME.json."""
    claim, seeds = CLAIMS[name], range(1, n_seeds + 1)
    runs = {label: [run(*variant, seed) for seed in seeds] for label, variant in claim.variants.items()}
    figures = {label: {m: [read(r) for r in rs] for m, read in claim.measures.items()} for label, rs in runs.items()}

    def by_seed(read):
        return {x: {str(s): read(r) for s, r in zip(seeds, rs, strict=True)} for x, rs in runs.items()}

    drawn = {"default": ("runs", lambda run: run.rows), "log_ratios": ("steps", log_ratio_steps)}  # by pictures.py
    more = {drawn[name][0]: by_seed(drawn[name][1])} if name in drawn else {}
    comparisons = [compare(comparison, figures) for comparison in claim.comparisons]
    verdict = max((one["verdict"] for one in comparisons), key=VERDICTS.index, default="no claim")

    print(f"\n{name}: {claim.text}\n{claim.source}\n")
    commands = {label: command_of(*variant) for label, variant in claim.variants.items()}
    print(*(f"    {label}: {command}" for label, command in commands.items()), sep="\n")
    print(f"\nmean ± standard deviation over {n_seeds} seeds")
    print(" " * 34 + "".join(f"{label:>18}" for label in figures))
    for measure in claim.measures:
        cells = (f"{mean(values[measure]):.3g} ± {stdev(values[measure]):.2g}" for values in figures.values())
        print(f"{measure:<34}" + "".join(f"{cell:>18}" for cell in cells))
    for one in comparisons:
        found = f"{one['difference']:.3g} ({one['low']:.3g} to {one['high']:.3g})"
        print(f"{one['text']}: by {found}, wanted above {one['least']:g}: {one['verdict']}")
    print(f"\n{verdict}. {claim.reading}")

    command = f"python tests/claims/tiny.py {name} --seeds {n_seeds}"
    result = {"claim": claim.text, "source": claim.source, "command": command, "variants": commands, "seeds": n_seeds}
    result |= {"verdict": verdict, "reading": claim.reading, "comparisons": comparisons, "figures": figures}
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    hardware = f"{torch.get_num_threads()} thread(s) on {os.cpu_count()} shared cores of an {cpu()}"
    result |= {**more, "date": time.strftime("%Y-%m-%d"), "hardware": hardware, "versions": versions}
    lines = [f"{json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in rounded(result).items()]
    (RESULTS / f"{name}.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=[*CLAIMS, "all"], metavar="NAME", help=", ".join(CLAIMS))
    parser.add_argument("--seeds", type=int, default=3, choices=STUDENT, metavar="N", help="2 to 10 seeds: 1, 2, ...")
    args = parser.parse_args()
    for name in CLAIMS if args.name == "all" else [args.name]:
        try_claim(name, args.seeds)
