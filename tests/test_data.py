import gzip
import json

import pytest
import torch

import common
from common import DigitsJudge, InputError, digit_prompts, judge_prefs, load_prompts, split_prompts

DAMAGED = gzip.compress(b"")[:10] + b"\xff" * 50  # a good header, then no deflate stream: zlib.error, not OSError


def user(text):
    return [{"role": "user", "content": text}]


def write(path, *lines, opener=open):
    with opener(path, "wt", encoding="utf-8") as file:
        file.writelines(line + "\n" for line in lines)
    return str(path)


# Prompts -------------------------------------------------------------------------------------------------------------


def test_prompts_are_text_or_messages_gzipped_or_not(tmp_path):
    chat = [{"role": "system", "content": "be brief"}, *user("hi")]
    lines = [json.dumps({"prompt": "one", "more": 1}), "", json.dumps({"prompt": chat}), json.dumps({"prompt": "é\n☃"})]
    plain = write(tmp_path / "p.jsonl", *lines)
    packed = write(tmp_path / "p.jsonl.gz", *lines, opener=gzip.open)
    assert load_prompts(plain) == load_prompts(packed) == [user("one"), chat, user("é\n☃")]
    assert load_prompts(plain, limit=2) == [user("one"), chat]


def test_a_byte_order_mark_is_no_part_of_the_first_line(tmp_path):
    (tmp_path / "p.jsonl").write_bytes(b'\xef\xbb\xbf{"prompt": "one"}\r\n{"prompt": "two"}\r\n')
    assert load_prompts(str(tmp_path / "p.jsonl")) == [user("one"), user("two")]


def test_repeated_prompts_are_left_out_and_counted(tmp_path, capsys):
    path = write(tmp_path / "p.jsonl", '{"prompt": "a"}', '{"prompt": "b"}', '{"prompt": "a"}')
    assert load_prompts(path) == [user("a"), user("b")]
    assert "1 repeated" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a", "label": 1}', "line 2: no key 'prompt'; keys found: text, label"),
        ("{}", "keys found: none"),
        ("[1]", "found list"),
        ('"a"', "found str"),
        ('{"prompt": "a"', "line 2: not JSON"),
        ('{"prompt": ""}', "empty"),
        ('{"prompt": "  "}', "empty"),
        ('{"prompt": 3}', "text or a list"),
        ('{"prompt": []}', "text or a list"),
        ('{"prompt": null}', "text or a list"),
        ('{"prompt": [{"content": "a"}]}', "text or a list"),
        ('{"prompt": [{"role": "user", "content": null}]}', "text or a list"),
        ('{"prompt": [{"role": "assistant", "content": "a"}]}', "last message"),
        ('{"prompt": [{"role": {"a": 1}, "content": "a"}]}', "text or a list"),
        ('{"prompt": "\\ud800"}', "surrogate"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_a_bad_row_is_named_by_its_line(tmp_path, line, message):
    path = write(tmp_path / "p.jsonl", '{"prompt": "fine"}', line)
    with pytest.raises(InputError, match="line 2") as error:
        load_prompts(path)
    assert message in str(error.value) and str(error.value).startswith("--prompts")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("p.txt", b"a"),
        ("p.jsonl", b'{"prompt": "\xff"}'),
        ("p.jsonl.gz", b"not gzip"),
        ("none.jsonl", None),
        ("p.jsonl.gz", DAMAGED),
    ],
)
def test_a_bad_file_is_named(tmp_path, name, content):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=name):
        load_prompts(str(tmp_path / name))


def test_digit_prompts_are_different_and_belong_to_their_seed():
    prompts = digit_prompts(500, seed=1)
    texts = [p[0]["content"] for p in prompts]
    assert len(set(texts)) == 500 and all(4 <= len(t) <= 8 and t.isdigit() for t in texts)
    assert prompts == digit_prompts(500, seed=1) != digit_prompts(500, seed=2)
    assert {len(t) for t in texts} == {4, 5, 6, 7, 8}


def test_the_parts_and_the_held_out_prompts_are_disjoint():
    rows = [{"prompt": p} for p in digit_prompts(103, seed=1)]
    parts, held_out = split_prompts(rows, iterations=3, n_eval=13, seed=1)
    assert [len(p) for p in parts] == [30, 30, 30] and len(held_out) == 13
    texts = [row["prompt"][0]["content"] for part in [held_out, *parts] for row in part]
    assert len(set(texts)) == len(texts)
    assert split_prompts(rows, 3, 13, seed=1)[1] == held_out != split_prompts(rows, 3, 13, seed=2)[1]
    assert len(split_prompts(rows, 3, 1000, seed=1)[1]) == 25  # never more than a quarter


def test_a_prompt_that_occurs_twice_may_not_be_split():
    with pytest.raises(AssertionError, match="share"):
        split_prompts([{"prompt": user("same")}] * 20, iterations=2, n_eval=4, seed=1)


def test_too_few_prompts_to_split():
    rows = [{"prompt": p} for p in digit_prompts(9, seed=1)]
    parts, held_out = split_prompts(rows, iterations=7, n_eval=2, seed=1)
    assert len(parts) == 7 and len(held_out) == 2
    with pytest.raises(InputError, match="too few"):
        split_prompts(rows, iterations=8, n_eval=2, seed=1)
    with pytest.raises(InputError, match="too few"):  # one held-out prompt has no standard error
        split_prompts(rows[:7], iterations=1, n_eval=2, seed=1)


# Judges --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("response", "quality"),
    [
        ("0123", 1.0),
        (" 0123\n", 1.0),
        ("0122", 0.75),
        ("012", 0.75 - 0.25),
        ("01234", 1 - 0.25),
        ("3210", 0.0),
        ("", -1.0),
        ("9" * 400, -1.0),
    ],
)
def test_quality_of_digits_by_hand(response, quality):
    assert DigitsJudge().quality([user("3102")], [[response]]).item() == pytest.approx(quality)


def test_digits_prefs_by_hand():
    prefs = DigitsJudge()([user("3102"), user("9")], [["0123", "0122"], ["9", "9"]])
    assert prefs.shape == (2, 2, 2)
    assert prefs[0, 0, 1].item() == pytest.approx(1 / (1 + 2.718281828 ** (-10 * 0.25)), rel=1e-5)
    assert prefs[0, 1, 0].item() == pytest.approx(1 - prefs[0, 0, 1].item(), rel=1e-5)
    assert torch.equal(prefs[1], torch.full((2, 2), 0.5))


def test_exact_match_counts_only_what_is_right_to_the_last_digit():
    metrics = DigitsJudge().metrics([user("21"), user("4")], [["12", "1"], ["44", "4"]])
    assert metrics == {"exact_match": 0.5}


def test_unfinished_responses_lose_whatever_the_judge_says():
    texts = [["2", "12", "12", "1"]]  # the judge would prefer the two in the middle
    prefs = judge_prefs(DigitsJudge(), [user("21")], texts, [[True, False, False, True]])[0]
    assert prefs[0, 1] == prefs[0, 2] == prefs[3, 1] == prefs[3, 2] == 1
    assert prefs[1, 0] == prefs[1, 3] == prefs[2, 0] == 0
    assert prefs[1, 2] == prefs[2, 1] == 0.5
    alone = DigitsJudge()([user("21")], [["2", "1"]])[0]
    assert prefs[0, 3] == alone[0, 1] and torch.equal(prefs.diagonal(), torch.full((4,), 0.5))


def test_judging_many_prompts_goes_in_order():
    prompts = digit_prompts(150, seed=1)
    texts = [["".join(sorted(p[0]["content"])), "0"] for p in prompts]
    prefs = judge_prefs(DigitsJudge(), prompts, texts, [[True, True]] * 150)
    torch.testing.assert_close(prefs, DigitsJudge()(prompts, texts))


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (torch.full((1, 2, 2), float("nan")), "probabilities"),
        (torch.tensor([[[0.5, 0.9], [0.9, 0.5]]]), "probabilities"),
        (torch.tensor([[[0.5, 1.5], [-0.5, 0.5]]]), "probabilities"),
        (torch.full((1, 2, 3), 0.5), r"\(B, K, K\)"),
    ],
)
def test_a_judge_that_returns_no_preferences_is_refused(answer, message):
    with pytest.raises(InputError, match=message):
        judge_prefs(lambda prompts, responses: answer, [user("1")], [["1", "2"]], [[True, True]])


def test_unknown_judge():
    with pytest.raises(InputError, match="--judge nobody"):
        common.load_judge("nobody", "digits")


def test_the_digits_judge_warns_about_prompts_of_another_kind(capsys):
    common.load_judge("digits", "digits")
    assert capsys.readouterr().out == ""
    common.load_judge("digits", "mine.jsonl")
    assert "JUDGES in common.py" in capsys.readouterr().out


# Files ---------------------------------------------------------------------------------------------------------------


def test_a_file_is_whole_or_absent(tmp_path):
    common.write_json(tmp_path / "new" / "a.json", {"x": "é"})
    assert json.loads((tmp_path / "new" / "a.json").read_text(encoding="utf-8")) == {"x": "é"}
    common.write_jsonl(tmp_path / "b.jsonl", [{"x": "line\nbreak"}, {"x": 2}])
    with pytest.raises(TypeError):
        common.write_jsonl(tmp_path / "b.jsonl", [{"x": 1}, {"x": object()}])
    rows = [json.loads(line) for line in (tmp_path / "b.jsonl").read_text().splitlines()]
    assert rows == [{"x": "line\nbreak"}, {"x": 2}]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b.jsonl", "new"]
