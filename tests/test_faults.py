"""What goes wrong outside the program: each fault is really brought about, and nothing that was finished is lost."""

import errno
import json
import os
import random
import resource
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

import common
import dno
import sppo
import sr_dpo
from common import InputError
from test_llm import Server, fair
from test_resume import JOBS, result

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not hasattr(os, "fork"), reason="wants os.fork"),
]


def cli(script, *flags, before=lambda: None):
    """The command line in a fork, after before(): (exit code, what it said on stderr)."""
    reading, pipe = os.pipe()
    pid = os.fork()
    if not pid:
        code = 1
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1), os.dup2(pipe, 2)
            sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115  (pytest has another one)
            before()
            common.cli(script.main, script.Args, script.RECIPES, script.__doc__, list(flags))
            code = 0
        except SystemExit as stop:
            code = stop.code
        finally:
            sys.stderr.flush()
            os._exit(code)
    os.close(pipe)
    with open(reading) as file:
        said = file.read()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), said


def flags(job, **more):
    settings = {**JOBS[job][1], "checkpoint_minutes": 0.0, **more}
    return [str(x) for name, value in settings.items() for x in (f"--{name}", value)]


def refused(code_and_said, *words):
    code, said = code_and_said
    assert code == 2 and said.count("\n") == 1, said
    for word in words:
        assert word in said


def goes_on(script, job, name, *more):
    """Resume runs/NAME and compare with a run to which nothing happened."""
    assert cli(script, "--resume", f"runs/{name}", *more) == (0, "")
    right = {**JOBS[job][1], "name": f"{name}-right"}
    script.main(script.Args(**right))
    found, wanted = (result(common.Path("runs", folder)) for folder in (name, f"{name}-right"))
    found.pop("iter_1/bad_batch.jsonl", None)
    assert found == wanted


# Disk ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("most", [1_000_000, 3_000_000])  # bytes: no checkpoint of 3.7 MB fits, and no policy of 1.9
def test_a_disk_that_is_full_in_the_middle_of_a_checkpoint(workdir, most):
    def fill():
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))

    refused(cli(sr_dpo, "--name", "x", *flags("sr_dpo"), before=fill), "cannot be written", "kept for --resume")
    assert not [file for file in (workdir / "runs" / "x").rglob("*") if file.stat().st_size >= most]
    assert (workdir / "runs" / "x" / "iter_1" / "pairs.jsonl").exists()
    goes_on(sr_dpo, "sr_dpo", "x")


@pytest.mark.parametrize("writes", [3, 6, 9])
def test_a_disk_that_becomes_read_only(workdir, writes):
    def break_after_some_writes():
        replace, done = os.replace, []

        def broken(*paths):
            done.append(paths)
            if len(done) > writes:
                raise OSError(errno.EROFS, "Read-only file system")
            return replace(*paths)

        os.replace = broken

    refused(cli(sppo, "--name", "x", *flags("sppo"), before=break_after_some_writes), "(Read-only file system)")
    goes_on(sppo, "sppo", "x")


def test_a_reader_that_goes_away_is_one_line(workdir):
    command = f"{sys.executable} {ROOT}/sppo.py --name x {' '.join(flags('sppo'))} | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert done.stdout.count("\n") == 1
    assert done.stderr == "sppo.py: nobody reads what it prints: stopped\n"


# Memory --------------------------------------------------------------------------------------------------------------


def test_sampling_that_is_out_of_memory_begins_again_with_half_the_slots(workdir, monkeypatch, capsys):
    policy, tokenizer = common.load_policy("tiny")
    prompts = common.encode_prompts(tokenizer, common.digit_prompts(9, 0), 64)
    args, asked, whole = sppo.Args(slots=32), [], common.generate

    def small(policy, prompts, *, slots, **settings):
        asked.append(slots)
        if slots > 8:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.")
        return whole(policy, prompts, slots=slots, **settings)

    right = common.sample_responses(policy, tokenizer, prompts, 3, 0, args)
    monkeypatch.setattr(common, "generate", small)
    assert common.sample_responses(policy, tokenizer, prompts, 3, 0, args) == right
    assert asked == [32, 16, 8] and "begins again with --slots 8" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("response_logps", "reference: CUDA out of memory; go on with --resume and a lower --micro_tokens"),
        ("clip_grad_norm_", "training: CUDA out of memory; go on with --resume and a lower --micro_tokens"),
        ("generate", "evaluating: out of memory even with --slots 1; lower --max_new_tokens"),
    ],
)
def test_out_of_memory_names_the_stage_and_the_flag(workdir, name, words):
    def break_it():
        def broken(*_, **__):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.")

        setattr(torch.nn.utils if name == "clip_grad_norm_" else common, name, broken)

    refused(cli(sr_dpo, "--name", "x", *flags("sr_dpo"), before=break_it), words)


def test_less_memory_may_be_asked_for_when_a_run_is_resumed(workdir):
    def interrupt():
        def stop(*_):
            raise KeyboardInterrupt

        sr_dpo.train_step = stop

    assert cli(sr_dpo, "--name", "x", *flags("sr_dpo"), before=interrupt)[0] == 130
    less = ["--slots", "8", "--micro_tokens", "100", "--checkpointing", "on", "--keep", "1"]
    assert cli(sr_dpo, "--resume", "runs/x", *less) == (0, "")
    refused(cli(sr_dpo, "--resume", "runs/x", *less, "--lam", "0.5"), "--lam 0.5 (there 0.3)")


# Numbers -------------------------------------------------------------------------------------------------------------


def test_a_gradient_that_is_not_finite_stops_before_the_checkpoint_and_names_the_batch(workdir):
    def break_the_third_step():
        loss, steps = sppo.sppo_loss, []

        def broken(*terms):
            steps.append(terms)
            return loss(*terms) / (len(steps) != 3)  # inf

        sppo.sppo_loss = broken

    run = cli(sppo, "--name", "x", *flags("sppo"), before=break_the_third_step)
    refused(run, "a gradient is not finite in step 3 of ", "runs/x/iter_1/bad_batch.jsonl", "--learning_rate")
    rows = [json.loads(line) for line in (workdir / "runs/x/iter_1/bad_batch.jsonl").read_text().splitlines()]
    assert len(rows) == 4 and all(len(row["responses"]) == 2 for row in rows)
    state = torch.load(workdir / "runs/x/iter_1/checkpoint.pt", weights_only=True)
    assert len(state["steps"]) == 2 and all(w.isfinite().all() for w in state["weights"].values())
    goes_on(sppo, "sppo", "x")


# Files ---------------------------------------------------------------------------------------------------------------


def test_a_flipped_bit_in_a_checkpoint_is_noticed(workdir):
    def stop_in_the_fifth_step():
        step, steps = sr_dpo.train_step, []

        def stop(*given):
            steps.append(given)
            if len(steps) == 5:
                raise KeyboardInterrupt
            return step(*given)

        sr_dpo.train_step = stop

    assert cli(sr_dpo, "--name", "x", *flags("sr_dpo"), before=stop_in_the_fifth_step)[0] == 130
    file = workdir / "runs" / "x" / "iter_1" / "checkpoint.pt"
    whole, rng, noticed = file.read_bytes(), random.Random(1), 0
    policy, _ = common.load_policy("tiny-p")
    optimizer = common.make_optimizer(policy, "rmsprop", 1e-4)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer)
    for _ in range(30):
        damaged = bytearray(whole)
        damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        file.write_bytes(damaged)
        try:
            steps = common.load_checkpoint(file, policy, optimizer, scheduler)
            assert len(steps) == 4  # in what a zip file says twice, or fills up with
        except InputError as error:
            assert "remove it, and --resume trains this iteration anew" in str(error)
            noticed += 1
    assert noticed >= 25
    file.write_bytes(whole[: len(whole) // 2])
    refused(cli(sr_dpo, "--resume", "runs/x"), "checkpoint.pt: damaged")
    file.unlink()
    goes_on(sr_dpo, "sr_dpo", "x")


def test_a_flipped_bit_in_a_policy_is_noticed(workdir):
    sr_dpo.main(sr_dpo.Args(name="x", **JOBS["sr_dpo"][1]))
    iterate = workdir / "runs" / "x" / "iter_1"
    file = iterate / "policy" / "model.safetensors"
    damaged = bytearray(file.read_bytes())
    damaged[-1000] ^= 4
    file.write_bytes(damaged)
    with pytest.raises(InputError, match="its files are not what was saved"):
        common.load_policy("runs/x/iter_1/policy")
    shutil.copytree(workdir / "runs" / "x", workdir / "runs" / "y")
    refused(cli(sr_dpo, "--resume", "runs/y"), "runs/y/iter_1/policy", "remove the folder iter_... and --resume")
    shutil.rmtree(workdir / "runs" / "y" / "iter_1")
    config = json.loads((workdir / "runs" / "y" / "config.json").read_text())
    common.write_json(workdir / "runs" / "y" / "config.json", {**config, "name": "y"})
    goes_on(sr_dpo, "sr_dpo", "y")


def test_old_policies_are_pruned_but_for_the_best_and_the_last(workdir):
    assert cli(dno, "--name", "x", *flags("dno")) == (0, "")  # --keep 1
    run = workdir / "runs" / "x"
    table = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    best = max(table[1:], key=lambda m: m["win_rate_vs_start"])["iteration"]
    assert {t for t in (1, 2, 3) if (run / f"iter_{t}" / "policy").exists()} == {best, 3}
    whole = result(run)
    assert cli(dno, "--resume", "runs/x") == (0, "") and result(run) == whole
    # Training goes on from the policy before, and must not from any other.
    for part in ("iter_1/policy", "iter_2/policy", "iter_3"):
        shutil.rmtree(run / part, ignore_errors=True)
    refused(cli(dno, "--resume", "runs/x"), "runs/x/iter_1/policy: gone", "makes it anew")


# Judge ---------------------------------------------------------------------------------------------------------------


def test_a_judge_that_dies_costs_no_verdict_twice(workdir, monkeypatch):
    monkeypatch.setattr(common, "BACK_OFF", 0.001)
    job = flags("sppo", judge="llm", judge_model="a-model", max_judge_failures=0)
    asked = []

    def run(name, more, answers):
        server = Server(answers, usage=None)
        try:
            done = cli(sppo, *more, "--judge_url", server.url)
        finally:
            server.shutdown()
            server.server_close()
        asked.append([request["messages"][0]["content"] for request in server.requests])
        return done

    left = [40]

    def dies(question):
        left[0] -= 1
        return fair(question) if left[0] > 0 else (503, {}, "away")

    refused(run("x", ["--name", "x", *job], dies), "away", "the others are kept, see --resume")
    assert run("x", ["--resume", "runs/x"], fair) == (0, "")
    verdicts = [q for q in asked[0][:39] if "Hi! It is " not in q]  # but for the trial questions, which are not kept
    assert len(verdicts) > 30 and not set(verdicts) & set(asked[1])
    (workdir / "runs" / "judge.jsonl").unlink()
    assert run("y", ["--name", "y", *job], fair) == (0, "")
    found, right = result(workdir / "runs" / "x"), result(workdir / "runs" / "y")
    assert found == right
