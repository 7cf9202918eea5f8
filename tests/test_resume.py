"""A run that is killed goes on as if nothing had been: each job runs in a process of its own that is really killed."""

import itertools
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import numpy
import pytest
import torch
from safetensors.torch import load_file

import common
import dno
import sppo
import sr_dpo
from common import InputError, stage

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not hasattr(os, "fork"), reason="wants os.fork"),
]

JOBS = {
    "sppo": (sppo, {"limit": 48, "n_eval": 8, "iterations": 2, "k": 3, "epochs": 2, "batch_size": 4}),
    "dno": (dno, {"limit": 48, "n_eval": 8, "iterations": 3, "k": 2, "batch_size": 16, "keep": 1, "best_of": 2}),
    "sr_dpo": (sr_dpo, {"limit": 48, "n_eval": 8, "epochs": 2, "batch_size": 4}),
    "sr_dpo online": (sr_dpo, {"limit": 48, "n_eval": 8, "online": True, "iterations": 2, "k": 3, "batch_size": 4}),
}
TIMES = {"seconds", "train_seconds", "tokens_per_second"}


def in_a_process(function, kill_at=None, count=None):
    """Run function() in a fork. Returns its exit code, or minus the signal.

    An instant is a call or a return of any function, Python's or C's: no clock decides, so a fast machine is killed
    just as often. At instant kill_at the process kills itself; with count, a file, it writes there how many it saw."""
    pid = os.fork()
    if not pid:
        code = 1
        try:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1), os.dup2(null, 2)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            instants = itertools.count()
            if kill_at is not None:
                sys.setprofile(lambda *_: os.kill(os.getpid(), signal.SIGKILL) if next(instants) == kill_at else None)
            elif count is not None:
                sys.setprofile(lambda *_: next(instants))
            function()
            sys.setprofile(None)
            if count is not None:
                count.write_text(str(next(instants)))
            code = 0
        except SystemExit as stop:
            code = stop.code
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def start(job, name):
    script, settings = JOBS[job]
    script.main(script.Args(name=name, checkpoint_minutes=0.0, **settings))


def resume(job, name):
    """Through the command line, as a user would; a run that was killed before it began is begun anew."""
    script, _ = JOBS[job]
    if not Path("runs", name, "config.json").exists():
        if Path("runs", name).exists():
            common.shutil.rmtree(Path("runs", name))
        return start(job, name)
    common.cli(script.main, script.Args, script.RECIPES, script.__doc__, ["--resume", f"runs/{name}"])


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def result(folder):
    """Everything that a run leaves, but for times."""
    found = {}
    for file in sorted(folder.rglob("*")):
        name = str(file.relative_to(folder))
        if file.suffix == ".safetensors":
            found[name] = {key: value.numpy().tobytes() for key, value in load_file(file).items()}
        elif name in ("metrics.jsonl",):
            found[name] = [{k: v for k, v in row.items() if k not in TIMES} for row in lines(file)]
        elif name == "outputs.json":
            found[name] = [(row["instruction"], row["output"]) for row in json.loads(file.read_text())]
        elif file.is_file() and name not in ("config.json", ".lock") and file.suffix != ".md":
            found[name] = file.read_bytes()
    return found


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(common, "CHUNK_OF_PROMPTS", 4)


@pytest.mark.parametrize("job", JOBS)
def test_a_run_that_is_killed_anywhere_ends_like_one_that_is_not(workdir, small_chunks, job):
    assert in_a_process(lambda: start(job, "whole"), count=workdir / "instants") == 0
    instants, right = int((workdir / "instants").read_text()), result(workdir / "runs" / "whole")
    rng = random.Random(time.time_ns())  # other instants in every run of the tests
    kills = runs = 0
    while kills < 12:
        name, runs = f"killed-{runs}", runs + 1
        code = in_a_process(lambda: start(job, name), rng.randrange(instants))  # noqa: B023  (called at once)
        assert code == -signal.SIGKILL
        while code != 0:
            kills += 1
            more = rng.randrange(instants) if kills % 4 else None  # killed again and again, then let end
            code = in_a_process(lambda: resume(job, name), more)  # noqa: B023
            assert code in (0, -signal.SIGKILL)
        found = result(workdir / "runs" / name)
        assert found.keys() == right.keys()
        for file, content in right.items():
            assert found[file] == content, f"{file} after {kills} kills"


@pytest.mark.parametrize("job", JOBS)
def test_the_seed_decides_everything_and_nothing_else_does(workdir, job):
    script, settings = JOBS[job]
    found = []
    for i, seed in enumerate([1, 1, 2]):
        random.seed(i), torch.manual_seed(i), numpy.random.seed(i)  # what a run must not draw from
        script.main(script.Args(name=f"run-{i}", **settings, seed=seed))
        found.append(result(workdir / "runs" / f"run-{i}"))
    assert found[0] == found[1]
    alike = {file for file in found[0].keys() & found[2].keys() if found[0][file] == found[2][file]}
    assert not {file for file in alike if file.endswith((".jsonl", "model.safetensors"))}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_training_after_its_step(workdir, number):
    start_at = {"batch_size": 4, "epochs": 3, "limit": 48, "n_eval": 8}

    def job():
        step, seen = sr_dpo.train_step, []

        def counted(*given):
            seen.append(1)
            if len(seen) == 5:
                os.kill(os.getpid(), number)
            return step(*given)

        sr_dpo.train_step = counted
        flags = [x for name, value in start_at.items() for x in (f"--{name}", str(value))]
        common.cli(sr_dpo.main, sr_dpo.Args, sr_dpo.RECIPES, sr_dpo.__doc__, ["--name", "x", *flags])

    assert in_a_process(job) == 130
    state = torch.load(workdir / "runs" / "x" / "iter_1" / "checkpoint.pt", weights_only=True)
    assert len(state["steps"]) == 5
    assert in_a_process(lambda: resume("sr_dpo", "x")) == 0
    sr_dpo.main(sr_dpo.Args(name="y", **start_at))
    assert result(workdir / "runs" / "x") == result(workdir / "runs" / "y")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_job_in_the_background_stops_too(workdir, number):
    """Shells start background jobs of scripts with Ctrl-C ignored."""

    def job():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        sample = common.generate

        def interrupted(*given, **settings):
            os.kill(os.getpid(), number)
            return sample(*given, **settings)

        common.generate = interrupted
        common.cli(sr_dpo.main, sr_dpo.Args, sr_dpo.RECIPES, sr_dpo.__doc__, ["--name", "x", "--limit", "48"])

    assert in_a_process(job) == 130


def test_a_bf16_master_goes_on_to_the_bit(workdir, tmp_path):
    """What a checkpoint holds of SplitMaster: five steps are two, a checkpoint, and three."""
    pairs, args = common.digit_pairs(40, 1), sr_dpo.Args()

    def begin():
        policy, tokenizer = common.load_policy("tiny-p", dtype=torch.bfloat16)
        rows = sr_dpo.make_pairs(policy, tokenizer, pairs, args)
        for name, prompt_ids in sr_dpo.REFERENCES:
            common.attach_ref_logps(policy, rows, args, name, prompt_ids)
        optimizer = common.make_optimizer(policy, "rmsprop", 1e-4)
        return policy, optimizer, torch.optim.lr_scheduler.LinearLR(optimizer), rows

    def go(policy, optimizer, scheduler, rows, steps):
        return [sr_dpo.train_step(policy, optimizer, scheduler, rows[i * 8 : i * 8 + 8], args) for i in steps]

    policy, *others = begin()
    right = go(policy, *others, range(5))
    other, optimizer, scheduler, rows = begin()
    done = go(other, optimizer, scheduler, rows, range(2))
    common.save_checkpoint(tmp_path / "c.pt", other, optimizer, scheduler, done)
    third, optimizer, scheduler, rows = begin()
    steps = common.load_checkpoint(tmp_path / "c.pt", third, optimizer, scheduler)
    assert steps + go(third, optimizer, scheduler, rows, range(2, 5)) == right
    for p, q in zip(policy.parameters(), third.parameters(), strict=True):
        assert torch.equal(p, q) and torch.equal(p.master_remainder, q.master_remainder)


# Stages --------------------------------------------------------------------------------------------------------------


def test_a_stage_is_done_once_and_goes_on_from_whole_chunks(tmp_path):
    asked = []

    def make(items):
        asked.append(items)
        if items[0] == 6 and len(asked) == 3:
            raise KeyboardInterrupt
        return [{"i": i, "x": 0.1 * i} for i in items]

    path, items = tmp_path / "rows.jsonl", list(range(10))
    with pytest.raises(KeyboardInterrupt):
        stage(path, items, make, 3)
    assert asked == [[0, 1, 2], [3, 4, 5], [6, 7, 8]] and not path.exists()
    with open(tmp_path / "rows.jsonl.part", "a") as file:
        file.write('{"i": 6, "x": 0.6}\n{"i": 7, "x"')  # a row of the third chunk, and one cut short
    rows = stage(path, items, make, 3)
    assert asked[3:] == [[6, 7, 8], [9]] and rows == [{"i": i, "x": 0.1 * i} for i in items]
    assert stage(path, items, make, 3) == rows and len(asked) == 5
    assert [file.name for file in tmp_path.iterdir()] == ["rows.jsonl"]


def test_line_separators_within_a_text_end_no_row(tmp_path):
    rows = [{"text": "a\u2028b\x85c\x0bd\r\ne"}, {"text": "f"}]
    assert stage(tmp_path / "rows.jsonl", [0, 1], lambda items: rows) == rows
    assert stage(tmp_path / "rows.jsonl", [0, 1], None) == rows  # read back


def test_a_damaged_stage_is_named(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"i": 1}\n{"i"')
    with pytest.raises(InputError, match=r"rows\.jsonl: cannot be read .* remove it, and --resume makes it anew"):
        stage(tmp_path / "rows.jsonl", [1, 2], lambda items: items)


# What is refused -----------------------------------------------------------------------------------------------------


def refusal(capsys, *flags):
    with pytest.raises(SystemExit) as stopped:
        common.cli(sr_dpo.main, sr_dpo.Args, sr_dpo.RECIPES, sr_dpo.__doc__, list(flags))
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and err.count("\n") == 1
    return err


@pytest.fixture
def run(workdir):
    sr_dpo.main(sr_dpo.Args(name="x", **JOBS["sr_dpo"][1]))
    return workdir / "runs" / "x"


def test_a_finished_run_can_be_resumed_and_stays(run, capsys):
    before, times = result(run), [row.get("train_seconds") for row in lines(run / "metrics.jsonl")]
    common.cli(sr_dpo.main, sr_dpo.Args, sr_dpo.RECIPES, sr_dpo.__doc__, ["--resume", str(run)])
    assert times[1] and [row.get("train_seconds") for row in lines(run / "metrics.jsonl")] == times
    assert result(run) == before and "lies in" in capsys.readouterr().out


def test_other_values_are_named(run, capsys):
    err = refusal(capsys, "--resume", str(run), "--beta", "0.3", "--seed", "7")
    assert "it was begun with other values: " in err and "--beta 0.3 (there 1.0)" in err and "--seed 7 (there 1)" in err
    assert "--lam" not in err


def test_what_is_no_run(workdir, capsys):
    for empty in (["--resume", ""], ["--resume="]):
        assert "--resume '': give a run's folder" in refusal(capsys, *empty)
    assert "--resume runs/nothing: no run's folder" in refusal(capsys, "--resume", "runs/nothing")
    (workdir / "runs" / "y").mkdir()
    (workdir / "runs" / "y" / "config.json").write_text("[1]")
    assert "no run's folder" in refusal(capsys, "--resume", "runs/y")


def test_another_device_is_refused(run, capsys):
    config = json.loads((run / "config.json").read_text())
    common.write_json(run / "config.json", {**config, "parameters": 5})
    assert "it was begun with another parameters: 5, not 455808" in refusal(capsys, "--resume", str(run))


def test_two_processes_do_not_work_in_one_folder(run, capsys):
    assert in_a_process(lambda: resume("sr_dpo", "x")) == 2  # this process still has it


def test_a_damaged_checkpoint_is_named(run, capsys):
    common.shutil.rmtree(run / "iter_1" / "policy")
    (run / "iter_1" / "checkpoint.pt").write_bytes(b"PK nonsense")
    assert "checkpoint.pt: damaged" in refusal(capsys, "--resume", str(run))
