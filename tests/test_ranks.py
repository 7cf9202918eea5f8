"""Several ranks, on the CPU with gloo: the same run as with one. And samples of another engine."""

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import sample_with_vllm
from conftest import ROOT
from steps import cli, lines, run

import common
import sppo

FLAGS = {"limit": 120, "n_eval": 24, "epochs": 1, "batch_size": 16}
SELF_PLAY = {**FLAGS, "iterations": 2, "k": 3}
SCRIPTS = {"sppo": SELF_PLAY, "dno": SELF_PLAY, "sr_dpo": FLAGS}


def torchrun(n, script, **flags):
    """torchrun of n ranks, as a process."""
    words = [f"--{name}={value}" for name, value in flags.items()]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(n), str(script)]
    return subprocess.Popen([*command, *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def same(one, other, rel=1e-3):
    """Whether two metrics, files of pairs, ... are equal, numbers to `rel`, all else exactly; but for times."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[name], other[name]) for name in one.keys() - {"seconds"})
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return one == (pytest.approx(other, rel=rel, abs=rel) if isinstance(other, float) else other)


@pytest.mark.parametrize(("script", "n"), [("sppo", 3), ("dno", 2), ("sr_dpo", 2)])
def test_several_ranks_make_the_run_of_one(workdir, script, n):
    one, _ = run(importlib.import_module(script), "one", **SCRIPTS[script])
    several = torchrun(n, ROOT / f"{script}.py", **SCRIPTS[script], name="several")
    said = several.communicate()[0]
    assert several.returncode == 0, said
    assert said.count("judge digits, seed") == said.count("prompts to train on") == 1 and f"{n} ranks" in said
    several = Path("runs/several")
    mine, theirs = ({file.relative_to(folder) for file in folder.rglob("*")} for folder in (one, several))
    assert mine == theirs
    for file in one.glob("iter_1/*.jsonl"):
        assert same(lines(file), lines(several / "iter_1" / file.name)), file
    if script != "sr_dpo":  # a sample depends on seed, prompt and index alone
        name = "iter_1/responses.jsonl"
        assert (one / name).read_bytes() == (several / name).read_bytes()
    assert same(lines(one / "metrics.jsonl"), lines(several / "metrics.jsonl"))


def test_a_rank_that_dies_ends_the_others_and_the_run_goes_on_with_another_number(workdir):
    _, whole = run(sppo, "whole", **SELF_PLAY)
    killed = torchrun(2, ROOT / "sppo.py", **SELF_PLAY, name="x")
    while not (workdir / "runs/x/iter_1/responses.jsonl").exists():
        assert killed.poll() is None, killed.stdout.read()
        time.sleep(0.01)
    workers = subprocess.check_output(["pgrep", "-P", str(killed.pid)], text=True).split()
    os.kill(int(workers[-1]), signal.SIGKILL)
    assert killed.wait(60) != 0
    resumed = torchrun(3, ROOT / "sppo.py", resume="runs/x")
    assert resumed.wait() == 0, resumed.stdout.read()
    assert same(whole, lines(workdir / "runs/x/metrics.jsonl"))


DRIVER = """
import sys
sys.path[:0] = [{root!r}, {tests!r}]
import common, sppo, torch
make, evaluate = sppo.make_optimizer, sppo.evaluate

def differ(policy, *rest):
    if common.RANK == 1:
        next(policy.parameters()).data += 1e-3
    return make(policy, *rest)

def no_memory(*args):
    if common.RANK == 1:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
    return evaluate(*args)

sppo.{name} = {fault}
common.cli(sppo.main, sppo.Args, sppo.RECIPES, sppo.__doc__)
"""


@pytest.mark.parametrize(
    ("name", "fault", "flags", "line"),
    [
        ("make_optimizer", "differ", {}, "the ranks' policies have diverged"),
        ("evaluate", "no_memory", {}, "rank 1: CUDA out of memory; lower --slots or --micro_tokens, then --resume"),
        ("evaluate", "evaluate", {"k": 1}, "--k 1: must be from 2 to 128"),
        ("evaluate", "evaluate", {"resume": "runs/nothing"}, "not the folder of a run"),  # rank 0's error on all ranks
    ],
)
def test_what_goes_wrong_is_said(workdir, name, fault, flags, line):
    text = DRIVER.format(root=str(ROOT), tests=str(ROOT / "tests"), name=name, fault=fault)
    (workdir / "driver.py").write_text(text)
    process = torchrun(2, workdir / "driver.py", **{**SELF_PLAY, "name": "x", **flags})
    said = process.communicate()[0]
    assert process.returncode != 0 and said.count(line) >= 1, said
    assert fault != "evaluate" or "onnection" not in said, "all ranks have the same error, none waits for another"


def test_samples_of_vllm_are_the_runs_own(workdir, monkeypatch):
    class Engine:  # as vLLM answers: token_ids with the token that ended the answer
        def __init__(self, model, dtype, seed):
            self.policy, self.seed = common.load_policy(model)[0], seed

        def generate(self, prompts, settings):
            ids = [prompt["prompt_token_ids"] for prompt in prompts]
            assert {type(x) for x in ids} == {list}  # which vLLM wants
            more = {"k": settings.n, "max_new_tokens": settings.max_tokens, "eos_ids": settings.stop_token_ids}
            rows = common.generate(self.policy, ids, seed=self.seed, **more)
            return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=tuple(y)) for y in row]) for row in rows]

    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=Engine, SamplingParams=SimpleNamespace))
    flags = [f"--{name}={value}" for name, value in {**SELF_PLAY, "iterations": 1, "name": "x"}.items()]
    cli(sppo, *flags)
    shutil.rmtree(workdir / "runs/x/iter_1")  # as if it had been stopped before it sampled
    common.write_jsonl(workdir / "runs/x/metrics.jsonl", lines(workdir / "runs/x/metrics.jsonl")[:1])
    sample_with_vllm.main("runs/x", 1)
    written = (workdir / "runs/x/iter_1/responses.jsonl").read_bytes()
    cli(sppo, "--resume", "runs/x")
    assert (workdir / "runs/x/iter_1/responses.jsonl").read_bytes() == written
    assert len(json.loads(written.splitlines()[0])["responses"]) == 3
    assert len(lines(workdir / "runs/x/metrics.jsonl")) == 2
