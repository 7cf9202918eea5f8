"""What holds for any run of any script, and for pairs of any prefs: random ones, drawn by a fixed seed."""

import dataclasses
import json
import math
import random

import pytest
from steps import best_of, cli, lines

import common
import dno
import sppo
import sr_dpo


@pytest.mark.parametrize("script", [sppo, dno, sr_dpo], ids=lambda script: script.__name__)
def test_the_run_folder_holds_what_the_readme_says(workdir, script):
    flags = ["--limit", "80", "--n_eval", "16", "--epochs", "2", "--batch_size", "40"]
    flags += [] if script is sr_dpo else ["--iterations", "2", "--k", "3"]
    cli(script, *flags, "--name", "x")
    folder = workdir / "runs/x"
    table, parts = lines(folder / "metrics.jsonl"), []
    config = [field.name for field in dataclasses.fields(script.Args)]
    config += ["script", "program", "replaced", "versions", "fingerprints"]
    assert list(json.loads((folder / "config.json").read_text())) == config  # as in --help
    for t in range(1, len(table)):
        names = ["pairs", "steps", "answers", *([] if script is sr_dpo else ["responses", "preferences"])]
        files = {"outputs.json", "policy", *(f"{name}.jsonl" for name in names)}
        assert {path.name for path in (folder / f"iter_{t}").iterdir()} == files
        steps, pairs = (lines(folder / f"iter_{t}/{name}.jsonl") for name in ("steps", "pairs"))
        n = math.ceil(table[t]["pairs"] / 40)
        assert [row["step"] for row in steps] == list(range(table[t - 1]["step"] + 1, table[t]["step"] + 1))
        assert [row["epoch"] for row in steps] == [1] * n + [2] * n
        rates = [row["learning_rate"] for row in steps]
        assert rates[-1] < max(rates) <= script.Args().learning_rate and rates[-1] > 0
        parts.append({row["prompt"][0]["content"] for row in pairs})
    answers = [lines(folder / f"iter_{t}/answers.jsonl") for t in range(len(table))]
    held_out = {row["prompt"][0]["content"] for row in answers[0]}
    assert len(parts) == (1 if script is sr_dpo else 2) and len(held_out) == 16
    assert len(held_out.union(*parts)) == 16 + sum(map(len, parts))  # no prompt is in two of them
    for t, (row, rows) in enumerate(zip(table, answers, strict=True)):
        ys = [answer["responses"][0] for answer in rows]
        assert row["iterate"] == t and row["tokens"] == sum(len(y["ids"]) for y in ys) / 16
        right = ["".join(sorted(answer["prompt"][0]["content"])) for answer in rows]
        assert row["exact_match"] == sum(y["text"] == z for y, z in zip(ys, right, strict=True)) / 16
    published = json.loads((folder / "iter_1/outputs.json").read_text())
    assert [row["output"] for row in published] == [answer["responses"][0]["text"] for answer in answers[1]]
    assert [row["instruction"] for row in published] == [answer["prompt"][0]["content"] for answer in answers[1]]
    assert {row["generator"] for row in published} == {"x"}
    if best := best_of(table):
        assert (folder / "final").resolve() == (folder / f"iter_{best}/policy").resolve()
        assert (folder / "outputs.json").read_bytes() == (folder / f"iter_{best}/outputs.json").read_bytes()
    assert (folder / "final").exists() == (folder / "outputs.json").exists() == bool(best)
    for rows, found in zip(answers[:-1], table[-1]["wins_vs_each"], strict=True):
        both = [{**b, "responses": a["responses"] + b["responses"]} for a, b in zip(rows, answers[-1], strict=True)]
        prefs = common.truncated_lose(common.preferences(common.DigitsJudge(), both), both)
        assert found == pytest.approx(prefs[:, 1, 0].mean().item(), abs=1e-5)


@pytest.mark.parametrize("seed", range(20))
def test_replay_is_as_much_as_its_share_allows_and_no_more(seed):
    rng = random.Random(seed)
    earlier = [[(t, n) for n in range(rng.randint(0, 60))] for t in range(rng.randint(0, 4))]
    new, share = [("new", n) for n in range(rng.randint(0, 40))], rng.randint(0, 99) / 100
    pairs = dno.with_replay(new, earlier, share, random.Random(0))
    assert pairs[: len(new)] == new and len(set(pairs)) == len(pairs)
    for t, rows in enumerate(earlier):
        most = int(share / 2 ** (len(earlier) - 1 - t) * len(pairs))
        assert sum(pair[0] == t for pair in pairs) == min(len(rows), most)
