"""A diff between two scripts shows the method: what they share on purpose is the same word for word."""

import ast
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
NAMES = {"sppo": 17, "dno": 19, "sr_dpo": 23}  # at most so many from common

# Flags that say otherwise in another script, as they are about pairs there, or of another method.
OTHER_WORDS = {"judge", "limit", "n_eval", "max_prompt_tokens", "eta", "batch_size"}

BLOCKS = {  # of main: name -> (first words, last words)
    "the start": ("    run, table, log = ", "    run, table, log = "),
    "the policy": ("    newest = ", "    policy, tokenizer = "),
    "the first row": ("    if not table:", "        finish_iterate("),
    "batches, optimiser, schedule, checkpoint": ("        rng, size = ", "        for epoch, batch in "),
    "backward": ("                (loss.sum()", "                log_ratios.append("),
    "the step": ("            grad_norm = ", '            row |= {"chosen_log_ratio"'),
    "a step is done": ("            steps.append(row)", "        checkpoint.save(steps, now=True)"),
    "what training ended at": ("        late = ", "        late = "),
    "the end": ("    best = ", "    return table"),
}


def block(script, first, last):
    lines = inspect.getsource(script.main).splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(first))
    end = next(i for i, line in enumerate(lines[start:], start) if line.startswith(last))
    return lines[start : end + 1]


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_that_are_there_twice_are_equal(name):
    first, *others = (block(script, *BLOCKS[name]) for script in SCRIPTS.values())
    assert all(other == first for other in others)


def test_sampling_is_the_same_in_sppo_and_dno():
    words = "        draw = ", "        rows = cached("
    assert block(sppo, *words) == block(dno, *words)


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_flags_of_the_same_name_are_of_the_same_type_and_say_the_same(one, other):
    fields = [{f.name: f for f in dataclasses.fields(SCRIPTS[script].Args)} for script in (one, other)]
    shared = [name for name in fields[0] if name in fields[1]]
    assert len(shared) > 25
    for name in shared:
        mine, theirs = fields[0][name], fields[1][name]
        assert mine.type == theirs.type, name
        if name not in OTHER_WORDS:
            assert mine.metadata["help"] == theirs.metadata["help"], name
    assert shared == [name for name in fields[1] if name in fields[0]]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_has_few_flags_reads_them_all_and_takes_few_names_from_common(script):
    text, shared = ((ROOT / f"{file}.py").read_text() for file in (script, "common"))
    fields = dataclasses.fields(SCRIPTS[script].Args)
    assert len(fields) <= 36
    for field in fields:
        read = f"args.{field.name}" in text + shared or f"self.{field.name}" in text or f'"{field.name}", 1' in shared
        assert read, f"--{field.name} is read nowhere"
    (names,) = (x.names for x in ast.walk(ast.parse(text)) if isinstance(x, ast.ImportFrom) and x.module == "common")
    assert len(names) <= NAMES[script]


def test_the_parts_of_a_script_come_in_the_same_order():
    parts = ["class Args", "PAPER = ", "RECIPES = ", "# The maths ---", "# Pairs ---", "def make_pairs("]
    parts += ["# Main ---", "def main("]
    for script in SCRIPTS:
        text = (ROOT / f"{script}.py").read_text()
        places = [text.index(part) for part in parts]
        assert places == sorted(places), script
