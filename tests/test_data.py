"""Data: the shapes and files that people have, what is left out and counted, splits; the digits."""

import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest

import common
from common import digit_prompts, load_prompts, load_rows, read_gold, split_rows
from sppo import Args
from sr_dpo import load_pairs


def user(text):
    return [{"role": "user", "content": text}]


def write(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def refusal(capsys, load, *args):
    with pytest.raises(SystemExit) as stopped:
        load(*args)
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.count("\n") == 1
    return said


# Shapes --------------------------------------------------------------------------------------------------------------

ASSISTANT = {"role": "assistant", "content": "fine"}
WRONG = {"role": "assistant", "content": "bad"}
TALK = [*user("q"), ASSISTANT, *user("and?")]
TALK_TEXT = "\n\nHuman: q\n\nAssistant: fine\n\nHuman: and?\n\nAssistant:"
SYSTEM = {"role": "system", "content": "be brief"}
SHAPES = [  # row, its prompt, its pair if it is one
    ({"prompt": "q"}, user("q"), None),
    ({"prompt": TALK}, TALK, None),
    ({"prompt": TALK_TEXT}, TALK, None),
    ({"prompt": TALK_TEXT + " x"}, None, None),  # ends with an answer
    ({"prompt": "Human: is no transcript"}, user("Human: is no transcript"), None),
    ({"instruction": "q", "output": "a", "generator": "m"}, user("q"), None),
    ({"instruction": "q", "input": "about this", "output": "a"}, user("q\n\nabout this"), None),
    ({"instruction": "q", "input": "", "output": "a"}, user("q"), None),
    ({"prompt": "q", "chosen": "fine", "rejected": " bad"}, user("q"), ("fine", " bad")),
    ({"prompt": "q", "chosen": [*user("q"), ASSISTANT], "rejected": [*user("q"), WRONG]}, user("q"), ("fine", "bad")),
    ({"prompt": user("q"), "chosen": [ASSISTANT], "rejected": [WRONG]}, user("q"), ("fine", "bad")),
    ({"chosen": [SYSTEM, *TALK, ASSISTANT], "rejected": [SYSTEM, *TALK, WRONG]}, [SYSTEM, *TALK], ("fine", "bad")),
    ({"chosen": TALK_TEXT + " fine", "rejected": TALK_TEXT + " bad\n"}, TALK, ("fine", "bad")),
]


@pytest.mark.parametrize(("row", "prompt", "pair"), SHAPES, ids=lambda x: json.dumps(x)[:50] if type(x) is dict else "")
def test_every_shape_is_read(tmp_path, capsys, row, prompt, pair):
    path = write(tmp_path / "rows.jsonl", row)
    if prompt is None:
        assert "none of its rows" in refusal(capsys, load_prompts, path)
    else:
        assert load_prompts(path) == [prompt]
    if pair:
        assert load_pairs(path) == [{"prompt": prompt, "chosen": pair[0], "rejected": pair[1]}]
    else:
        assert "--pairs" in refusal(capsys, load_pairs, path)


def test_gold_of_ultrafeedback_is_gpt_4s(tmp_path):
    best, other = {"model": "gpt-4", "response": "best"}, {"model": "x", "response": "no"}
    rows = [{"instruction": "q", "completions": [other, best]}, {"instruction": "r", "completions": [other]}]
    rows += [{"prompt": "s", "response": "one"}, {"prompt": "t", "chosen": [*user("t"), ASSISTANT]}]
    found = load_rows("--gold", write(tmp_path / "g.jsonl", *rows), read_gold)
    assert [(row["prompt"][0]["content"], row["gold"]) for row in found] == [("q", "best"), ("s", "one"), ("t", "fine")]


BAD_ROWS = [
    {"text": "a", "label": 1},
    {"prompt": 3},
    {"prompt": [{"content": "a"}]},
    {"prompt": [{"role": "user", "content": None}]},
    {"prompt": [{"role": "user", "content": 3}]},
]


@pytest.mark.parametrize("row", BAD_ROWS, ids=str)
def test_a_row_of_no_known_shape_is_named_with_its_keys(tmp_path, capsys, row):
    said = refusal(capsys, load_prompts, write(tmp_path / "p.jsonl", row))
    if "none of its rows" not in said:
        assert "row 1 has " + ", ".join(row) in said and "wanted prompt" in said


NO_PAIRS = [
    {"prompt": "q", "chosen": "same", "rejected": "same"},
    {"prompt": "q", "chosen": " ", "rejected": "b"},
    {"chosen": [*user("a"), ASSISTANT], "rejected": [*user("b"), WRONG]},  # without a common prompt
]


def test_rows_that_are_empty_or_repeated_are_left_out_and_counted(tmp_path, capsys):
    path = write(tmp_path / "p.jsonl", {"prompt": "a"}, {"prompt": " "}, {"prompt": "b"}, {"prompt": "a"})
    assert load_prompts(path) == [user("a"), user("b")]
    assert "1 empty and 1 repeated rows left out" in capsys.readouterr().out
    assert load_prompts(path, limit=1) == [user("a")]
    good = {"prompt": "q", "chosen": "a", "rejected": "b"}
    for row in NO_PAIRS:
        assert len(load_pairs(write(tmp_path / "pairs.jsonl", good, row))) == 1
        assert "1 empty and 0 repeated" in capsys.readouterr().out
    said = refusal(capsys, load_pairs, write(tmp_path / "c.jsonl", {"chosen": user("a"), "rejected": user("b")}))
    assert "does not end with the assistant's turn" in said


# Files ---------------------------------------------------------------------------------------------------------------


def test_jsonl_json_and_parquet_gzipped_or_not_hold_the_same(tmp_path):
    rows = [{"prompt": "one"}, {"prompt": "zwei ☃"}, {"prompt": TALK_TEXT}]
    paths = [tmp_path / f"p.{kind}" for kind in ("jsonl", "json", "parquet")]
    write(paths[0], *rows)
    paths[1].write_text(json.dumps(rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), paths[2])
    paths.append(tmp_path / "p.jsonl.gz")
    paths[3].write_bytes(gzip.compress(paths[0].read_bytes()))
    paths.append(tmp_path / "bom.jsonl")
    paths[4].write_bytes(b"\xef\xbb\xbf" + paths[0].read_bytes().replace(b"\n", b"\r\n"))
    for path in paths:
        assert load_prompts(str(path)) == [user("one"), user("zwei ☃"), TALK], path


def test_a_folder_is_a_dataset_with_splits(tmp_path, capsys):
    write(tmp_path / "data/train-00000-of-00002.jsonl", {"prompt": "t"})
    write(tmp_path / "data/train-00001-of-00002.jsonl", {"prompt": "u"})
    write(tmp_path / "data/test.jsonl", {"prompt": "e"})
    assert load_prompts(str(tmp_path / "data")) == [user("t"), user("u")]
    assert load_prompts(f"{tmp_path / 'data'}:test") == [user("e")]
    assert "nope" in refusal(capsys, load_prompts, f"{tmp_path / 'data'}:nope")


@pytest.mark.parametrize("source", ["ORG/NAME", "ORG/NAME:train_prefs", "hf://datasets/ORG/NAME/file.json"])
def test_a_dataset_on_a_hub_that_is_away_is_one_line(source, capsys):
    assert f"--prompts {source}: cannot be loaded" in refusal(capsys, load_prompts, source)


# The digits, splits --------------------------------------------------------------------------------------------------


def test_digit_prompts_are_different_and_belong_to_their_seed():
    prompts = digit_prompts(500, seed=1)
    texts = [p[0]["content"] for p in prompts]
    assert len(set(texts)) == 500 and {len(t) for t in texts} == {4, 5, 6, 7, 8} and all(map(str.isdigit, texts))
    assert prompts == digit_prompts(500, seed=1) != digit_prompts(500, seed=2)


def test_parts_held_out_and_eval_prompts_are_disjoint():
    rows = [{"prompt": prompt} for prompt in digit_prompts(103, seed=1)]
    parts, held_out = split_rows(rows, Args(n_eval=13), [])
    assert [len(part) for part in parts] == [30, 30, 30] and len(held_out) == 13
    texts = [row["prompt"][0]["content"] for part in [held_out, *parts] for row in part]
    assert len(set(texts)) == len(texts)
    assert split_rows(rows, Args(n_eval=13), [])[1] == held_out != split_rows(rows, Args(n_eval=13, seed=2), [])[1]
    assert len(split_rows(rows, Args(), [])[1]) == 25  # never more than a quarter
    extra = [{**row, "benchmark": True} for row in rows[:40]]
    parts, both = split_rows(rows, Args(n_eval=13), extra)
    assert both[13:] == extra and not [row for part in [both[:13], *parts] for row in part if row in rows[:40]]


def test_too_few_prompts_to_split(capsys):
    rows = [{"prompt": prompt} for prompt in digit_prompts(9, seed=1)]
    assert len(split_rows(rows, Args(iterations=7), [])[0]) == 7
    for few, iterations in ((9, 8), (7, 1)):  # one held-out prompt has no standard error
        assert "too few" in refusal(capsys, split_rows, rows[:few], Args(iterations=iterations), [])


# The judge of digits, truncated responses ----------------------------------------------------------------------------


def test_the_digits_judge_by_hand():
    judge, prompt = common.DigitsJudge(), [user("3124")]
    quality = judge.quality(prompt, [["1234", "1243", "123", "12344", ""]])
    assert quality.tolist() == [[1.0, 0.5, 0.5, 0.75, -1.0]]  # 2 of 4; 3 of 4 less 1/4; all less 1/4; none less 1
    prefs = judge(prompt, [["1234", "1243"]])[0]
    assert prefs[0, 1].item() == pytest.approx(1 / (1 + 2.718281828**-5)) and prefs[0, 0] == 0.5
    assert judge.metrics(prompt * 2, [["1234"], ["1243"]]) == {"exact_match": 0.5}


def row_of(*finished):
    return [{"prompt": user("q"), "responses": [{"text": str(i), "finished": f} for i, f in enumerate(finished)]}]


def test_a_truncated_response_loses_to_a_finished_one_and_two_of_them_are_as_judged():
    def judge(prompts, responses):  # one's own judge is a function: here the later one is better
        return [[[0.5, 0.2, 0.2], [0.8, 0.5, 0.2], [0.8, 0.8, 0.5]] for _ in prompts]

    assert common.preferences(judge, row_of(True, False, False))[0, 0].tolist() == [0.5, 1, 1]
    prefs = common.preferences(judge, row_of(True, False, False))[0]
    assert prefs[1, 2].item() == pytest.approx(0.2) and prefs[1, 0] == 0
    assert common.preferences(judge, row_of(True, True, False))[0, 0, 1].item() == pytest.approx(0.2)


@pytest.mark.parametrize("prefs", [[[0.5, 0.5]], [[[0.5, 0.9], [0.3, 0.5]]], [[[0.5, 1.5], [-0.5, 0.5]]]], ids=str)
def test_a_judge_that_is_not_fair_is_refused(prefs, capsys):
    assert "P(a > b) + P(b > a) = 1" in refusal(capsys, common.preferences, lambda *_: prefs, row_of(True, True))
