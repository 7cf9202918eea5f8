"""A run that is killed goes on as if nothing had been: each job runs in a process of its own that is really killed."""

import itertools
import json
import os
import random
import shutil
import signal
import sys
import threading
from array import array
from pathlib import Path
from types import SimpleNamespace

import conftest  # noqa: F401  (where common.py is, for `python tests/test_resume.py`)
import numpy
import pytest
import sample_with_vllm
import torch
import whole_iteration
from safetensors.torch import load_file
from steps import cli, lines, stopped
from tqdm import tqdm

import common
import dno
import sppo
import sr_dpo

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="wants os.fork")

KILLS = int(os.environ.get("KILLS", "6"))  # of each script; `python tests/test_resume.py 100 2`: 100, by seed 2
SEED = os.environ.get("SEED", "1")
# tqdm's own lock is a semaphore that forks share: a child killed while it holds it would stop all later ones for ever.
tqdm.set_lock(threading.RLock())
JOBS = {
    "sppo": (sppo, {"limit": 48, "n_eval": 8, "iterations": 2, "k": 3, "epochs": 2, "batch_size": 4}),
    "dno": (dno, {"limit": 48, "n_eval": 8, "iterations": 3, "k": 2, "batch_size": 16}),
    "sr_dpo": (sr_dpo, {"limit": 48, "n_eval": 8, "epochs": 2, "batch_size": 4}),
}


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
    if Path("runs", name, "config.json").exists():
        return cli(JOBS[job][0], "--resume", f"runs/{name}")
    shutil.rmtree(Path("runs", name), ignore_errors=True)
    return start(job, name)


def result(folder):
    """Everything that a run leaves, but for times and what a kill left beside a file or behind an iterate."""
    found = {}
    for file in sorted(folder.rglob("*")):
        name = str(file.relative_to(folder))
        if file.suffix == ".safetensors":
            found[name] = {key: value.numpy().tobytes() for key, value in load_file(file).items()}
        elif name == "metrics.jsonl":
            found[name] = [{k: v for k, v in row.items() if k != "seconds"} for row in lines(file)]
        elif file.name == "outputs.json":
            found[name] = [(row["instruction"], row["output"]) for row in json.loads(file.read_text())]
        elif file.is_file() and file.name not in ("config.json", "checkpoint.pt") and ".part" not in name:
            found[name] = file.read_bytes()
    return found


@pytest.fixture
def small_chunks(monkeypatch):
    """So that samples and preferences have moments in which they are half done."""
    whole = common.read_or_make
    for script in (sppo, dno):
        monkeypatch.setattr(script, "read_or_make", lambda path, items, make, chunk=0: whole(path, items, make, 4))


@pytest.mark.parametrize("job", JOBS)
def test_a_run_that_is_killed_anywhere_ends_like_one_that_is_not(workdir, small_chunks, job):
    assert in_a_process(lambda: start(job, "whole"), count=workdir / "instants") == 0
    instants, right = int((workdir / "instants").read_text()), result(workdir / "runs" / "whole")
    rng = random.Random(f"{job} {SEED}")
    kills = runs = 0
    while kills < KILLS:
        name, runs = f"killed-{runs}", runs + 1
        code = in_a_process(lambda: start(job, name), rng.randrange(instants))  # noqa: B023  (called at once)
        assert code == -signal.SIGKILL
        while code != 0:
            kills += 1
            more = rng.randrange(instants) if kills % 3 else None  # killed again and again, then let end
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


def test_a_kill_during_evaluation_costs_no_training(workdir, monkeypatch):
    script, settings = JOBS["sppo"]
    monkeypatch.setattr(common, "replaced_functions", lambda main: [])  # what this test replaces is no other method

    def killed(*args):
        if args[5] == 1:  # the iterate
            os.kill(os.getpid(), signal.SIGKILL)
        return common.evaluate(*args)

    def job():
        sppo.evaluate = killed
        script.main(script.Args(name="x", **settings))  # a checkpoint would be due in half an hour

    assert in_a_process(job) == -signal.SIGKILL
    state = torch.load("runs/x/iter_1/checkpoint.pt", weights_only=True)
    script.main(script.Args(name="whole", **settings))
    assert state["steps"] == lines(Path("runs/whole/iter_1/steps.jsonl"))
    loss, finish, done = sppo.sppo_loss, sppo.finish_iterate, []
    monkeypatch.setattr(sppo, "sppo_loss", lambda *_: pytest.fail("a step is done again") if not done else loss(*_))
    monkeypatch.setattr(sppo, "finish_iterate", lambda *a, **k: (finish(*a, **k), done.append(1)))
    cli(sppo, "--resume", "runs/x")
    assert result(Path("runs/x")) == result(Path("runs/whole"))


def test_a_torn_last_line_is_made_again(workdir, capsys):
    path, items, asked = workdir / "responses.jsonl", [{"prompt": i} for i in range(10)], []
    rows = [{**item, "responses": [{"text": "1", "ids": array("i", [4]), "finished": True}] * 2} for item in items]
    path.write_text("".join(common.as_json(row) + "\n" for row in rows[:2]) + '{"i"')

    def make(some):
        asked.append([item["prompt"] for item in some])
        return [rows[i] for i in asked[-1]]

    assert common.read_or_make(path, items, make, 3) == rows == common.read_jsonl(path)
    assert asked == [[2, 3, 4], [5, 6, 7], [8, 9]]
    assert common.read_or_make(path, items, None) == rows  # read back
    path.write_text('{"i": 0}\n{"i"\n{"i": 2}\n')
    assert "responses.jsonl: damaged" in stopped(capsys, common.read_or_make, path, items, make)
    path.write_text('{"i": 0}\n')
    assert "its rows are not this run's" in stopped(capsys, common.read_or_make, path, items, make)
    rows = [{"text": "a\u2028b\x85c\x0bd\r\ne"}, {"text": "f"}]  # line separators that end no row
    common.write_jsonl(workdir / "more.jsonl", rows)
    assert common.read_jsonl(workdir / "more.jsonl") == rows


def test_preferences_know_which_answers_they_judged(workdir):
    path, asked = workdir / "preferences.jsonl", []
    items = [{"prompt": i, "responses": [{"text": f"{i} {j}", "finished": True} for j in "ab"]} for i in range(6)]

    def make(some):
        asked.append([item["prompt"] for item in some])
        return [[item["prompt"]] for item in some]

    right = common.read_or_make(path, items, make)
    assert right == common.read_or_make(path, items, make) == [[i] for i in range(6)] and asked == [[0, 1, 2, 3, 4, 5]]
    items[4]["responses"][1]["finished"] = False
    assert common.read_or_make(path, items, make) == right and asked[1:] == [[4, 5]]  # from the first that changed
    items[0]["responses"].reverse()
    assert common.read_or_make(path, items, make) == right and asked[2:] == [[0, 1, 2, 3, 4, 5]]


def test_new_samples_are_judged_anew(workdir):
    script, settings = JOBS["sppo"]
    script.main(script.Args(name="x", **settings, seed=2))
    start("sppo", "y")
    right = result(Path("runs/y"))["iter_2/pairs.jsonl"]
    samples = Path("runs/y/iter_2/responses.jsonl")
    for new in (None, samples.read_bytes()):  # removed, as a damaged one is to be; written by another program
        shutil.copy("runs/x/iter_2/preferences.jsonl", "runs/y/iter_2")  # of other samples
        samples.unlink() if new is None else samples.write_bytes(new)
        common.write_jsonl(Path("runs/y/metrics.jsonl"), lines(Path("runs/y/metrics.jsonl"))[:2])
        cli(script, "--resume", "runs/y")
        assert result(Path("runs/y"))["iter_2/pairs.jsonl"] == right


def test_a_finished_run_can_be_resumed_and_stays(workdir, capsys):
    start("sr_dpo", "x")
    run, config = Path("runs/x"), Path("runs/x/config.json").read_bytes()
    before = result(run)
    cli(sr_dpo, "--resume", str(run), "--micro_tokens", "999")
    assert result(run) == before and (run / "config.json").read_bytes() == config
    assert "runs/x/final" in capsys.readouterr().out


def test_other_data_or_another_model_than_the_run_was_begun_with_is_refused(workdir, tiny, capsys):
    """Of a killed run: prompts of the same number, more prompts, other answers, other weights under the same name."""
    model = shutil.copytree(tiny, workdir / "model")
    rows = [{"prompt": f"{n}{n}", "chosen": f"{n}", "rejected": "9"} for n in range(10, 60)]
    flags = ["--model", "model", "--pairs", "p.jsonl", "--judge=", "--refine_prompt", "tiny", "--max_new_tokens", "8"]
    common.write_jsonl(workdir / "p.jsonl", rows)
    cli(sr_dpo, *flags, "--n_eval", "8", "--epochs", "1", "--max_prompt_tokens", "64", "--name", "x")
    config = json.loads(Path("runs/x/config.json").read_text())
    assert list(config["fingerprints"]) == ["--model model", "a flag in its config.json", "what --pairs gives"]
    others = [*rows[:-1], {**rows[-1], "prompt": "99"}], [*rows, rows[0] | {"prompt": "1"}], rows[1:] + rows[:1]
    for other in (*others, [{**row, "rejected": "8"} for row in rows]):
        common.write_jsonl(workdir / "p.jsonl", other)
        said = stopped(capsys, cli, sr_dpo, "--resume", "runs/x")
        assert "runs/x: what --pairs gives has changed since the run began" in said
    common.write_jsonl(workdir / "p.jsonl", rows)
    cli(sr_dpo, "--resume", "runs/x")  # as it was: goes on
    policy, tokenizer = common.load_policy(model)
    next(policy.parameters()).data[5] += 1
    common.save_policy(policy, tokenizer, model)
    said = stopped(capsys, cli, sr_dpo, "--resume", "runs/x")
    assert "runs/x: --model model has changed since the run began" in said


def test_a_copied_script_runs_and_resumes_under_its_own_name(workdir, monkeypatch, capsys):
    shutil.copy(sr_dpo.__file__, workdir / "mine.py")
    monkeypatch.syspath_prepend(str(workdir))
    import mine

    cli(mine, "--limit", "48", "--n_eval", "8", "--epochs", "1")
    (run,) = workdir.glob("runs/mine-tiny-s1-*")
    cli(mine, "--resume", str(run))
    assert "resume it with python mine.py" in stopped(capsys, cli, sr_dpo, "--resume", str(run))


def measured_iteration(folder, monkeypatch, device):
    """The record of whole_iteration.py, by the small command in its docstring, on this device."""
    command = whole_iteration.__doc__.replace("\\\n", "").split("tests/whole_iteration.py")[2].split("    a minute")[0]
    words = ["whole_iteration.py", *command.split(), "--device", device, "--record", str(folder)]
    monkeypatch.setattr(sys, "argv", words)
    whole_iteration.main()
    (file,) = folder.glob("whole_iteration*.json")
    found = json.loads(file.read_text())
    begun = {*whole_iteration.TIMED, "Checkpoint.load", "step", "Checkpoint.save", "all, with imports"}
    assert found["killed"].keys() == begun  # and no save_policy: it was killed in training
    assert found["resumed"].keys() == begun - {"sample_responses", "preferences"} | {"save_policy"}
    assert found["killed"]["step"]["calls"] == found["resumed"]["step"]["calls"] == 1
    assert all(call["seconds"] > 0 for title in ("killed", "resumed") for call in found[title].values())
    assert found["figures"].keys() == {"tokens/s sampled", "pairs/s judged", "final"}
    return found


def test_a_whole_iteration_as_it_is_measured(workdir, monkeypatch):
    found = measured_iteration(workdir, monkeypatch, "cpu")
    assert found["metrics"]["step"] == 2 and found["metrics"]["pairs"] > 16
    assert found["figures"]["final"] and found["metrics"]["wins_vs_start"] > 0.5


# Files that a kill, a disk or a hand left as they should not be ------------------------------------------------------


@pytest.fixture(scope="module")
def stopped_run(tmp_path_factory):
    """A folder with runs/whole, a whole run, and runs/x, the same one killed when iterate 2 was to be evaluated."""
    folder = tmp_path_factory.mktemp("stopped")
    before = os.getcwd()
    os.chdir(folder)

    def killed(*args):
        return os.kill(os.getpid(), signal.SIGKILL) if args[5] == 2 else common.evaluate(*args)

    def job():
        sppo.evaluate, common.replaced_functions = killed, lambda main: []
        start("sppo", "x")

    assert in_a_process(lambda: start("sppo", "whole")) == 0 and in_a_process(job) == -signal.SIGKILL
    os.chdir(before)
    return folder


def cut(path):
    path.write_bytes(path.read_bytes()[:-9])


def spoil(path):
    path.write_bytes(b"\xff\xfe {[" + path.read_bytes()[4:] if path.exists() else b"\xff")


def leave(path):
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"half a file")


def swap(path):
    torch.save({"policy": {}, "optimizer": {}, "scheduler": {}, "steps": []}, path)


DAMAGE = [  # file, what happened to it, words of the one line, "" for a result equal to the whole run's
    ("iter_2/responses.jsonl", cut, ""),
    ("iter_2/responses.jsonl", Path.unlink, ""),
    ("iter_2/responses.jsonl", spoil, "responses.jsonl: damaged"),
    ("iter_2/preferences.jsonl", cut, ""),
    ("iter_2/preferences.jsonl", Path.unlink, ""),
    ("iter_2/preferences.jsonl", spoil, "preferences.jsonl: damaged"),
    ("iter_2/checkpoint.pt", Path.unlink, ""),
    ("iter_2/checkpoint.pt", cut, "remove it, then --resume"),
    ("iter_2/checkpoint.pt", swap, "remove it, then --resume"),
    ("iter_2/checkpoint.pt.part", leave, ""),
    ("iter_2/policy.part/.tmp7", leave, ""),
    ("iter_1/policy/model.safetensors", cut, "weights (in safetensors) not loaded"),
    ("iter_1/policy/config.json", Path.unlink, "its config.json cannot be loaded"),
    ("iter_0/answers.jsonl", Path.unlink, "iter_0/answers.jsonl: its prompts are not this run's"),
    ("metrics.jsonl", spoil, "metrics.jsonl: damaged"),
    ("metrics.jsonl.part", leave, ""),
    ("config.json", spoil, "not the folder of a run"),
    ("config.json", Path.unlink, "not the folder of a run"),
    ("final/policy", leave, ""),
]


@pytest.mark.parametrize(("name", "damage", "words"), DAMAGE, ids=[f"{n} {d.__name__}" for n, d, _ in DAMAGE])
def test_a_damaged_file_is_made_again_or_named(stopped_run, workdir, capsys, name, damage, words):
    shutil.copytree(stopped_run / "runs/x", "runs/x")
    damage(Path("runs/x", name))
    if words:
        assert words in stopped(capsys, cli, sppo, "--resume", "runs/x")
    else:
        cli(sppo, "--resume", "runs/x")
        assert result(Path("runs/x")) == result(stopped_run / "runs/whole")
        assert not list(Path("runs/x").rglob(".tmp*")) and not Path("runs/x/final/policy").exists()


# One process, one set of flags, one set of answers --------------------------------------------------------------------


def test_a_second_run_of_the_same_name_is_refused_and_changes_nothing(workdir):
    start("sr_dpo", "x")
    before = {path: path.read_bytes() for path in Path("runs/x").rglob("*") if path.is_file()}
    with pytest.raises(common.UserError, match="runs/x exists; take another name"):
        start("sr_dpo", "x")
    assert {path: path.read_bytes() for path in Path("runs/x").rglob("*") if path.is_file()} == before
    with pytest.raises(common.UserError, match="--name"):
        sr_dpo.main(sr_dpo.Args())


def test_a_run_in_which_another_process_works_is_left_alone(workdir, capsys):
    start("sr_dpo", "x")
    before = {path: path.read_bytes() for path in Path("runs/x").rglob("*") if path.is_file()}
    del common.LOCKS[Path("runs/x").resolve()]  # that of this process stays locked, as another's would
    for flags in (["--resume", "runs/x"], ["--name", "x"]):
        assert "runs/x" in stopped(capsys, cli, sr_dpo, *flags)
    cli(sr_dpo, "--name", "y", "--dry_run")
    assert {path: path.read_bytes() for path in Path("runs/x").rglob("*") if path.is_file()} == before
    with pytest.raises(common.UserError, match="another process works on this run"):
        common.start_run(sr_dpo.Args(resume="runs/x"), sr_dpo.main)


def test_flags_that_were_edited_in_config_json_are_refused(workdir, capsys):
    script, settings = JOBS["sppo"]
    cli(script, *(f"--{name}={value}" for name, value in settings.items()), "--name", "x")
    config = json.loads(Path("runs/x/config.json").read_text())
    Path("runs/x/config.json").write_text(json.dumps({**config, "eta": 3.0}))
    assert "a flag in its config.json has changed" in stopped(capsys, cli, script, "--resume", "runs/x")
    Path("runs/x/config.json").write_text(json.dumps({**config, "slots": 3}))  # decides nothing
    cli(script, "--resume", "runs/x")


def test_earlier_answers_to_other_prompts_are_refused(workdir, capsys):
    start("sppo", "x")
    answers = Path("runs/x/iter_0/answers.jsonl")
    common.write_jsonl(answers, [{**row, "prompt": [{"role": "user", "content": "77"}]} for row in lines(answers)])
    common.write_jsonl(Path("runs/x/metrics.jsonl"), lines(Path("runs/x/metrics.jsonl"))[:2])
    assert "iter_0/answers.jsonl: its prompts" in stopped(capsys, cli, sppo, "--resume", "runs/x")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_ends_a_run_in_one_line_and_the_run_resumes(workdir, capsys, monkeypatch, number):
    start("sr_dpo", "whole")
    capsys.readouterr()
    script, settings = JOBS["sr_dpo"]
    monkeypatch.setattr(common, "replaced_functions", lambda main: [])
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(script, "pair_logps", lambda *_: os.kill(os.getpid(), number))
        cli(script, *(f"--{name}={value}" for name, value in settings.items()), "--name", "x")
    err = capsys.readouterr().err
    assert end.value.code == 128 + number and "interrupted; resume with --resume runs/x" in err
    assert err.strip().count("\n") == 0
    cli(script, "--resume", "runs/x")
    assert result(Path("runs/x")) == result(Path("runs/whole"))


def test_token_ids_are_read_as_arrays_and_written_as_lists(workdir):
    row = {
        "prompt": [{"role": "user", "content": "a\u2028b"}],
        "prompt_ids": [1, 2],
        "responses": [{"ids": [3, 2**31 - 1]}],
    }
    common.write_jsonl(Path("x.jsonl"), [row, {"ids": array("i", [4])}])
    assert lines(Path("x.jsonl")) == [row, {"ids": [4]}]
    first, second = common.read_jsonl(Path("x.jsonl"))
    assert first["prompt"] == row["prompt"] and second == {"ids": array("i", [4])}
    assert (first["prompt_ids"], first["responses"][0]["ids"]) == (array("i", [1, 2]), array("i", [3, 2**31 - 1]))
    assert torch.tensor(first["prompt_ids"]).tolist() == [1, 2]
    common.write_jsonl(Path("x.jsonl"), [{"bids": 0.5, "request_ids": ["a"]}])  # of a judge, of an engine
    assert common.read_jsonl(Path("x.jsonl")) == lines(Path("x.jsonl"))
    for ids in ([2**31], ["1"], [1.5], 7, "12"):
        common.write_jsonl(Path("x.jsonl"), [{"ids": ids}])
        with pytest.raises(common.UserError, match="damaged"):
            common.read_jsonl(Path("x.jsonl"))


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
    flags = [f"--{name}={value}" for name, value in {**JOBS["sppo"][1], "iterations": 1, "name": "x"}.items()]
    cli(sppo, *flags)
    shutil.rmtree(workdir / "runs/x/iter_1")  # as if it had been stopped before it sampled
    common.write_jsonl(workdir / "runs/x/metrics.jsonl", lines(workdir / "runs/x/metrics.jsonl")[:1])
    sample_with_vllm.main("runs/x", 1)
    written = (workdir / "runs/x/iter_1/responses.jsonl").read_bytes()
    cli(sppo, "--resume", "runs/x")
    assert (workdir / "runs/x/iter_1/responses.jsonl").read_bytes() == written
    assert len(json.loads(written.splitlines()[0])["responses"]) == 3
    assert len(lines(workdir / "runs/x/metrics.jsonl")) == 2


if __name__ == "__main__":
    os.environ |= dict(zip(("KILLS", "SEED"), sys.argv[1:], strict=False))
    sys.exit(pytest.main([__file__, "-k", "killed_anywhere"]))
