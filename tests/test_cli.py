import json
import subprocess
import sys
import weakref

import pytest
import torch
from conftest import ROOT
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import common
import sppo
import test_pairrm

SHORT = ["--limit", "640", "--n_eval", "160", "--iterations", "2", "--epochs", "2"]


def run(*flags, cwd):
    return subprocess.run([sys.executable, ROOT / "sppo.py", *flags], cwd=cwd, capture_output=True, text=True)


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# The default job, shortened ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def job(tmp_path_factory, tiny_cache):
    cwd = tmp_path_factory.mktemp("job")
    (cwd / "runs").symlink_to(tiny_cache)
    done = run(*SHORT, "--name", "job", cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done, cwd / "runs" / "job"


def test_the_short_job_learns(job):
    start, _, last = lines(job[1] / "metrics.jsonl")
    assert start["exact_match"] < 0.3
    assert last["exact_match"] > start["exact_match"] + 0.1
    assert last["win_rate_vs_start"] > 0.5 + 3 * last["win_rate_vs_start_se"]
    assert last["kl"] > 0 and last["chosen_log_ratio"] > last["rejected_log_ratio"]


def test_the_job_prints_what_a_newcomer_needs(job):
    out = job[0].stdout
    for words in (
        "iterate 0",
        "iterate 1: loss/eta²",
        "wins vs start 0.",
        " ± ",
        "exact match",
        "KL",
        "log-ratio",
        "best '",
    ):
        assert words in out
    assert out.count("\niterate 2:") == 1 and "* 2" in out.replace("* 1", "* 2")  # a line, and a star in the table
    assert "Traceback" not in job[0].stderr and "Warning" not in job[0].stderr


def test_the_run_folder_holds_what_the_readme_says(job):
    folder = job[1]
    names = {"config.json", "final", "iter_0", "iter_1", "iter_2", "metrics.jsonl", "outputs.json", "win_rates.json"}
    assert {path.name for path in folder.iterdir()} == names | {".lock"}
    config = json.loads((folder / "config.json").read_text())
    assert config["eta"] == 10.0 and config["limit"] == 640 and config["device"] in ("cpu", "cuda")
    assert config["versions"]["torch"] == torch.__version__
    rows = lines(folder / "iter_2" / "responses.jsonl")
    assert len(rows) == 240 and all(len(row["responses"]) == 5 for row in rows)
    assert set(rows[0]) == {"prompt", "prompt_ids", "responses"}
    assert set(rows[0]["responses"][0]) == {"ids", "text", "finished", "repeats"}
    prefs = torch.tensor([row["prefs"] for row in lines(folder / "iter_2" / "preferences.jsonl")])
    torch.testing.assert_close(prefs + prefs.mT, torch.ones(240, 5, 5))
    first, second = ({json.dumps(r["prompt"]) for r in lines(folder / f"iter_{t}" / "responses.jsonl")} for t in (1, 2))
    outputs = json.loads((folder / "outputs.json").read_text())
    assert set(outputs[0]) == {"instruction", "output", "generator"} and len(outputs) == 160
    held_out = {json.dumps([{"role": "user", "content": o["instruction"]}]) for o in outputs}
    assert not (first & second or first & held_out or second & held_out)


def test_pairs_train_on_the_sampled_ids_of_the_best_and_the_worst(job):
    responses = {json.dumps(r["prompt"]): r["responses"] for r in lines(job[1] / "iter_1" / "responses.jsonl")}
    pairs = lines(job[1] / "iter_1" / "pairs.jsonl")
    assert len(pairs) > 150
    prefs = [row["prefs"] for row in lines(job[1] / "iter_1" / "preferences.jsonl")]
    win_rate = {x: [sum(row) / 5 for row in p] for x, p in zip(responses, prefs, strict=True)}
    for pair in pairs:
        rates = win_rate[json.dumps(pair["prompt"])]
        best, worst = pair["responses"]
        assert best["win_rate"] == pytest.approx(max(rates)) and worst["win_rate"] == pytest.approx(min(rates))
        assert {"ids": best["ids"], "text": best["text"]}.items() <= responses[json.dumps(pair["prompt"])][
            rates.index(max(rates))
        ].items() or rates.count(max(rates)) > 1


def test_the_reference_of_iteration_2_is_the_policy_of_iteration_1(job):
    policy, _ = common.load_policy(str(job[1] / "iter_1" / "policy"))
    rows = [
        (pair["prompt_ids"], y) for pair in lines(job[1] / "iter_2" / "pairs.jsonl")[:20] for y in pair["responses"]
    ]
    logps = common.response_logps(policy, [x for x, _ in rows], [y["ids"] for _, y in rows])
    torch.testing.assert_close(logps, torch.tensor([y["ref_logps"] for _, y in rows]), atol=1e-4, rtol=0)


def test_final_is_the_best_iterate_and_loads_with_transformers(job):
    table = lines(job[1] / "metrics.jsonl")
    best = max(table[1:], key=lambda m: m["win_rate_vs_start"])["iteration"]
    final = AutoModelForCausalLM.from_pretrained(job[1] / "final")
    right = AutoModelForCausalLM.from_pretrained(job[1] / f"iter_{best}" / "policy")
    for mine, p in zip(final.parameters(), right.parameters(), strict=True):
        assert torch.equal(mine, p)
    tokenizer = AutoTokenizer.from_pretrained(job[1] / "final")
    text = tokenizer.apply_chat_template([{"role": "user", "content": "312"}], tokenize=False)
    assert text == "<s>312=" and tokenizer.decode(tokenizer(text).input_ids) == text


def test_a_run_never_overwrites_another(job):
    before = (job[1] / "metrics.jsonl").read_bytes()
    again = run(*SHORT, "--name", "job", cwd=job[1].parent.parent)
    assert again.returncode == 2 and again.stdout == ""
    assert again.stderr.count("\n") == 1 and "--name job" in again.stderr and "taken" in again.stderr
    assert (job[1] / "metrics.jsonl").read_bytes() == before


# Other settings, other models ----------------------------------------------------------------------------------------

FEW = {"limit": 40, "n_eval": 8, "iterations": 1, "epochs": 1}


@pytest.mark.parametrize(
    "settings",
    [{"pairs": "all"}, {"targets": "hard"}, {"log_z": "estimate"}, {"k": 2, "temperature": 0.7, "top_p": 0.9}],
    ids=str,
)
def test_every_option_runs(workdir, settings):
    name = "-".join(map(str, settings))
    table = sppo.main(sppo.Args(name=name, **FEW, **settings))
    pairs = lines(workdir / "runs" / name / "iter_1" / "pairs.jsonl")
    assert len(table) == 2 and len(pairs[0]["responses"]) == (5 if settings.get("pairs") == "all" else 2)


def test_slots_and_micro_tokens_are_memory_knobs(workdir):
    big = sppo.main(sppo.Args(name="big", **FEW))
    small = sppo.main(sppo.Args(name="small", slots=7, micro_tokens=40, **FEW))
    for a, b in zip(big, small, strict=True):
        for name in a.keys() - {"seconds", "tokens_per_second"}:
            assert a[name] == pytest.approx(b[name], rel=1e-3, abs=1e-3), name


def test_a_local_model_runs_with_the_papers_recipe_on_a_prompt_file(workdir, capsys):
    tokenizer = common.tiny_tokenizer()
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=len(tokenizer), **sizes, bos_token_id=0, eos_token_id=1, initializer_range=0.3)
    common.save_policy(LlamaForCausalLM(config), tokenizer, workdir / "llama")
    common.write_jsonl("mine.jsonl", [{"prompt": f"count to {n}"} for n in range(40)])
    flags = ["--model", "llama", "--prompts", "mine.jsonl", "--max_new_tokens", "100", "--k", "3", "--name", "mine"]
    flags += ["--judge", "digits"]
    common.cli(sppo.main, sppo.Args, sppo.RECIPES, "", [*flags, "--learning_rate", "1e-4"])
    config = json.loads((workdir / "runs" / "mine" / "config.json").read_text())
    assert (config["eta"], config["learning_rate"], config["k"], config["batch_size"]) == (1000.0, 1e-4, 3, 64)
    table = lines(workdir / "runs" / "mine" / "metrics.jsonl")
    assert len(table) == 4 and all(m["kl"] != 0 for m in table[1:])  # even a single step per iteration moves the policy
    assert "3 iterations x 10 prompts x 3 responses; 10 held out" in capsys.readouterr().out


# Bad input -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--k", "1"], "--k 1: must be at least 2"),
        (["--k", "two"], "--k"),
        (["--eta", "0"], "--eta 0.0: must be between a millionth and a million"),
        (["--eta", "-3"], "--eta -3.0"),
        (["--eta", "nan"], "--eta nan"),
        (["--eta", "inf"], "--eta inf"),
        (["--eta", "1e39"], "--eta 1e+39"),
        (["--k", "1000000000"], "--k 1000000000"),
        (["--epochs", "1" + 400 * "0"], "--epochs 1000"),
        (["--learning_rate", "1e38"], "--learning_rate 1e+38"),
        (["--temperature", "1e-310"], "--temperature"),
        (["--targets", "hard", "--log_z", "estimate"], "--targets hard"),
        (["--name", "tiny-0123456789ab"], "--name 'tiny-0123456789ab'"),
        (["--prompts", 300 * "a" + ".jsonl"], "no such file"),
        (["--model", 300 * "a"], "no such file or folder"),
        (["--top_p", "0"], "--top_p 0.0: must be in (0, 1]"),
        (["--top_p", "1.1"], "--top_p 1.1"),
        (["--temperature", "0"], "--temperature"),
        (["--batch_size", "0"], "--batch_size 0: must be at least 1"),
        (["--micro_tokens", "-1"], "--micro_tokens"),
        (["--slots", "0"], "--slots"),
        (["--epochs", "0"], "--epochs"),
        (["--iterations", "0"], "--iterations"),
        (["--max_new_tokens", "0"], "--max_new_tokens"),
        (["--learning_rate", "nan"], "--learning_rate nan"),
        (["--warmup_ratio", "1"], "--warmup_ratio"),
        (["--limit", "-1"], "--limit"),
        (["--limit", "4"], "too few"),
        (["--seed", "-1"], "--seed"),
        (["--pairs", "some"], "--pairs"),
        (["--targets", "hard", "--pairs", "all"], "--targets hard"),
        (["--judge", "me"], "--judge me: unknown; give digits, llm, pairrm, or its folder or hub id"),
        (["--prompts", "missing.jsonl"], "--prompts missing.jsonl: no such file"),
        (["--prompts", "empty.jsonl"], "--prompts empty.jsonl: no row of use, it is empty"),
        (
            ["--prompts", "bad.jsonl"],
            "bad.jsonl, line 1: of no known shape; keys found: question; shapes accepted: {prompt}",
        ),
        (
            ["--model", "no/such-model"],
            "--model no/such-model: no such folder here, and the hub, where its config.json",
        ),
        (["--model", "."], "--model .: its config.json cannot be read from it"),
        (["--model"], "--model"),
        (["--max_prompt_tokens", "2"], "--prompts: none is left: over --max_prompt_tokens 2"),
        (["--max_new_tokens", "500"], "add up to 564, but tiny has 512 positions"),
        (["--name", "../escape"], "--name '../escape'"),
        (["--name", "a b"], "--name 'a b'"),
        (["--unknown", "1"], "--unknown"),
        *([] if torch.cuda.is_available() else [(["--device", "cuda"], "--device cuda: no CUDA GPU")]),
    ],
    ids=lambda value: " ".join(value)[:30] if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_and_exit_code_2(workdir, capsys, flags, words):
    (workdir / "empty.jsonl").write_text("")
    (workdir / "bad.jsonl").write_text('{"question": "a"}\n')
    before = sorted(workdir.rglob("*")) + sorted((workdir / "runs").iterdir())
    with pytest.raises(SystemExit) as end:
        common.cli(sppo.main, sppo.Args, sppo.RECIPES, sppo.__doc__, flags)
    said = capsys.readouterr().err
    assert end.value.code == 2
    assert said.count("\n") == 1 and words in said and "Traceback" not in said
    assert sorted(workdir.rglob("*")) + sorted((workdir / "runs").iterdir()) == before


def test_a_folder_that_cannot_hold_runs_is_named(tmp_path):
    (tmp_path / "runs").write_text("a file")
    done = run("--limit", "40", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "cannot be written" in done.stderr
    assert done.stdout == "" and (tmp_path / "runs").read_text() == "a file"


def test_nothing_preferred_is_said_not_raised(workdir, capsys, monkeypatch):
    """In the first iteration that is an error; later the run ends with what it has."""
    judge, calls = common.DigitsJudge(), []

    def ties(prompts, responses):
        return torch.full((len(prompts), len(responses[0]), len(responses[0])), 0.5)

    def ties_later(prompts, responses):
        calls.append(len(responses[0]))
        return judge(prompts, responses) if calls.count(5) == 1 else ties(prompts, responses)  # 5 = K: training

    monkeypatch.setitem(common.JUDGES, "digits", lambda: ties)
    with pytest.raises(common.InputError, match="iteration 1: no response is preferred"):
        sppo.main(sppo.Args(name="ties", **FEW))
    monkeypatch.setitem(common.JUDGES, "digits", lambda: ties_later)
    table = sppo.main(sppo.Args(name="late", **{**FEW, "iterations": 3}))
    assert len(table) == 2 and (workdir / "runs" / "late" / "final" / "model.safetensors").exists()
    assert "iteration 2: no response is preferred" in capsys.readouterr().out


def test_help_lists_every_flag_and_the_short_names(capsys):
    with pytest.raises(SystemExit) as end:
        common.cli(sppo.main, sppo.Args, sppo.RECIPES, sppo.__doc__, ["--model", "mistral-7b", "--help"])
    said = capsys.readouterr().out
    assert end.value.code == 0
    assert all(f"--{name}" in said for name in vars(sppo.Args()))
    assert all(name in said for name in common.MODELS)
    assert "(default: 1000.0)" in said  # the recipe of the model that was named


# Responses, judges and evaluation prompts from elsewhere -------------------------------------------------------------


def test_a_runs_own_responses_train_the_same_policy(job, workdir):
    """--responses with ids and finished goes on as if the run had sampled them itself."""
    settings = {"limit": 640, "n_eval": 160, "iterations": 1, "epochs": 2}  # so that the held-out prompts are the same
    file = job[1] / "iter_1" / "responses.jsonl"
    sppo.main(sppo.Args(name="again", responses=str(file), **settings))
    for name in ("responses.jsonl", "preferences.jsonl", "pairs.jsonl"):
        assert lines(workdir / "runs" / "again" / "iter_1" / name) == lines(job[1] / "iter_1" / name), name
    mine, theirs = (common.load_policy(str(f / "iter_1" / "policy"))[0] for f in (workdir / "runs" / "again", job[1]))
    for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_responses_as_text_are_tokenised_alone_and_end_with_the_turn(job, workdir, capsys):
    rows = lines(job[1] / "iter_1" / "responses.jsonl")
    given = [{"prompt": row["prompt"], "responses": [y["text"] for y in row["responses"]]} for row in rows[:100]]
    given[0]["responses"][0] = 20 * "1"  # over --max_new_tokens: keeps its start, and may only lose
    common.write_jsonl("vllm.jsonl", given)
    sppo.main(sppo.Args(name="text", responses="vllm.jsonl", **{**FEW, "limit": 640, "n_eval": 160}))
    assert "it answers 100 of 480 training prompts; its other 0 prompts" in capsys.readouterr().out
    mine = lines(workdir / "runs" / "text" / "iter_1" / "responses.jsonl")
    (first, *others), *rest = [row["responses"] for row in mine]
    assert first["ids"] == 16 * [first["ids"][0]] and not first["finished"]
    right = [y["ids"] for row in rows[:100] for y in row["responses"] if y["finished"]]
    found = [y["ids"] for row in [others, *rest] for y in row]
    assert sum(a in right for a in found) > 0.99 * len(found) and all(y["finished"] for y in others)


def test_responses_with_scores_need_no_judge_to_train(job, workdir, monkeypatch):
    """The shape of snorkelai/Snorkel-Mistral-PairRM-DPO-Dataset; here the scores prefer the longer answer."""
    rows, texts = lines(job[1] / "iter_1" / "responses.jsonl"), ["1", "12", "123", "1234", "12345"]
    shape = {"all_generated_responses": texts, "all_rm_scores": [0, 1, 2, 3, 4]}
    common.write_jsonl("snorkel.jsonl", [{"prompt": row["prompt"][0]["content"], **shape} for row in rows])
    sppo.main(sppo.Args(name="scores", responses="snorkel.jsonl", **{**FEW, "limit": 640, "n_eval": 160}))
    prefs = torch.tensor([row["prefs"] for row in lines(workdir / "runs" / "scores" / "iter_1" / "preferences.jsonl")])
    scores = torch.arange(5.0)
    torch.testing.assert_close(prefs, torch.sigmoid(scores[:, None] - scores).expand_as(prefs))
    for pair in lines(workdir / "runs" / "scores" / "iter_1" / "pairs.jsonl"):
        assert [y["text"] for y in pair["responses"]] == ["12345", "1"]


@pytest.mark.parametrize(
    ("row", "flags", "words"),
    [
        ({"prompt": "12", "responses": ["1"] * 5}, ["--iterations", "2"], "--iterations must be 1, not 2"),
        ({"prompt": "none", "responses": ["1"] * 5}, [], "none of its prompts is one to train on; its first is 'none'"),
        ({"prompt": "12", "responses": ["1"] * 4}, [], "line 1: 4 responses, --k 5 wants 5"),
        ({"prompt": "12"}, [], "line 1: no responses; keys found: prompt"),
        ({"prompt": "12", "responses": [{"text": "1", "ids": [98]}] * 5}, [], "no token ids of this model: [98]"),
        ({"prompt": "12", "responses": [{"text": "1", "ids": ["1"]}] * 5}, [], "no token ids of this model: ['1']"),
        ({"prompt": "12", "responses": [{"text": "1", "ids": [20], "finished": True}] * 5}, [], "do not end with"),
        ({"prompt": "12", "responses": [{"text": "", "finished": False}] * 5}, [], "no token ids of this model: []"),
        ({"prompt": "12", "responses": ["1"] * 5}, ["--judge", "nowhere/pairrm"], "nowhere/pairrm: no such folder"),
        ({"prompt": "12", "responses": ["1"] * 5}, ["--eval_prompts", "bad.json"], "bad.json, line 1: not JSON"),
    ],
    ids=lambda value: str(value)[:50],
)  # fmt: skip
def test_bad_responses_are_one_line_and_leave_nothing(workdir, capsys, row, flags, words):
    common.write_jsonl("digits.jsonl", [{"prompt": str(n)} for n in range(99)])
    common.write_jsonl("given.jsonl", [row])
    (workdir / "bad.json").write_text("{")
    before = sorted(workdir.rglob("*")) + sorted((workdir / "runs").iterdir())
    flags = ["--prompts", "digits.jsonl", "--responses", "given.jsonl", "--iterations", "1", "--n_eval", "2", *flags]
    with pytest.raises(SystemExit) as end:
        common.cli(sppo.main, sppo.Args, sppo.RECIPES, sppo.__doc__, flags)
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.count("\n") == 1 and words in said
    assert sorted(workdir.rglob("*")) + sorted((workdir / "runs").iterdir()) == before


def test_scores_for_all_or_for_none(workdir):
    texts = ["1"] * 5, [{"text": "1", "score": 1}] * 5
    common.write_jsonl("some.jsonl", [{"prompt": str(n), "responses": texts[n % 2]} for n in range(40)])
    with pytest.raises(common.InputError, match="some prompts come with scores and some without"):
        sppo.main(sppo.Args(prompts="some.jsonl", responses="some.jsonl", **FEW))
    assert [path.name for path in (workdir / "runs").iterdir() if not path.name.startswith("tiny-")] == []


def test_eval_prompts_are_answered_in_alpaca_evals_format_and_never_trained_on(workdir, capsys):
    asked = [p[0]["content"] for p in common.digit_prompts(40, seed=1)][:12]  # the first of the very prompts of the run
    (workdir / "alpaca.json").write_text(
        json.dumps([{"instruction": x, "output": "", "generator": "a"} for x in asked])
    )
    sppo.main(sppo.Args(name="asked", eval_prompts="alpaca.json", best_of=4, **FEW))
    folder = workdir / "runs" / "asked"
    outputs = json.loads((folder / "outputs.json").read_text())
    assert [row["instruction"] for row in outputs] == asked  # all of them, in their order
    assert all(row.keys() == {"instruction", "output", "generator"} and row["generator"] == "asked" for row in outputs)
    trained = [row["prompt"][0]["content"] for row in lines(folder / "iter_1" / "responses.jsonl")]
    assert len(trained) == 21 and not set(trained) & set(asked)
    said = capsys.readouterr().out
    assert "12 prompts left out: they are among --eval_prompts" in said
    assert "the judge's favourite of 4 samples of the best iterate beats 0: 0." in said
    facts = json.loads((folder / "win_rates.json").read_text())
    assert facts["best_of_vs_start"] > facts["win_rate"][1][0] + 0.05


def test_the_favourite_of_n_is_the_judges(workdir):
    policy, tokenizer = common.load_policy("tiny")
    prompts = common.encode_prompts(tokenizer, common.digit_prompts(30, seed=3), 64)
    judge, args = common.DigitsJudge(), sppo.Args(best_of=6)
    start = [{"text": "", "finished": True, "repeats": False}] * 2
    common.save_policy(policy, tokenizer, "x/final")
    _, best, _ = common.closing_answers(workdir / "x", prompts[:2], prompts, [start], 0, args)
    samples = common.sample_responses(policy, tokenizer, prompts, 6, "1 outputs", args)
    for prompt, row, favourite in zip(prompts, samples, best, strict=True):
        quality = judge.quality([prompt["prompt"]], [[y["text"] if y["finished"] else "" for y in row]])[0].tolist()
        assert favourite["finished"] or not any(y["finished"] for y in row)
        right = judge.quality([prompt["prompt"]], [[favourite["text"]]]).item()
        assert right == max(q for q, y in zip(quality, row, strict=True) if y["finished"])


def test_the_matrix_and_the_table_say_the_same(job):
    table = lines(job[1] / "metrics.jsonl")
    matrix = json.loads((job[1] / "win_rates.json").read_text())
    wins = torch.tensor(matrix["win_rate"])
    torch.testing.assert_close(wins + wins.T, torch.ones(3, 3))
    assert wins[2, 0].item() == pytest.approx(table[2]["win_rate_vs_start"])
    assert matrix["standard_error"][2][1] == pytest.approx(table[2]["win_rate_vs_previous_se"])
    assert wins[1, 0].item() == pytest.approx(table[1]["win_rate_vs_start"], abs=1e-6)  # judged again, beside a third
    assert (
        abs(table[2]["win_rate_at_equal_length"] - table[2]["win_rate_vs_start"]) < 0.1
    )  # digits have nearly one length
    assert "iterate beats" in job[0].stdout


@pytest.mark.parametrize("preference", ["pairwise", "official"])
def test_pairrm_judges_a_run(workdir, preference):
    test_pairrm.build(workdir / "toy")
    settings = {"preference": preference, "judge_temperature": 0.5, "k": 3, **FEW}
    table = sppo.main(sppo.Args(name="toy", judge="toy", **settings))
    folder = workdir / "runs" / "toy"
    assert "exact_match" not in table[1] and 0 < table[1]["win_rate_at_equal_length"] < 1
    rows = lines(folder / "iter_1" / "responses.jsonl")
    prefs = torch.tensor([row["prefs"] for row in lines(folder / "iter_1" / "preferences.jsonl")])
    judge = common.PairRM("toy", preference=preference, temperature=0.5)
    sound = [b for b, row in enumerate(rows) if all(y["finished"] for y in row["responses"])]
    texts = [[y["text"] for y in rows[b]["responses"]] for b in sound]
    torch.testing.assert_close(prefs[sound], judge([rows[b]["prompt"] for b in sound], texts), atol=1e-5, rtol=0)


def test_dry_run_covers_judge_and_data(workdir, capsys):
    test_pairrm.build(workdir / "toy")
    assert sppo.main(sppo.Args(judge="toy", dry_run=True, **FEW)) == []
    said = capsys.readouterr().out
    assert "judging" in said and "its batch" in said and "s for two responses in one order" in said
    assert "1 iterations x 32 prompts x 5 responses; 8 held out" in said
    assert [path.name for path in (workdir / "runs").iterdir() if not path.name.startswith("tiny-")] == []
    with pytest.raises(common.InputError, match="--judge none/such"):
        sppo.main(sppo.Args(judge="none/such", dry_run=True, **FEW))
    with pytest.raises(common.InputError, match="--prompts none"):
        sppo.main(sppo.Args(prompts="none.jsonl", dry_run=True, **FEW))


def test_the_judge_is_gone_while_the_policy_trains(workdir, monkeypatch):
    alive, seen = weakref.WeakSet(), []

    class Judge(common.DigitsJudge):
        def __init__(self):
            alive.add(self)

    monkeypatch.setitem(common.JUDGES, "digits", Judge)
    step = sppo.train_step
    monkeypatch.setattr(sppo, "train_step", lambda *rest: seen.append(len(alive)) or step(*rest))
    load = common.load_policy
    monkeypatch.setattr(common, "load_policy", lambda *rest, **more: seen.append(len(alive)) or load(*rest, **more))
    sample = common.generate
    monkeypatch.setattr(common, "generate", lambda *rest, **more: seen.append(len(alive)) or sample(*rest, **more))
    common.write_jsonl("asked.jsonl", [{"prompt": "32"}, {"prompt": "41"}])
    sppo.main(sppo.Args(name="alone", best_of=3, eval_prompts="asked.jsonl", **FEW))
    assert len(seen) > 6 and not any(seen)


def test_tensorboard_files_hold_the_metrics_or_the_way_to_install_it(workdir, monkeypatch):
    table = sppo.main(sppo.Args(name="board", tensorboard=True, **FEW))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(workdir / "runs" / "board" / "events"))
    events.Reload()
    (wins,) = events.Scalars("iterate/win_rate_vs_start")
    assert (wins.step, wins.value) == (1, pytest.approx(table[1]["win_rate_vs_start"]))
    losses = [step["loss"] for step in lines(workdir / "runs" / "board" / "iter_1" / "steps.jsonl")]
    assert [e.value for e in events.Scalars("iteration_1/loss")] == pytest.approx(losses)
    monkeypatch.setattr(common.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(common.InputError, match="pip install tensorboard"):
        sppo.main(sppo.Args(name="none", tensorboard=True, **FEW))


def test_answers_that_double_in_length_are_pointed_out(capsys):
    common.show({"iteration": 1, "length_vs_start": 1.9}, {})
    assert "twice" not in capsys.readouterr().out
    common.show({"iteration": 1, "length_vs_start": 2.1}, {})
    assert "over twice as long as the start's" in capsys.readouterr().out
