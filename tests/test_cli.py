"""The command line: bad input is one line and exit code 2; what a run prints; tracking; no warnings."""

import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
from conftest import ROOT
from steps import cli, last_line, lines, stopped
from transformers import LlamaConfig

import common
import dno
import sppo
import sr_dpo

ONCE = ["--iterations=1"]
SMALL = ["--limit", "40", "--n_eval", "8", "--iterations", "1", "--epochs", "1", "--k", "2"]


# Bad input -----------------------------------------------------------------------------------------------------------

BEGUN = {**vars(sppo.Args(limit=40, n_eval=8, iterations=1, k=2)), "script": "sppo", "versions": {}}
FILES = {  # name -> content, in the folder that the commands run in
    "empty.jsonl": "",
    "broken.jsonl": '{"prompt": "1"}\n{"prompt": ',
    "keys.jsonl": '{"text": "a"}',
    "one.jsonl": '{"prompt": "12"}',
    "long.jsonl": "".join(json.dumps({"prompt": "1" * 99 + str(i)}) + "\n" for i in range(20)),
    "control.jsonl": "".join(json.dumps({"prompt": f"a</s>{i}"}) + "\n" for i in range(20)),
    "few.jsonl": "".join(json.dumps({"prompt": str(i)}) + "\n" for i in range(6)),
    "text.txt": "12",
    "latin.jsonl": "\xff\xfe",
    "same.jsonl": '{"prompt": "1", "chosen": "2", "rejected": "2"}',
    "cut.jsonl": json.dumps({"prompt": "3", "chosen": "2" * 30, "rejected": "2" * 31}),
    "runs/taken/config.json": "{}",
    "runs/other/config.json": json.dumps({**vars(dno.Args()), "script": "dno", "versions": {}}),
    "runs/mine/config.json": json.dumps({**BEGUN, "k": 5}),
    "runs/odd/config.json": json.dumps({**BEGUN, "batch_size": [1]}),
    "runs/gone/config.json": json.dumps(BEGUN),
    "runs/gone/metrics.jsonl": '{"iterate": 0, "step": 0}\n{"iterate": 1, "step": 9}\n',
    "no_model/config.json": "{}",
    "bad_model/config.json": "{",
    "no_weights/config.json": '{"model_type": "llama", "hidden_size": 8, "num_attention_heads": 2, "vocab_size": 99}',
    "runs/file": "",
    "no_split/test.jsonl": '{"prompt": "1"}',
    "nothing/readme.md": "a folder without data",
}
ANSWER = {"text": "1", "ids": [4, 1], "finished": True}
PARTS = [ANSWER, {"text": "1", "ids": [], "finished": True}, {"text": "1", "ids": [4]}, {"ids": [4], "finished": True}]
for n, ys in enumerate([[ANSWER, one] for one in PARTS[1:]] + [None, [ANSWER]]):  # as another engine may write them
    FILES[f"runs/engine_{n}/config.json"] = json.dumps(BEGUN)
    FILES[f"runs/engine_{n}/metrics.jsonl"] = '{"iterate": 0, "step": 0}\n'
    FILES[f"runs/engine_{n}/iter_1/responses.jsonl"] = json.dumps({"responses": ys}) + "\n"
BAD = [  # script, flags, words of the one line
    (sppo, "--iteration 3", "unrecognized argument --iteration; did you mean --iterations?"),
    (dno, "--learning_rat 1", "did you mean --learning_rate?"),
    (sppo, "word", "unrecognized argument word"),
    (sppo, "--k two", "--k: invalid int value: 'two'"),
    (sppo, "--pairing some", "--pairing: invalid choice: 'some'"),
    (sppo, "--k", "--k: expected one argument"),
    (sppo, "--k 1", "--k 1: must be from 2 to 128"),
    (sppo, "--top_p 0", "--top_p 0.0: must be from"),
    (sppo, "--temperature 0", "--temperature 0.0: must be from"),
    (sppo, "--temperature nan", "--temperature nan"),
    (sppo, "--eta 0", "--eta 0.0"),
    (dno, "--replay 1", "--replay 1.0"),
    (sr_dpo, "--beta 0", "--beta 0.0"),
    (sppo, "--learning_rate 0", "--learning_rate 0.0"),
    (sppo, "--limit -1", "--limit -1"),
    (sppo, "--micro_tokens -5", "--micro_tokens -5"),
    (sppo, "--warmup_steps -1", "--warmup_steps -1.0"),
    (sppo, "--max_new_tokens 0", "--max_new_tokens 0"),
    (sppo, "--max_new_tokens 500", "--max_new_tokens are 564, --model tiny has 512 positions"),
    (sppo, "--device cuda", "--device cuda: no CUDA GPU here; use --device cpu"),
    (sppo, "--targets hard --pairing all", "--targets hard: give --pairing extremes"),
    (dno, "--variant spin --gold=", "--variant spin: its pairs are won by a teacher; give --gold"),
    (sppo, "--schedule_epochs 1", "--schedule_epochs 1: must be 0 or at least --epochs 3"),
    (dno, "--tau 3", "--tau 3.0: must be at most --eta 2.0"),
    (sppo, "--eval_judge nobody", "--eval_judge nobody: no PairRM"),
    (sppo, "--name a/b", "--name 'a/b': use at most 100 letters"),
    (sppo, "--name taken", "--name taken: runs/taken exists; take another name"),
    (sppo, "--resume=", "--resume ''"),
    (sppo, "--resume runs/nothing", "--resume 'runs/nothing': not the folder of a run"),
    (sppo, "--resume runs/taken", "--resume runs/taken: its config.json is not of a run"),
    (sppo, "--resume runs/other", "resume it with python dno.py"),
    (sppo, "--resume runs/odd", "invalid int value: '[1]'"),
    (sppo, "--resume runs/gone", "--model runs/gone/iter_1/policy: its config.json"),
    *((sppo, f"--resume runs/engine_{n}", "responses.jsonl: its rows are not this run's") for n in range(5)),
    (sppo, "--name file", "File exists: 'runs/file'"),
    (sppo, "--resume runs/mine --k 3", "--k 3: runs/mine was begun with 5; leave the flag out"),
    (sppo, "--resume runs/mine --k 5 --eta 9", "--eta 9.0: runs/mine was begun with 10.0"),
    (sppo, "--resume runs/mine --k 5 --seed 2", "--seed 2: runs/mine was begun with 1"),
    (sppo, "--prompts=", "--prompts : cannot be loaded (no folder and no hub id)"),
    (sppo, "--prompts none.jsonl", "give a .jsonl, .json or .parquet file, a folder"),
    (sppo, "--prompts text.txt", "--prompts text.txt: cannot be loaded (no folder and no hub id)"),
    (sppo, "--prompts empty.jsonl", "--prompts empty.jsonl: none of its rows can be used (it is empty)"),
    (sppo, "--prompts broken.jsonl", "1 prompts are too few"),
    (sppo, "--prompts latin.jsonl", "--prompts latin.jsonl"),
    (sppo, "--prompts keys.jsonl", "none of its rows can be used (of no known shape, KeyError: text); wanted prompt"),
    (sppo, "--prompts one.jsonl", "1 prompts are too few for 3 iterations and evaluation; raise --limit"),
    (sppo, "--prompts long.jsonl", "none is left: all are over --max_prompt_tokens 64"),
    (sppo, "--prompts control.jsonl", "none is left: all are with </s> in the text"),
    (sppo, "--prompts no_split", "--prompts no_split"),
    (sppo, "--prompts few.jsonl:test", "--prompts few.jsonl:test"),
    (sppo, "--prompts nothing", "--prompts nothing"),
    (sppo, "--prompts someone/nothing", "--prompts someone/nothing: cannot be loaded"),
    (dno, "--gold one.jsonl", "--gold one.jsonl: none of its rows can be used"),
    (dno, "--gold same.jsonl", "--gold same.jsonl: it answers none of the prompts"),
    (sr_dpo, "--pairs one.jsonl", "(of no known shape, KeyError: prompt); wanted prompt"),
    (sr_dpo, "--pairs same.jsonl", "none of its rows can be used"),
    (sr_dpo, "--pairs cut.jsonl", "none is left; raise --max_new_tokens"),
    (sppo, "--model nowhere", "(no folder and no hub id); give tiny, mistral-7b"),
    (sppo, "--model=", "--model : its config.json cannot be loaded"),
    (sppo, "--model no_model", "--model no_model"),
    (sppo, "--model bad_model", "--model bad_model"),
    (sppo, "--model no_weights --judge digits --max_new_tokens 16", "--model no_weights"),
    (sppo, "--judge nobody", "give a folder, or a hub id ORG/NAME; the judges by name are digits, pairrm, llm"),
    (sppo, "--judge=", "--judge : no PairRM"),
    (sppo, "--judge no_model", "--judge no_model: no PairRM"),
    (sppo, "--judge pairrm", "--judge llm-blender/PairRM-hf"),
    (sppo, "--judge llm", "--judge llm: give --judge_url"),
    (sppo, "--judge llm --judge_url localhost --judge_model m", "--judge llm: give --judge_url, like http"),
    (
        sppo,
        "--judge llm --judge_url http://127.0.0.1:9 --judge_model m",
        "Connection refused",
    ),
    (sppo, "--track trackio", "None in sys.modules; it needs pip install trackio"),
]


@pytest.mark.parametrize(("script", "flags", "words"), BAD, ids=[f"{s.__name__} {flags}" for s, flags, _ in BAD])
def test_bad_input_is_one_line_and_exit_code_2(workdir, monkeypatch, capsys, script, flags, words):
    for name, content in FILES.items():
        (workdir / name).parent.mkdir(parents=True, exist_ok=True)
        (workdir / name).write_text(content, encoding="latin-1")
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0)
    monkeypatch.setattr(common.torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(sys.modules, "trackio", None)  # as if it were not installed
    before = {path: path.stat().st_mtime_ns for path in workdir.glob("runs/[!.]*")}
    err = stopped(capsys, cli, script, *flags.split())
    assert words in err, err
    after = {path: path.stat().st_mtime_ns for path in workdir.glob("runs/[!.]*")}
    assert after == before or flags.startswith("--resume"), "nothing is half written"


def test_there_are_enough_cases():
    assert len(BAD) >= 60 and len(set(BAD)) == len(BAD)


# What a newcomer sees ------------------------------------------------------------------------------------------------


def test_help_has_every_flag_and_the_recipes_values(capsys):
    with pytest.raises(SystemExit) as end:
        cli(sppo, "--model", "mistral-7b", "--help")
    said = capsys.readouterr().out
    assert end.value.code == 0 and all(f"--{name} " in said for name in vars(sppo.Args()))
    assert "(default: 1000.0)" in said and "mistralai/Mistral-7B-Instruct-v0.2" in said


def test_a_flag_wins_over_the_recipe_which_the_number_of_parameters_decides(workdir, monkeypatch, capsys):
    """1.1 M, 135 M and 1.2 G parameters of a Llama in folders; of short names the number that they end with."""
    seen = []
    monkeypatch.setattr(common, "check_fit", lambda args: seen.append(args) or 1 / 0)
    recipes = {"paper": "digits", "small-one": "small", "large": "paper"}  # a folder's name decides nothing
    sizes = (128, 2, 4000), (576, 30, 49152), (2048, 16, 128_000)
    for name, (hidden, layers, vocab) in zip(recipes, sizes, strict=True):
        heads = {"num_attention_heads": hidden // 64, "num_key_value_heads": hidden // 64}
        config = LlamaConfig(hidden_size=hidden, num_hidden_layers=layers, vocab_size=vocab, **heads)
        config.update({"intermediate_size": hidden * 8 // 3, "tie_word_embeddings": True})
        config.save_pretrained(name)
    short = {"tiny": "digits", "smollm2-135m": "small", "qwen2.5-0.5b": "small", "zephyr-7b-sft": "paper"}
    for model, recipe in [*recipes.items(), *short.items(), ("mistral-7b", "paper")]:
        with pytest.raises(ZeroDivisionError):
            cli(sppo, "--model", model, "--eta", "7")
        args, wanted = seen.pop(), {**vars(sppo.Args()), **sppo.RECIPES[recipe], "eta": 7.0, "recipe": recipe}
        assert {**vars(args), "model": 0, "name": 0} == {**wanted, "model": 0, "name": 0}, model
        said = " ".join(capsys.readouterr().out.split())
        assert f"recipe {recipe}: prompts {args.prompts}, judge {args.judge}, " in said and "eta 7.0, " in said
    with pytest.raises(ZeroDivisionError):
        cli(sr_dpo, "--model", "pythia-2.8b", "--recipe", "auto")
    assert seen.pop().pairs == "Anthropic/hh-rlhf:train"
    with pytest.raises(ZeroDivisionError):
        cli(sppo, "--model", "large", "--recipe", "small")
    assert seen.pop().learning_rate == sppo.SMALL["learning_rate"]


def test_what_a_run_prints(workdir, capsys, monkeypatch):
    class Judge(common.DigitsJudge):
        def metrics(self, prompts, responses):
            return {**super().metrics(prompts, responses), "mine": 0.25}

    monkeypatch.setitem(common.JUDGES, "digits", lambda args: Judge())
    cli(sppo, *SMALL, "--name", "x")
    said = capsys.readouterr()
    printed = said.out.splitlines()
    assert "judge digits" in printed[0] and said.err == ""
    assert printed[1].startswith("recipe digits: prompts digits, judge digits, max_prompt_tokens 64, eta 10.0,")
    assert printed[4].startswith("455,808 parameters: ") and "prompts to train on, 8 held out" in printed[5]
    assert printed[6].startswith("[0] exact_match ") and "mine 0.25" in said.out
    assert "[1] prompts 32, responses 2, pairs " in said.out and "wins_vs_start" in said.out
    assert printed[-1].startswith(last_line(lines(workdir / "runs/x/metrics.jsonl")))
    assert max(map(len, printed[:-1])) <= 80


def test_a_run_whose_pairs_are_decided_by_length_warns(workdir, capsys):
    cli(sppo, *SMALL, "--name", "x", "--max_new_tokens", "6", "--temperature", "2", "--k", "8")
    said = capsys.readouterr().out
    assert re.search(r"decided by\s+truncation [1-9]", said) and "warning: most pairs only teach to be short" in said


@pytest.mark.parametrize("script", [sppo, dno, sr_dpo])
def test_dry_run_loads_everything_says_what_it_takes_and_leaves_nothing(workdir, capsys, script):
    """40 prompts or pairs less 8 to evaluate, in batches of 5, three times."""
    steps = 21
    cli(script, "--limit=40", "--n_eval=8", "--batch_size=5", "--epochs=3", "--dry_run", *ONCE[script is sr_dpo :])
    said = capsys.readouterr().out
    assert "GB to train" in said and f"\nabout {steps} steps and " in said and "hours with 9 tokens a response" in said
    assert float(re.search(r"training (\S+)", said.split("hours with")[1])[1].rstrip(",")) > 0
    assert not list((workdir / "runs").glob("*"))


@pytest.mark.parametrize("flag", ["--prompts=none.jsonl", "--judge=nobody", "--model=nobody"])
def test_dry_run_ends_as_the_run_would(workdir, capsys, flag):
    assert flag.partition("=")[2] in stopped(capsys, cli, sppo, flag, "--limit=40", "--n_eval=4", "--dry_run")
    assert not list((workdir / "runs").glob("*"))


# Tracking ------------------------------------------------------------------------------------------------------------


def test_a_tracker_gets_the_loss_of_each_step_and_metrics(workdir, monkeypatch):
    seen = []
    trackio = SimpleNamespace()
    trackio.init = lambda **settings: seen.append(settings)
    trackio.log = lambda values, step: seen.append((step, values))
    monkeypatch.setitem(sys.modules, "trackio", trackio)
    cli(sppo, *SMALL, "--name", "x", "--track", "trackio")
    steps, metrics = lines(workdir / "runs/x/iter_1/steps.jsonl"), lines(workdir / "runs/x/metrics.jsonl")
    settings, start, *train, end = seen
    assert settings["name"] == "x" and settings["config"]["k"] == 2
    assert [(step, values["train/loss"]) for step, values in train] == [(row["step"], row["loss"]) for row in steps]
    for (step, values), row in zip((start, end), metrics, strict=True):
        assert (step, values["eval/exact_match"]) == (row["step"], row["exact_match"])


def test_wandb_offline(workdir, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    cli(dno, *SMALL, "--name", "x", "--track", "wandb")
    import wandb

    wandb.log({})  # a new step: what was logged last is in the summary
    summary = dict(wandb.run.summary)
    wandb.finish()
    (row,) = lines(workdir / "runs/x/metrics.jsonl")[1:]
    assert summary["eval/exact_match"] == row["exact_match"] and "train/loss" in summary
    assert list(workdir.glob("wandb/offline-run-*/run-*.wandb"))


def test_a_script_runs_without_any_warning(workdir):
    """FutureWarning and DeprecationWarning are errors, so that what goes away in a library is found early."""
    warnings = ["-W", "error::FutureWarning", "-W", "error::DeprecationWarning"]
    command = [sys.executable, *warnings, str(ROOT / "sppo.py"), *SMALL, "--name", "x"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert done.stdout.splitlines()[-1].startswith(last_line(lines(workdir / "runs/x/metrics.jsonl")))
