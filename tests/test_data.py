"""Data of all shapes, splits, teachers' answers; the rule for truncated responses and judges of one's own."""

import gzip
import json
import os
import unicodedata
from array import array
from types import SimpleNamespace

import datasets
import pytest
import torch
from steps import stopped
from steps import turns as user
from tokenizers import normalizers

import common
import sppo
import sr_dpo
from common import (
    DigitsJudge,
    digit_prompts,
    load_rows,
    preferences,
    read_gold,
    read_prompt,
    split_rows,
    truncated_lose,
)


def load_prompts(source, limit=0):
    return load_rows("--prompts", source, read_prompt, limit)


def load_pairs(source):
    return load_rows("--pairs", source, sr_dpo.read_pair)


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


FINE, BAD = ({"role": "assistant", "content": text} for text in ("fine", "bad"))
SYSTEM = {"role": "system", "content": "be brief"}
TALK = [*user("q"), FINE, *user("and?")]
TALK_TEXT = "\n\nHuman: q\n\nAssistant: fine\n\nHuman: and?\n\nAssistant:"
ULTRA = [{"model": "falcon", "response": "bad"}, {"model": "gpt-4", "response": "fine"}]
PAIR, NONE = {"chosen": "fine", "rejected": "bad"}, "wanted prompt, instruction, question, turns"


@pytest.mark.parametrize(
    ("row", "prompt", "gold", "pair"),
    [
        ({"prompt": "q"}, user("q"), None, NONE),
        ({"prompt": TALK, "prompt_id": "1", "source": "web", "tools": "[]"}, TALK, None, NONE),
        ({"prompt": [SYSTEM, *user("q")], "gold": "fine"}, [SYSTEM, *user("q")], "fine", NONE),
        ({"prompt": TALK_TEXT}, TALK, None, NONE),
        ({"prompt": "Human: é\n☃"}, user("Human: é\n☃"), None, NONE),  # no transcript
        ({"instruction": "q", "output": "fine", "generator": "m"}, user("q"), "fine", NONE),
        ({"instruction": "q", "input": "about x", "output": "fine"}, user("q\n\nabout x"), "fine", NONE),
        ({"instruction": "q", "input": "", "completions": ULTRA}, user("q"), "fine", NONE),
        ({"instruction": "q", "completions": ULTRA[:1]}, user("q"), None, NONE),
        ({"prompt": user("q"), "chosen": [FINE], "rejected": [BAD]}, user("q"), "fine", PAIR),
        ({"prompt": "q", "chosen": [*user("q"), FINE], "rejected": [*user("q"), BAD]}, user("q"), "fine", PAIR),
        ({"chosen": [*TALK, FINE], "rejected": [*TALK, BAD]}, TALK, "fine", PAIR),
        ({"chosen": TALK_TEXT + " fine", "rejected": TALK_TEXT + " bad"}, TALK, "fine", PAIR),
        ({"prompt": TALK_TEXT, **PAIR}, TALK, "fine", PAIR),
        ({"prompt": "q", **PAIR, "score_chosen": 7, "score_rejected": 3}, user("q"), "fine", {**PAIR, "gap": 4}),
        ({"prompt": "q", "chosen": "a", "rejected": "a"}, user("q"), "a", "none of its rows can be used"),
        ({"system": "be brief", "question": "q", **PAIR}, [SYSTEM, *user("q")], "fine", PAIR),  # Orca's
        ({"question_id": 81, "category": "writing", "turns": ["q", "and?"]}, user("q"), None, NONE),  # FastChat's
        ({"question_id": "a", "cluster": "b", "turns": [{"content": "q"}]}, user("q"), None, NONE),  # Arena-Hard's
        ({"turns": '["q", "and?"]'}, user("q"), None, NONE),
        (
            {"prompt": "q", "messages": [*user("q"), FINE], "chosen": [*user("q"), FINE], "rejected": "bad"},
            user("q"),
            "fine",
            PAIR,
        ),
        (
            json.dumps({"prompt": json.dumps(user("q")), "chosen": json.dumps([FINE]), "rejected": "bad"}),
            user("q"),
            "fine",
            PAIR,
        ),
        (
            {"prompt": "42", "chosen": '"so"', "rejected": "null"},
            user("42"),
            '"so"',
            {"chosen": '"so"', "rejected": "null"},
        ),
        (
            {"prompt": "[1]", "chosen": "2024-01-01", "rejected": "007"},
            user("[1]"),
            "2024-01-01",
            {"chosen": "2024-01-01", "rejected": "007"},
        ),
    ],
    ids=lambda value: json.dumps(value)[:50] if isinstance(value, dict) else "",
)
def test_every_shape_is_read(tmp_path, capsys, row, prompt, gold, pair):
    path = write(tmp_path / "rows.jsonl", row)
    assert load_prompts(path) == [prompt]
    if gold:
        assert load_rows("--gold", path, read_gold) == [{"prompt": prompt, "gold": gold}]
    else:
        assert "none of its rows can be used" in stopped(capsys, load_rows, "--gold", path, read_gold)
    if isinstance(pair, dict):
        assert load_pairs(path) == [{"prompt": prompt, **pair}]
    else:
        assert pair in stopped(capsys, load_pairs, path)


TOOLS, CALL = [{"type": "function", "function": {"name": "f"}}], [{"function": {"name": "f", "arguments": "{}"}}]
IMAGE = [{"type": "text", "text": "q"}, {"type": "image"}]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "q", "tools": TOOLS}, "with tools, which is not supported"),
        ({"prompt": [*user("q"), {**FINE, "tool_calls": CALL}, *user("so?")]}, "with tool_calls"),
        ({"prompt": "q", "chosen": [{**FINE, "reasoning_content": "hm"}], "rejected": "bad"}, "with reasoning_content"),
        ({"prompt": " \n"}, "empty, or not ending with the user's turn"),
        ({"prompt": [FINE]}, "empty, or not ending with the user's turn"),
        ({"prompt": [{"role": "user", "content": None}]}, "with a message that is not text"),
        ({"prompt": [{"role": "user", "content": IMAGE}]}, "with a message that is not text"),
        ({"prompt": "q", "images": ["a.png"]}, "with images"),
        ({"prompt": "q", "chat_template_kwargs": {"enable_thinking": False}}, "with chat_template_kwargs"),
        ({"prompt": "q", "history": [["a", "b"]]}, "with history"),
        ({"prompt": "q", "context": "about x"}, "with context"),
        ({"prompt": [{**user("q")[0], "name": "Ann"}]}, "with name"),
        ({"prompt": "q", "chosen": [{**FINE, "function_calls": "f()"}]}, "with function_calls"),
        ({"prompt": "q", "messages": user("another")}, "with messages that do not begin with its prompt"),
        ({"prompt": 42}, "with a message that is not text"),
        ({"prompt": "half \ud83d"}, "of no known shape, UnicodeEncodeError: "),
        ({"prompt": "q", "chosen": [{"from": "gpt", "value": "a"}]}, "with a message that is not text"),
        ("null", "of no known shape, no JSON object in UTF-8"),
        ({"prompt": "q", "input": "about x"}, "with a question that differs from its prompt"),
        ({"prompt": "q", "system": "a", "system_prompt": "b"}, "with two system turns"),
        ({"prompt": [SYSTEM, *user("q")], "system": "another"}, "with two system turns"),
        ({"prompt": "q", "chosen": [FINE, *user("and?"), BAD], "rejected": "bad"}, "not one assistant turn"),
        ({"prompt": "q", "chosen": [*user("other"), FINE], "rejected": "bad"}, "not one assistant turn"),
        ({"chosen": [*user("q"), FINE], "rejected": [*user("r"), BAD]}, "not one assistant turn"),
        ({"prompt": "q", "chosen": " ", "rejected": "bad"}, "with an empty answer, or two equal ones"),
    ],
    ids=str,
)
def test_what_would_be_lost_is_left_out_and_counted_by_name(tmp_path, capsys, row, reason):
    good = {"prompt": "good", "chosen": "fine", "rejected": "bad"}
    path = write(tmp_path / "p.jsonl", good, {"chosen": "a", "rejected": "b"} | row if isinstance(row, dict) else row)
    assert [pair["prompt"] for pair in load_pairs(path)] == [user("good")]
    assert "1 of 2 skipped: " in (said := capsys.readouterr().out) and reason in said


PARTS = [{"role": "user", "content": [{"type": "text", "text": "q"}, {"type": "text", "text": "!"}]}]


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"instruction": "q", "system": "be brief", "tools": [], "kwargs": {"a": None}}, [SYSTEM, *user("q")]),
        ({"prompt": TALK, "system_prompt": "be brief"}, [SYSTEM, *TALK]),
        ({"prompt": [SYSTEM, *user("q")], "system": "be brief"}, [SYSTEM, *user("q")]),
        ({"prompt": "5", "system": "5"}, [{"role": "system", "content": "5"}, *user("5")]),
        ({"prompt": "q", "instruction": "q"}, user("q")),
        ({"prompt": PARTS}, user("q!")),
    ],
    ids=str,
)
def test_fields_beside_the_prompt_are_used(tmp_path, row, prompt):
    assert load_prompts(write(tmp_path / "p.jsonl", row)) == [prompt]


def test_files_of_all_kinds_hold_the_same_and_a_folder_has_splits(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": text} for text in ("one", "zwei ☃", "three", "one")]
    write(tmp_path / "p.jsonl", *rows)
    (tmp_path / "p.json").write_text(json.dumps(rows, indent=1))
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "p.parquet")
    (tmp_path / "bom.jsonl").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "p.jsonl").read_bytes().replace(b"\n", b"\r\n"))
    for file in [*tmp_path.glob("*.json*")]:
        (tmp_path / (file.name + ".gz")).write_bytes(gzip.compress(file.read_bytes()))
    for file in tmp_path.glob("*.*"):
        assert load_prompts(str(file)) == [user("one"), user("zwei ☃"), user("three")], file
    assert load_prompts("p.jsonl", limit=2) == [user("one"), user("zwei ☃")]
    (tmp_path / "my.data").mkdir()
    for split in ("train", "test"):
        write(tmp_path / "my.data" / f"{split}.jsonl", {"prompt": split})
    assert load_prompts("my.data") == [user("train")] and load_prompts("my.data:test") == [user("test")]
    assert "nope" in stopped(capsys, load_prompts, "my.data:nope")
    data = datasets.Dataset.from_list(rows)  # as a user keeps one
    data.save_to_disk("saved")
    datasets.DatasetDict({"train": data, "test": data.select([1])}).save_to_disk("both")
    assert load_prompts("saved") == load_prompts("both") == load_prompts("p.jsonl")
    assert load_prompts("both:test") == [user("zwei ☃")]
    (tmp_path / "clone").mkdir()  # as one of UltraFeedback, whose files are named after their sources
    for name in ("evol_instruct", "truthful_qa"):
        write(tmp_path / "clone" / f"{name}.jsonl", {"instruction": name})
    assert load_prompts("clone") == [user("evol_instruct"), user("truthful_qa")]


def test_what_a_file_holds_is_read_line_by_line_and_each_time_anew(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "p.jsonl"
    file.write_bytes(
        b'{"prompt": "a"}\n{"prompt": "\xe9"}\nnull\n[1]\n{"prompt"\n\n{"prompt": "b", "system": "late"}\n'
    )
    assert [prompt[-1]["content"] for prompt in load_prompts("p.jsonl")] == ["a", "b"]
    assert "p.jsonl: 4 of 6 skipped: of no known shape, no JSON object in UTF-8" in capsys.readouterr().out
    (tmp_path / "folder").mkdir()
    for text in ("old", "new"):
        for name in ("p.jsonl", "folder/train.jsonl"):
            write(tmp_path / name, {"prompt": text})
            os.utime(name, (1e9, 1e9))
        datasets.Dataset.from_list([{"prompt": text}]).to_parquet("p.parquet")
        os.utime("p.parquet", (1e9, 1e9))
        assert load_prompts("p.jsonl") == load_prompts("folder") == load_prompts("p.parquet") == [user(text)]
    (tmp_path / "one.json").write_text(json.dumps({"prompt": "q"}, indent=1))
    assert load_prompts("one.json") == [user("q")]
    for name, said in (("p.jsonl", "no JSON object in UTF-8"), ("p.parquet", "cannot be loaded")):  # not pulled
        (tmp_path / name).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
        assert said in stopped(capsys, load_prompts, name)


def test_a_configuration_of_a_dataset_is_named_before_its_split(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "d").mkdir()
    for name in "ab":
        write(tmp_path / f"d/{name}.jsonl", {"prompt": name})
    configs = "".join(f"- config_name: {x}\n  data_files:\n  - split: s\n    path: {x}.jsonl\n" for x in "ab")
    (tmp_path / "d/README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    assert load_prompts("d:b:s") == [user("b")]
    assert "NAME:config:split" in (said := stopped(capsys, load_prompts, "d:s")) and "['a', 'b']" in said
    assert "no split train, but s" in stopped(capsys, load_prompts, "d:a:train")


def test_digit_prompts_are_different_and_belong_to_their_seed():
    texts = [prompt[0]["content"] for prompt in digit_prompts(500, seed=1)]
    assert len(set(texts)) == 500 and {len(text) for text in texts} == {4, 5, 6, 7, 8} and "".join(texts).isdigit()
    assert digit_prompts(500, seed=1) == [user(text) for text in texts] != digit_prompts(500, seed=2)


@pytest.mark.parametrize(("copies", "n_eval", "held", "size"), [(1, 13, 13, 30), (1, 1000, 25, 26), (2, 13, 13, None)])
def test_the_parts_and_the_held_out_prompts_are_disjoint(copies, n_eval, held, size, tmp_path, tiny, capsys):
    """A prompt may come twice, as in pairs. At most a quarter is held out."""
    prompts = digit_prompts(103, seed=1)
    rows = [{"prompt": prompt, "n": n} for prompt in prompts for n in range(copies)]
    args = sppo.Args(n_eval=n_eval, max_prompt_tokens=10)
    policy, tokenizer = common.load_policy(tiny)
    rows = common.encode_rows(policy, tokenizer, rows, args)
    parts, held_out = split_rows(rows, args)
    assert len(held_out) == held
    assert len({len(part) for part in parts}) == 1
    groups = [[row["prompt"][0]["content"] for row in some] for some in (held_out, *parts)]
    assert all(set(groups[0]).isdisjoint(part) for part in groups[1:])
    assert copies == 2 or (len(parts[0]) == size and len(set().union(*groups)) == sum(map(len, groups)))
    assert split_rows(rows, args) == (parts, held_out)
    args.iterations = 1000
    assert "too few for 1000 iterations" in stopped(capsys, split_rows, rows, args)


def test_prompts_of_the_same_token_ids_stay_on_one_side(tiny):
    policy, tokenizer = common.load_policy(tiny)
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()  # as Qwen's
    tokenizer.add_tokens(["é"])
    texts = [unicodedata.normalize(form, f"é {n}") for n in range(40) for form in ("NFC", "NFD")]
    args = sppo.Args(n_eval=8, iterations=1)
    rows = common.encode_rows(policy, tokenizer, [{"prompt": user(text)} for text in texts], args)
    (part,), held_out = split_rows(rows, args)
    ids = [{str(row["prompt_ids"]) for row in some} for some in (part, held_out)]
    assert len(ids[0] | ids[1]) == 40 and not ids[0] & ids[1]


def test_prompts_that_differ_in_white_space_stay_on_one_side(tiny):
    policy, tokenizer = common.load_policy(tiny)
    prompts = [user(f"{n}{end}") for n in range(40) for end in ("", " ")]
    args = sppo.Args(n_eval=8, iterations=1)
    rows = common.encode_rows(policy, tokenizer, [{"prompt": prompt} for prompt in prompts], args)
    (part,), held_out = split_rows(rows, args)
    texts = [{row["prompt"][0]["content"].strip() for row in some} for some in (part, held_out)]
    assert len(texts[0] | texts[1]) == 40 and not texts[0] & texts[1]


def test_a_teachers_answers_come_to_their_prompts(tmp_path, tiny, capsys):
    policy, tokenizer = common.load_policy(tiny)
    rows = [{"prompt": user(text), "n": n} for n, text in enumerate(("31", "25", "4", "6", "1"))]
    texts = {"25": "2 5", "31": "13", "4": "</s>", "6": " ", "9": "9"}  # of some; "4" spells a control token
    path = write(tmp_path / "g.jsonl", *({"prompt": x, "gold": y} for x, y in texts.items()))
    args = SimpleNamespace(gold=path, max_new_tokens=3, max_prompt_tokens=9)
    kept = common.add_gold(policy, tokenizer, rows, args)
    assert [(row["n"], row["gold"]["text"]) for row in kept] == [(0, "13"), (1, "2 5")]
    ids = array("i", [*tokenizer("13").input_ids, 1])
    assert kept[0]["gold"] == {"text": "13", "ids": ids, "finished": True, "teacher": True}
    assert len(kept[1]["gold"]["ids"]) == 3 and not kept[1]["gold"]["finished"]  # cut, without EOS
    said = capsys.readouterr().out
    assert "2 of 5 skipped: unanswered" in said and "--gold: 1 of 3 skipped: with </s> in the text" in said
    assert "answers none" in stopped(capsys, common.add_gold, policy, tokenizer, rows[4:], args)
    args.gold = "digits"
    assert [row["gold"]["text"] for row in common.add_gold(policy, tokenizer, rows, args)][:2] == ["13", "25"]


def test_the_digits_judge_by_hand():
    texts = ["0123", "0122", "012", "01234", "3210", "", "9" * 400, " 0123"]
    quality = [1, 0.75, 0.75 - 0.25, 1 - 0.25, 0, -1, -1, -0.25]
    assert DigitsJudge().quality([user("3102")], [texts]).tolist() == [quality]
    prefs = DigitsJudge()([user("3102"), user("9")], [["0123", "0122"], ["9", "9"]])
    assert prefs[0, 0, 1].item() == pytest.approx(1 / (1 + 2.718281828 ** (-10 * 0.25)), rel=1e-5)
    assert (prefs[1] == 0.5).all()
    assert DigitsJudge().metrics([user("21"), user("4")], [["12", "1"], ["44", "4"]]) == {"exact_match": 0.5}


def longest(prompts, responses):
    """A judge of one's own: a plain function that likes length."""
    n = torch.tensor([[float(len(text)) for text in texts] for texts in responses])
    return torch.sigmoid(n[:, :, None] - n[:, None, :])


def test_a_truncated_response_loses_to_a_finished_one_and_two_are_as_judged(monkeypatch):
    monkeypatch.setitem(common.JUDGES, "longest", lambda args: longest)
    judge = common.load_judge(SimpleNamespace(judge="longest"))
    texts, finished = ["a", "aaaa", "aaa", "aa"], [True, False, False, True]
    responses = [{"text": text, "finished": f} for text, f in zip(texts, finished, strict=True)]
    rows, judged = [{"prompt": [], "responses": responses}], longest([""], [texts])[0]
    torch.testing.assert_close(preferences(judge, rows)[0], judged)
    prefs = truncated_lose(preferences(judge, rows), rows)[0]
    assert prefs[0, 1] == prefs[0, 2] == prefs[3, 1] == prefs[3, 2] == 1
    assert prefs[1, 0] == prefs[2, 0] == prefs[1, 3] == prefs[2, 3] == 0
    for i, j in ((0, 3), (3, 0), (1, 2), (2, 1), (0, 0), (1, 1)):
        assert prefs[i, j] == judged[i, j]
    rows = [{"prompt": [], "responses": responses[::step]} for step in (3, -3)]  # both finished
    both = truncated_lose(preferences(judge, rows), rows)
    assert both[0, 0, 1] == both[1, 1, 0] == judged[0, 3]


ODD = {"NaN": [[[0.5, float("nan")], [0.1, 0.5]]], "unfair": [[[0.5, 0.9], [0.9, 0.5]]], "K": [[[0.5] * 3] * 2]}
ODD |= {"itself": [[[0.0, 0.9], [0.1, 0.0]]], "over 1": [[[0.5, 1.5], [-0.5, 0.5]]], "B": [[[0.5] * 2] * 2] * 2}
ODD |= {"None": None, "ragged": [[[0.5, 0.5], [0.5]]], "text": "0.5", "a number": 0.5, "raises": ZeroDivisionError()}


@pytest.mark.parametrize("how", ODD)
def test_a_judge_that_returns_no_preferences_is_refused(how, capsys):
    rows = [{"prompt": user("?"), "responses": [{"text": y, "finished": True} for y in "ab"]}]

    def odd_judge(*_):
        if how == "raises":
            raise ODD[how]
        return ODD[how]

    said = stopped(capsys, preferences, odd_judge, rows)
    assert "--judge: odd_judge must return preferences (B, K, K)" in said
    assert ("not ZeroDivisionError" in said) == (how == "raises")


def test_preferences_may_be_in_bf16():
    rows = [{"prompt": user("?"), "responses": [{"text": "a" * n, "finished": True} for n in range(9)]}]
    prefs = preferences(lambda *judged: longest(*judged).bfloat16(), rows)
    assert prefs.dtype == torch.float32
    torch.testing.assert_close(prefs, longest([""], [["a" * n for n in range(9)]]), atol=2e-3, rtol=0)
