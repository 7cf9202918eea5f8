"""A diff between two scripts shows the method: what they share on purpose is the same word for word."""

import ast
import dataclasses
import inspect
import itertools
import os
import subprocess
import sys

import pytest
from conftest import ROOT

import common
import dno
import sppo
import sr_dpo

SCRIPTS = {"sppo": sppo, "dno": dno, "sr_dpo": sr_dpo}
NAMES = {"sppo": 23, "dno": 24, "sr_dpo": 23}  # at most so many from common

# Flags that say otherwise in another script, as they are about pairs there, or of another method.
OTHER_WORDS = {"judge", "limit", "n_eval", "max_prompt_tokens", "eta", "batch_size"}

BLOCKS = {  # of main: name -> (first words, last words)
    "the run": ("    run, history, log = ", "log\n"),
    "the policy": ("    newest = ", "args.checkpointing)\n"),
    "the first row": ("    if not history:\n", "run, 0, args))\n"),
    "names of an iteration": ("        folder, seed, began = ", "time.time()\n"),
    "sampling": ("        respond = ", "parts[t - 1], respond)\n"),  # not in sr_dpo.py
    "batches": ("        rng, size = ", "range(0, len(order), size)]\n"),
    "checkpoint": ("        checkpoint = ", 'desc="training"):\n'),
    "micro-batches": ("            for micro in ", "cut to fit memory\n"),
    "backward": ("                (loss.sum()", "(logps - ref_logps).detach())\n"),
    "the step": ("            grad_norm = ", '"rejected_log_ratio": log_ratio[-1].item()}\n'),
    "a step is done": ("            steps.append(row)", "        checkpoint.save(steps, now=True)"),
    "evaluation": ("        metrics = evaluate(", "args)"),
    "late steps": ("        metrics |= {name: sum(", "of the last quarter\n"),
    "the end": ("    finish_run(", "history)"),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_that_are_there_twice_are_equal(name):
    first, last = BLOCKS[name]
    sources = (inspect.getsource(script.main) for script in SCRIPTS.values())
    starts = [source[source.index(first) :] for source in sources if first in source]
    blocks = [start[: start.index(last) + len(last)] for start in starts]
    assert len(blocks) == (2 if name == "sampling" else 3) and len(set(blocks)) == 1


@pytest.mark.parametrize(("one", "other"), itertools.combinations(SCRIPTS, 2))
def test_flags_of_the_same_name_are_of_the_same_type_and_say_the_same(one, other):
    fields = [{f.name: f for f in dataclasses.fields(SCRIPTS[script].Args)} for script in (one, other)]
    shared = [name for name in fields[0] if name in fields[1]]
    assert len(shared) > 25 and shared == [name for name in fields[1] if name in fields[0]]
    for name in shared:
        mine, theirs = fields[0][name], fields[1][name]
        assert mine.type == theirs.type, name
        assert name in OTHER_WORDS or mine.metadata["help"] == theirs.metadata["help"], name


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_has_few_flags_reads_them_all_and_takes_few_names_from_common(script):
    text, shared = ((ROOT / f"{file}.py").read_text() for file in (script, "common"))
    flags = [field.name for field in dataclasses.fields(SCRIPTS[script].Args)]
    read = {name for name in flags if f"args.{name}" in text + shared or f'getattr(args, "{name}"' in shared}
    assert len(flags) <= 39 and set(flags) == read
    (names,) = (x.names for x in ast.walk(ast.parse(text)) if isinstance(x, ast.ImportFrom) and x.module == "common")
    assert len(names) <= NAMES[script]
    for name, recipe in SCRIPTS[script].RECIPES.items():  # name flags that exist, and values in range
        assert set(recipe) <= set(flags) and (name in common.MODELS or name in ("digits", "small", "paper"))
        numbers = ((name, value) for name, value in recipe.items() if not isinstance(value, str))
        limits = {field.name: field.metadata for field in dataclasses.fields(SCRIPTS[script].Args)}
        assert all(limits[name]["low"] <= value <= limits[name]["high"] for name, value in numbers)


def test_the_parts_of_a_script_come_in_the_same_order():
    parts = ["class Args", "PAPER = ", "RECIPES = ", "# The maths ---", "# Pairs ---", "def make_pairs("]
    parts += ["# Main ---", "def main(", 'if __name__ == "__main__":\n    cli(main, Args, RECIPES, __doc__)\n']
    for script in SCRIPTS:
        text = (ROOT / f"{script}.py").read_text()
        places = [text.index(part) for part in parts]
        assert places == sorted(places) and text.endswith(parts[-1]), script


def test_the_suite_of_a_gpu():
    hidden = "CUDA_VISIBLE_DEVICES", "TRITON_INTERPRET"
    env = {name: value for name, value in os.environ.items() if name not in hidden} | {"ON_CUDA": "1"}
    seen = [sys.executable, "-c", "import torch; raise SystemExit(not torch.cuda.is_available())"]
    if subprocess.run(seen, env=env).returncode:
        pytest.skip("no CUDA GPU")
    command = [sys.executable, "-m", "pytest", "-q", str(ROOT / "tests" / "test_cuda.py")]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:]
