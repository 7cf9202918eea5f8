"""A diff between two scripts shows the method: what they share on purpose is the same word for word."""

import dataclasses
import inspect
import itertools

import pytest
from conftest import ROOT

import dno
import sppo
import sr_dpo

SCRIPTS = {"sppo": sppo, "dno": dno, "sr_dpo": sr_dpo}
PAIRS = list(itertools.combinations(SCRIPTS, 2))

# Flags that say otherwise in another script, as they are about pairs there, or of another method.
OTHER_WORDS = {"judge", "limit", "n_eval", "max_prompt_tokens", "iterations", "k", "eta", "batch_size", "seed"}
OTHER_WORDS |= {"learning_rate", "pairs", "loss"}

BLOCKS = {  # name -> (function, first words, last words); from every script
    "the start": ("main", "    if args.dry_run:", "        return []"),
    "the first row": ("main", "    record(run, table", "    record(run, table"),
    "evaluation": ("main", "        metrics, iterate_prefs = ", "        metrics, iterate_prefs = "),
    "the end": ("main", "    del policy", "    return table"),
    "the step": ("train_step", "    grad_norm = ", "    optimizer.zero_grad()"),
}


def block(script, function, first, last):
    lines = inspect.getsource(getattr(script, function)).splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(first))
    end = next(i for i, line in enumerate(lines[start:], start) if line.startswith(last))
    return lines[start : end + 1]


@pytest.mark.parametrize(("one", "other"), PAIRS)
@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_that_are_there_twice_are_equal(name, one, other):
    assert block(SCRIPTS[one], *BLOCKS[name]) == block(SCRIPTS[other], *BLOCKS[name])


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_flags_of_the_same_name_are_of_the_same_type_and_say_the_same(one, other):
    fields = [{f.name: f for f in dataclasses.fields(SCRIPTS[script].Args)} for script in (one, other)]
    shared = [name for name in fields[0] if name in fields[1]]
    assert len(shared) > 30
    for name in shared:
        mine, theirs = fields[0][name], fields[1][name]
        if name not in ("pairs", "loss"):
            assert mine.type == theirs.type, name
        if name not in OTHER_WORDS:
            assert mine.metadata["help"] == theirs.metadata["help"], name
    order = [name for name in fields[1] if name in fields[0] and name not in ("pairs", "loss")]
    assert [name for name in shared if name not in ("pairs", "loss")] == order


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_is_read_and_every_import_used(script):
    text = (ROOT / f"{script}.py").read_text()
    shared = (ROOT / "common.py").read_text()
    for field in dataclasses.fields(SCRIPTS[script].Args):
        assert f"args.{field.name}" in text + shared, f"--{field.name} is read nowhere"


def test_the_parts_of_a_script_come_in_the_same_order():
    parts = ["class Args", "PAPER = ", "RECIPES = ", "# The maths ---", "# Roll-out and pairs ---"]
    parts += ["def make_pairs(", "def train_step(", "# Main ---", "def main("]
    for script in SCRIPTS:
        text = (ROOT / f"{script}.py").read_text()
        places = [text.index(part) for part in parts]
        assert places == sorted(places), script
