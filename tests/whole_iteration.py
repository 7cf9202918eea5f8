"""One iteration of sppo.py as a user runs it, killed in the midst of training and resumed: seconds and memory.

    python tests/whole_iteration.py --folder DIR     a Mistral of 7.2 G parameters, on a GPU of 80 GB; not run yet
    python tests/whole_iteration.py --device cpu --hidden 128 --layers 2 --vocab 120 --judge_layers 1 --prompts 32 \\
        --prompt_tokens 10 --k 3 --new_tokens 8 --learning_rate 1e-3     a minute on a CPU core

Policy and judge have random weights and come from folders, as a user's do: a Mistral with the chat template of `tiny`
and a token per character, and a PairRM of full size. The recipe is the paper's, but for few prompts (a quarter as many
are held out), two steps on half of them each, and no warm-up, so that both move the weights. SIGKILL comes after the
first step's checkpoint. Seconds: all calls of a function, compilation included; "step" is loss, gradient and update.
GB: the most that tensors take on the GPU. Random policies seldom end an answer; it is luck whether they beat the base
model, without which there is no `final`. At 7.2 G, runs/ in --folder wants 116 GB of disk, and TMPDIR 16.
"""

import json
import signal
import subprocess
import sys
import time
from functools import wraps
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from bench_7b import save_mistral
from bench_pairrm import save_pairrm
from measure import common, make_parser, record, show

SIZES = {"hidden": 4096, "layers": 32, "vocab": 32000, "judge_layers": 24}
SIZES |= {"prompts": 64, "prompt_tokens": 256, "k": 5, "new_tokens": 128}
BEGIN = "--recipe paper --name x --iterations 1 --warmup_steps 0 --checkpoint_minutes 0"
TIMED = ["load_judge", "load_policy", "sample_responses", "preferences", "add_logps", "evaluate"]


def timed_run(title, *flags):
    """sppo.py with these flags; a call adds a line to the file `title`. `wraps`: config.json names none as replaced."""
    import sppo  # measure.py has told where it is

    last = [0.0]  # when the last of these calls ended

    def note(name, since):
        cuda = torch.cuda.is_initialized() and not torch.cuda.synchronize()
        last[0], peak = time.perf_counter(), torch.cuda.max_memory_allocated() / 1e9
        with open(title, "a") as file:
            file.write(json.dumps([name, last[0] - since, peak]) + "\n")
        _ = cuda and torch.cuda.reset_peak_memory_stats()

    def timed(function):
        @wraps(function)
        def call(*inputs, **settings):
            name = function.__qualname__
            if name == "Checkpoint.save" and not settings:  # behind a step, which follows Checkpoint.load or .save
                note("step", last[0])
            since, result = time.perf_counter(), function(*inputs, **settings)
            note(name, since)
            if (title, name) == ("killed", "Checkpoint.save"):
                signal.raise_signal(signal.SIGKILL)
            return result

        return call

    for owner, names in ((sppo, TIMED), (common, ["save_policy"]), (common.Checkpoint, ["load", "save"])):
        for name in names:
            setattr(owner, name, timed(getattr(owner, name)))
    common.cli(sppo.main, sppo.Args, sppo.RECIPES, sppo.__doc__, list(flags))


def run(title, code, folder, words, **flags):
    """timed_run in a process, in this folder, which is to end with this code: the table of its calls."""
    since, words = time.perf_counter(), words.split() + [f"--{name}={value}" for name, value in flags.items()]
    found = subprocess.run([sys.executable, __file__, "timed", title, *words], cwd=folder).returncode
    common.require(found == code, f"the run that was to be {title} ended with {found}, not {code}")
    wall, rows, table = time.perf_counter() - since, common.read_jsonl(folder / title), {}
    for name, seconds, peak in [*rows, ["all, with imports", wall, max(row[2] for row in rows)]]:
        calls, total, most = table.get(name, (0, 0.0, 0.0))
        table[name] = calls + 1, total + seconds, max(most, peak)
    return show(title, {"calls": "d", "seconds": ",.2f", "peak GB": ",.1f"}, table, lambda _, numbers: numbers)


def main():
    parser = make_parser(__doc__)
    for flag, default in {**SIZES, "learning_rate": 5e-7}.items():
        parser.add_argument(f"--{flag}", type=type(default), default=default)
    parser.add_argument("--folder", help="where runs/ is made; default: the temporary folder")
    args = parser.parse_args()
    with TemporaryDirectory() as models, TemporaryDirectory(dir=args.folder) as folder:
        models, folder = Path(models), Path(folder)
        n = save_mistral(models / "policy", args)
        save_pairrm(models / "judge", models / "policy", args.judge_layers, args.device, 4 * args.vocab)
        digits = torch.randint(10, (args.prompts + args.prompts // 4, args.prompt_tokens)).tolist()
        common.write_jsonl(models / "prompts.jsonl", [{"prompt": "".join(map(str, row))} for row in digits])
        torch.cuda.empty_cache()
        where = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
        print(where := f"{where}; {n / 1e9:.3g} G parameters; torch {torch.__version__}; {time.strftime('%Y-%m-%d')}")
        flags = {"model": models / "policy", "prompts": models / "prompts.jsonl", "judge": models / "judge"}
        flags |= {"n_eval": args.prompts // 4, "batch_size": args.prompts // 2, "k": args.k, "device": args.device}
        flags |= {"max_new_tokens": args.new_tokens, "learning_rate": args.learning_rate}
        killed = run("killed", -signal.SIGKILL, folder, BEGIN, **flags)
        resumed = run("resumed", 0, folder, "--resume runs/x --checkpoint_minutes 30", device=args.device)
        answers = [y for row in common.read_jsonl(folder / "runs/x/iter_1/responses.jsonl") for y in row["responses"]]
        row, final = common.read_jsonl(folder / "runs/x/metrics.jsonl")[1], (folder / "runs/x/final").exists()
    figures = {"tokens/s sampled": sum(len(y["ids"]) for y in answers) / killed["sample_responses"]["seconds"]}
    figures |= {"pairs/s judged": len(answers) * (args.k - 1) / killed["preferences"]["seconds"], "final": final}
    print(figures | {"pairs": row["pairs"], "wins_vs_start": row["wins_vs_start"]})
    record(args, where, killed=killed, resumed=resumed, figures=figures, metrics=row)


if __name__ == "__main__":
    timed_run(*sys.argv[2:]) if sys.argv[1:2] == ["timed"] else main()
