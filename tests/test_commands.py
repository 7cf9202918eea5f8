"""Every command of the README is run: here as it stands, by another test, or it is one that needs a GPU."""

import json
import os
import re
import shlex
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

import common
from test_pairrm import build

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```sh\n(.*?)^```", README.replace("\\\n    ", ""), re.M | re.S)
IN_BLOCKS = [line.partition("  # ")[0].strip() for block in BLOCKS for line in block.splitlines()]
IN_TEXT = re.findall(r"`(python [^`]*)`", README.replace("python\ntests", "python tests"))
SETUP = {"pip install -r requirements.txt", "export OPENAI_API_KEY=..."}
TESTED = {  # by which test; "-": it takes a GPU
    "python common.py pairrm DIR": "test_the_command_that_checks_weights",
    "python sppo.py --resume runs/NAME": "test_a_run_that_is_killed_anywhere_ends_like_one_that_is_not",
    "python tests/claims/pictures.py": "test_pictures",
    "python tests/claims/tabular.py NAME": "test_claims_still_hold",
    "python tests/claims/tiny.py NAME": "test_a_claim_is_tried_and_recorded",
    "python tests/claims/tiny.py default": "test_a_claim_is_tried_and_recorded",
    "python tests/claims/tiny.py compare": "test_a_claim_is_tried_and_recorded",
    "python tests/claims/tiny.py low_eta": "test_a_claim_is_tried_and_recorded",
    "python tests/real_text.py FILE --limit 1500 --epochs 2": "test_real_text",
    "python tests/bench_logps.py": "test_logps",
    "python tests/bench_generate.py --repeats 2": "test_generate",
    "python tests/bench_train.py": "test_train",
    "python tests/bench_7b.py": "test_7b",
    "python tests/bench_logps.py --device cuda": "-",
    "python tests/bench_generate.py --device cuda": "-",
}
SHORTER = {  # what is added to a command so that it takes seconds
    "python sppo.py --help": "",
    "python sr_dpo.py --compare 3": "--limit 160 --n_eval 40 --epochs 1",
    "python dno.py --limit 0 --eta 0.1 --sft_alpha 0 --learning_rate 2e-4": "--limit 160 --n_eval 40",
}
DEFAULT = [f"python {script}.py" for script in ("sppo", "dno", "sr_dpo")]
LARGE = [line for line in IN_BLOCKS if "mistral-7b" in line]
YOURS = [line for line in IN_BLOCKS if "--model DIR" in line]


def run(command, folder):
    """A command of the README in `folder`, on one thread."""
    words = [
        str(ROOT / word) if word.endswith(".py") and (ROOT / word).exists() else word for word in shlex.split(command)
    ]
    words[0] = sys.executable
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True, timeout=1200)


def test_every_command_is_run_somewhere():
    tests = "\n".join(file.read_text(encoding="utf-8") for file in (ROOT / "tests").glob("test_*.py"))
    for command in {*IN_BLOCKS, *IN_TEXT} - SETUP - {*SHORTER, *DEFAULT, *LARGE, *YOURS}:
        test = TESTED[command]
        assert test == "-" or f"def {test}(" in tests, command
    assert {*TESTED, *SHORTER} <= {*IN_BLOCKS, *IN_TEXT}, "commands that are no longer there"
    assert LARGE and YOURS and set(DEFAULT) <= set(IN_BLOCKS)


@pytest.mark.parametrize("command", SHORTER)
def test_commands_in_the_text(command, workdir):
    done = run(f"{command} {SHORTER[command]}", workdir)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", DEFAULT)
def test_the_first_commands_end_where_the_readme_says(command, workdir):
    """Another machine rounds differently, and then trains differently: within three points."""
    told = re.search(rf"^{command} .*?(0\.\d+) → (0\.\d+)", README, re.M)
    done = run(f"{command} --name first", workdir)
    assert done.returncode == 0, done.stderr
    table = common.read_jsonl(workdir / "runs" / "first" / "metrics.jsonl")
    assert [row["exact_match"] for row in (table[0], table[-1])] == pytest.approx(
        [*map(float, told.groups())], abs=0.03
    )
    assert f"{table[-1]['exact_match']:.3g}" in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="here it would start")
@pytest.mark.parametrize("command", LARGE)
def test_a_7b_run_is_refused_in_one_line_where_there_is_no_gpu(command, tmp_path):
    done = run(command, tmp_path)
    assert done.returncode == 2
    assert "a CUDA GPU would do" in done.stderr or "is not reachable" in done.stderr  # where memory would do
    assert len(done.stderr.splitlines()) == 1 and not any(tmp_path.iterdir())


@pytest.mark.parametrize("command", YOURS)
def test_your_model_data_and_judge(command, workdir, tiny_cache):
    judge = workdir / "judge"
    build(judge)
    rows = [{"prompt": f"{i} and {i}?", "chosen": f"{2 * i}", "rejected": "no"} for i in range(40)]
    (workdir / "FILE.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = command.replace("--model DIR", f"--model {common.tiny_policy('tiny', tiny_cache)}")
    few = "--max_prompt_tokens 256 --max_new_tokens 8"
    done = run(f"{command.replace('--judge DIR', '--judge judge')} {few}", workdir)
    assert done.returncode == 0, done.stderr
    assert "hours" in done.stdout and "training" in done.stdout


def test_a_judge_of_ones_own(workdir):
    """The README's lines, behind a judge that likes nines: they take over."""
    lines = re.search(r"^```python\n(.*?)^```", README, re.M | re.S)[1]
    judge = """import torch
class Mine:
    def __call__(self, prompts, responses):
        nines = torch.tensor([[text.count("9") for text in texts] for texts in responses]).float()
        return torch.sigmoid(nines[:, :, None] - nines[:, None, :])
"""
    (workdir / "mine.py").write_text(judge + lines)
    done = run("python mine.py --judge mine --limit 640 --n_eval 160 --iterations 1 --name nines", workdir)
    assert done.returncode == 0, done.stderr
    _, last = common.read_jsonl(workdir / "runs" / "nines" / "metrics.jsonl")
    assert last["win_rate_vs_start"] > 0.55
