import gzip
import json

import pytest
import torch

import common
import sppo
from common import (
    DigitsJudge,
    InputError,
    digit_prompts,
    judge_prefs,
    load_pairs,
    load_prompts,
    load_responses,
    split_prompts,
)

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
        ('{"text": "a", "label": 1}', "line 2: of no known shape; keys found: text, label; shapes accepted: {prompt}"),
        ('{"prompt": null, "text": ""}', "keys found: text;"),
        ("{}", "keys found: none"),
        ("[1]", "found list"),
        ('"a"', "found str"),
        ('{"prompt": "a"', "line 2: not JSON"),
        ('{"prompt": 3}', "text or a list"),
        ('{"prompt": [{"content": "a"}]}', "text or a list"),
        ('{"prompt": [{"role": "user", "content": null}]}', "text or a list"),
        ('{"prompt": [{"role": {"a": 1}, "content": "a"}]}', "text or a list"),
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


# The shapes that people have on disk ---------------------------------------------------------------------------------

ASSISTANT = {"role": "assistant", "content": "fine"}
WRONG = {"role": "assistant", "content": "bad"}
TALK = [*user("q"), ASSISTANT, *user("and?")]
TALK_TEXT = "\n\nHuman: q\n\nAssistant: fine\n\nHuman: and?\n\nAssistant:"
SYSTEM = {"role": "system", "content": "be brief"}


def completion(response, rating=None, fine=None, overall=None):
    aspects = {} if rating is None else {"helpfulness": {"Rating": rating}, "honesty": {"Rating": "N/A"}}
    return {"response": response, "annotations": aspects, "fine-grained_score": fine, "overall_score": overall}


@pytest.mark.parametrize(
    ("row", "prompt", "pair"),
    [
        ({"prompt": "q"}, user("q"), None),
        ({"prompt": TALK}, TALK, None),
        ({"prompt": TALK_TEXT}, TALK, None),
        ({"prompt": "Human: is no transcript"}, user("Human: is no transcript"), None),
        ({"instruction": "q", "output": "a", "generator": "m"}, user("q"), None),
        ({"instruction": "q", "input": "about this", "output": "a"}, user("q\n\nabout this"), None),
        ({"instruction": "q", "input": "", "output": "a"}, user("q"), None),
        ({"prompt": "q", "chosen": "fine", "rejected": " bad"}, user("q"), ("fine", " bad")),
        ({"prompt": "q", "chosen": [*user("q"), ASSISTANT], "rejected": [*user("q"), WRONG]},
         user("q"), ("fine", "bad")),
        ({"prompt": user("q"), "chosen": [ASSISTANT], "rejected": [WRONG]}, user("q"), ("fine", "bad")),
        ({"chosen": [*TALK, ASSISTANT], "rejected": [*TALK, WRONG]}, TALK, ("fine", "bad")),
        ({"prompt": "q", "chosen": [SYSTEM, *user("q"), ASSISTANT], "rejected": [SYSTEM, *user("q"), WRONG]},
         [SYSTEM, *user("q")], ("fine", "bad")),
        ({"chosen": TALK_TEXT + " fine", "rejected": TALK_TEXT + " bad\n"}, TALK, ("fine", "bad")),
        ({"prompt": TALK_TEXT, "chosen": " fine", "rejected": " bad"}, TALK, (" fine", " bad")),
        ({"instruction": "q", "completions": []}, user("q"), "1 without a better and a worse completion"),
        ({"instruction": "q", "completions": [completion("a", "5"), completion("b", "2"), completion("c", "N/A")]},
         user("q"), ("a", "b")),
        ({"instruction": "q", "completions": [completion("a", "1", 4.5, 2.0), completion("b", "5", 1.5, 9.0)]},
         user("q"), ("a", "b")),  # the fine-grained score goes first
        ({"instruction": "q", "completions": [completion("a", overall=10), completion("b", overall=3.0)]},
         user("q"), "1 without a better and a worse completion"),  # 10 means 1 in old revisions
        ({"instruction": "q",
          "completions": [completion("a", "5", 4.5), completion("b", overall=8.0), completion("c", "1")]},
         user("q"), ("a", "c")),  # scores of two kinds are not compared
        ({"instruction": "q", "completions": [completion("a", "3"), completion("b", "3")]},
         user("q"), "1 without a better and a worse completion"),
        ({"prompt": "q", "chosen": "same", "rejected": "same"}, user("q"), "1 with two equal responses"),
        ({"prompt": "q", "chosen": " ", "rejected": "b"}, user("q"), "1 with an empty response"),
    ],
    ids=lambda value: json.dumps(value)[:60] if isinstance(value, dict) else "",
)  # fmt: skip
def test_every_shape_is_read(tmp_path, row, prompt, pair):
    path = write(tmp_path / "rows.jsonl", json.dumps(row))
    assert load_prompts(path) == [prompt]
    if isinstance(pair, tuple):
        found = load_pairs(path)[0]
        assert (found.pop("gap", 0) > 0) == ("completions" in row)
        assert found == {"prompt": prompt, "chosen": pair[0], "rejected": pair[1]}
    else:
        with pytest.raises(InputError, match=pair or "no pair; keys found"):
            load_pairs(path)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": " \n"}, "empty"),
        ({"prompt": [ASSISTANT]}, "without a user's turn at the end"),
        ({"prompt": "\ud800"}, "with half of a surrogate pair"),
        ({"prompt": [{"role": "\ud800", "content": "a"}, *user("b")]}, "with half of a surrogate pair"),
        ({"prompt": []}, "empty"),
        ({"prompt": None}, "empty"),
        (
            {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: A\n\nAssistant: b"},
            "without a common prompt",
        ),
        ({"chosen": "\n\nHuman: a", "rejected": "\n\nHuman: a"}, "without an answer at the end"),
        (
            {"prompt": "p", "chosen": [*user("q"), ASSISTANT], "rejected": [*user("q"), WRONG]},
            "do not repeat the prompt",
        ),
        ({"prompt": "good"}, "repeated"),
        ({"prompt": " good\n"}, "repeated"),
    ],
)
def test_rows_of_no_use_are_left_out_and_counted_by_reason(tmp_path, capsys, row, reason):
    path = write(tmp_path / "p.jsonl", '{"prompt": "good"}', json.dumps(row), json.dumps(row))
    assert load_prompts(path) == [user("good")]
    said = capsys.readouterr().out
    assert "1 rows; left out: 2 " in said and reason in said
    if reason != "repeated":
        with pytest.raises(InputError, match=r"no row of use \(1 .*" + reason):
            load_prompts(write(tmp_path / "alone.jsonl", json.dumps(row)))


def test_half_a_surrogate_pair_in_a_response_is_left_out_too(tmp_path):
    """What an engine returns that was cut in the middle of an emoji; no tokenizer takes it."""
    row = {"prompt": "q", "chosen": "fine \ud83d", "rejected": "bad", "responses": ["fine \ud83d", "bad"]}
    path = write(tmp_path / "p.jsonl", json.dumps(row))
    for load in (load_pairs, lambda path: load_responses(path, 2)):
        with pytest.raises(InputError, match=r"no row of use .1 with half of a surrogate pair"):
            load(path)


def test_jsonl_json_and_parquet_gzipped_or_not_hold_the_same(tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = [{"prompt": "one"}, {"prompt": "zwei ☃"}, {"prompt": "three"}]
    paths = [tmp_path / f"p.{kind}" for kind in ("jsonl", "json", "parquet")]
    common.write_jsonl(paths[0], rows)
    common.write_json(paths[1], rows)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), paths[2])
    for path in [*paths]:
        paths.append(path.with_name(path.name + ".gz"))
        paths[-1].write_bytes(gzip.compress(path.read_bytes()))
    paths.append(tmp_path / "one-line.json")
    paths[-1].write_text(json.dumps(rows))
    for path in paths:
        assert load_prompts(str(path)) == [user("one"), user("zwei ☃"), user("three")], path
        assert load_prompts(str(path), limit=2) == [user("one"), user("zwei ☃")], path


def test_a_folder_is_a_dataset_with_splits(tmp_path):
    folder = tmp_path / "some:where" / "data"
    folder.mkdir(parents=True)
    write(folder / "train.jsonl", '{"prompt": "t"}')
    write(folder / "test.jsonl", '{"prompt": "e"}')
    assert load_prompts(str(folder)) == [user("t")]
    assert load_prompts(f"{folder}:test") == [user("e")]
    write(folder / "train-00001-of-00002.jsonl", json.dumps({"prompt": '"00"'}), json.dumps({"prompt": TALK}))
    assert load_prompts(str(folder.parent)) == [user('"00"'), TALK, user("t")]  # a column of two types stays as it is
    with pytest.raises(InputError, match=r"--prompts .*nope"):
        load_prompts(f"{folder}:nope")
    for name in ("train.jsonl", "train-00001-of-00002.jsonl"):
        (folder / name).unlink()
    assert load_prompts(str(folder)) == [user("e")]  # the only split
    write(folder / "validation.jsonl", '{"prompt": "v"}')
    with pytest.raises(InputError, match=r"no split 'train'; give --prompts .*:SPLIT, of test, validation"):
        load_prompts(str(folder))


@pytest.mark.parametrize("source", ["HuggingFaceH4/ultrafeedback_binarized:train_prefs", "tatsu-lab/alpaca_eval"])
def test_a_dataset_on_a_hub_that_is_away(source):
    with pytest.raises(InputError, match="would be, is not reachable; a local folder works"):
        load_prompts(source)


def test_responses_of_another_engine(tmp_path):
    rows = [
        {"prompt": "q", "responses": ["a", {"text": "b", "finished": False}, "never read"]},
        {"prompt": "r", "responses": [{"text": "a", "ids": [5, 1]}, "b"]},
        {"prompt": "s", "all_generated_responses": ["a", "b"], "all_rm_scores": [0.5, -1]},
        {
            "prompt": "t",
            "responses": [{"text": "a", "token_ids": [5], "finish_reason": "length", "logprobs": None}, "b"],
        },
    ]
    rows[2] |= {"chosen": [*user("s"), ASSISTANT], "rejected": [*user("s"), WRONG]}
    common.write_jsonl(tmp_path / "r.jsonl", rows)
    read = list(load_responses(str(tmp_path / "r.jsonl"), 2).values())
    assert [row["prompt"] for row in read] == [user("q"), user("r"), user("s"), user("t")]
    assert [row["responses"] for row in read] == [
        [{"text": "a"}, {"text": "b", "finished": False}],
        [{"text": "a", "ids": [5, 1]}, {"text": "b"}],
        [{"text": "a", "score": 0.5}, {"text": "b", "score": -1}],
        [{"text": "a", "ids": [5], "finished": False}, {"text": "b"}],
    ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "q", "responses": ["a"]}, "1 responses, --k 2 wants 2"),
        ({"prompt": "q", "responses": ["a", 3]}, "response 2: wanted text or"),
        ({"prompt": "q", "responses": ["a", {"ids": [1]}]}, "response 2: wanted text or"),
        ({"prompt": "q", "responses": ["a", {"text": "b", "ids": "1 2"}]}, "response 2: 'finished' must be"),
        ({"prompt": "q", "responses": ["a", {"text": "b", "finished": "yes"}]}, "response 2: 'finished' must be"),
        ({"prompt": "q", "responses": [{"text": "a", "score": 1}, "b"]}, "a response without a score"),
        ({"prompt": "q", "all_generated_responses": ["a", "b"], "all_rm_scores": [1]}, "a response without a score"),
        (
            {"prompt": "q", "all_generated_responses": ["a", "b"], "all_rm_scores": [1, "x"]},
            "a response without a score",
        ),
        ({"prompt": "q", "response": "a"}, "no responses; keys found: prompt, response"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_responses_that_are_none_are_refused(tmp_path, row, message):
    path = write(tmp_path / "r.jsonl", json.dumps(row))
    with pytest.raises(InputError, match=r"--responses .*line 1: ") as error:
        load_responses(path, 2)
    assert message in str(error.value)


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


def test_eval_prompts_are_in_no_part_by_content_not_by_index(capsys):
    rows = [{"prompt": p} for p in digit_prompts(100, seed=1)]
    asked = [{"prompt": user(row["prompt"][0]["content"] + " \n")} for row in rows[:40]]
    parts, held_out = split_prompts(rows, 2, 10, 1, asked)
    used = [row["prompt"] for part in [held_out, *parts] for row in part]
    assert len(used) == 60 and all(row["prompt"] not in used for row in rows[:40])
    assert "40 prompts left out: they are among --eval_prompts" in capsys.readouterr().out


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


def answers(texts, defects=()):
    """Responses of one prompt; `defects`: index -> "cut" or "repeats"."""
    kind = dict(defects)
    return [
        {"text": y, "finished": kind.get(i) != "cut", "repeats": kind.get(i) == "repeats"} for i, y in enumerate(texts)
    ]


def test_defective_responses_lose_whatever_the_judge_says():
    row = answers(["2", "12", "12", "1"], {1: "cut", 2: "repeats"})  # the judge would prefer the two in the middle
    prefs = judge_prefs(DigitsJudge(), [{"prompt": user("21")}], [row])[0]
    assert prefs[0, 1] == prefs[0, 2] == prefs[3, 1] == prefs[3, 2] == 1
    assert prefs[1, 0] == prefs[1, 3] == prefs[2, 0] == 0
    assert prefs[1, 2] == prefs[2, 1] == 0.5
    alone = DigitsJudge()([user("21")], [["2", "1"]])[0]
    assert prefs[0, 3] == alone[0, 1] and torch.equal(prefs.diagonal(), torch.full((4,), 0.5))


def test_judging_many_prompts_goes_in_order():
    prompts = digit_prompts(150, seed=1)
    texts = [["".join(sorted(p[0]["content"])), "0"] for p in prompts]
    prefs = judge_prefs(DigitsJudge(), [{"prompt": p} for p in prompts], [answers(row) for row in texts])
    torch.testing.assert_close(prefs, DigitsJudge()(prompts, texts))


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (torch.tensor([[[0.5, float("nan")], [0.1, 0.5]]]), "NaN, first for prompt 65, '1'"),
        (torch.tensor([[[0.5, 0.9], [0.9, 0.5]]]), "no probabilities"),
        (torch.tensor([[[0.5, 1.5], [-0.5, 0.5]]]), "no probabilities"),
        (None, r"wanted prefs \(1, 2, 2\) or points \(1, 2\), got NoneType"),
        ("prefs", "got str"),
        (torch.full((1, 2, 3), 0.5), r"wanted prefs \(1, 2, 2\) or points \(1, 2\), got \(1, 2, 3\)"),
        (torch.full((64, 2, 2), 0.5), r"wanted prefs \(1, 2, 2\)"),
        (torch.tensor([[1.0, float("nan")]]), "neither points from 0 to 6 nor all NaN, first for prompt 65, '1'"),
        (torch.tensor([[1.0, float("inf")]]), "neither points from 0 to 6 nor all NaN"),
    ],
)
def test_a_judge_that_returns_no_preferences_is_refused(answer, message):
    """The second batch is the broken one."""

    def judge(prompts, responses):
        return torch.full((64, 2, 2), 0.5) if len(prompts) == 64 else answer

    with pytest.raises(InputError, match=message):
        judge_prefs(judge, [{"prompt": user("1")}] * 65, [answers("12")] * 65)


def test_scores_that_came_with_the_responses_stand_in_for_the_judge():
    row = [{**y, "score": s} for y, s in zip(answers("ab"), (1.0, -1.0), strict=True)]
    prefs = judge_prefs(None, [{"prompt": user("?")}], [row])
    assert prefs[0, 0, 1].item() == pytest.approx(1 / (1 + 2.718281828**-2)) and prefs[0, 1, 1] == 0.5


def test_unknown_judge_and_a_judge_without_temperature():
    with pytest.raises(InputError, match="--judge nobody: unknown; give digits, llm, pairrm"):
        common.load_judge(sppo.Args(judge="nobody"))
    for setting in ({"preference": "official"}, {"judge_temperature": 2.0}):
        with pytest.raises(InputError, match="they are PairRM's, digits has none"):
            common.load_judge(sppo.Args(**setting))


@pytest.mark.parametrize(
    ("ids", "n", "share"),
    [
        ([], 2, 0),
        ([1], 2, 0),
        ([1, 1], 2, 0),
        ([1, 1, 1], 2, 0.5),
        ([1, 2, 3, 4, 5], 1, 0),
        ([1, 2, 3, 1, 2, 3, 1, 2, 3], 3, 4 / 7),
        ([7] * 100, 8, 92 / 93),
    ],
)
def test_repeated_share_by_hand(ids, n, share):
    assert common.repeated_share(ids, n) == pytest.approx(share)


def test_repetition_is_decided_on_all_of_the_response():
    """A judge that reads the first 412 tokens sees nothing wrong with this one."""
    ids = [*range(500), *[1, 2] * 2000]
    args = sppo.Args()
    assert common.as_response(ids, "", True, args)["repeats"]
    assert not common.as_response(ids[:600], "", True, args)["repeats"]
    assert not common.as_response(ids, "", True, sppo.Args(repeat_share=0.9))["repeats"]


def test_as_many_responses_to_each_prompt():
    for rows in ([answers("12"), answers("123")], [answers("12")]):
        with pytest.raises(ValueError, match="as many responses to each of 2 prompts"):
            judge_prefs(DigitsJudge(), [{"prompt": user("1")}] * 2, rows)


def test_a_judge_is_tried_before_the_start(capsys):
    common.try_judge(DigitsJudge(), sppo.Args())
    assert capsys.readouterr().out == ""
    common.try_judge(DigitsJudge(), sppo.Args(prompts="mine.jsonl"))
    assert "for other prompts it only shows that all runs" in capsys.readouterr().out
    with pytest.raises(InputError, match="1/2 for a tie, first for prompt 1, 'Hi! It is"):
        common.try_judge(lambda prompts, responses: torch.zeros(1, 2, 2), sppo.Args())


# Win rate at equal length --------------------------------------------------------------------------------------------


def test_a_judge_that_only_likes_length_has_half_at_equal_length():
    torch.manual_seed(0)
    lengths, rivals = torch.randint(50, 400, (2, 4000)).float()
    lengths *= 1.5
    wins = 0.5 + 0.6 * (lengths - rivals) / (lengths + rivals)
    assert wins.mean() > 0.6
    assert common.equal_length_win_rate(wins, lengths, rivals)[0] == pytest.approx(0.5, abs=1e-6)
    noisy = torch.bernoulli((wins + 0.2).clamp(0, 1))  # better by 0.2, whatever the length
    reading, error = common.equal_length_win_rate(noisy, lengths, rivals)
    assert abs(reading - 0.7) < 4 * error and 0.003 < error < 0.02


def test_equal_length_win_rate_is_fair_and_is_the_mean_without_gaps():
    wins, a, b = torch.rand(50), torch.randint(1, 90, (50,)).float(), torch.randint(1, 90, (50,)).float()
    ours, theirs = common.equal_length_win_rate(wins, a, b), common.equal_length_win_rate(1 - wins, b, a)
    assert ours[0] + theirs[0] == pytest.approx(1) and ours[1] == pytest.approx(theirs[1])
    mean, error = common.equal_length_win_rate(wins, a, a)
    assert mean == pytest.approx(wins.mean().item()) and error == pytest.approx(wins.std().item() / 50**0.5)


def test_equal_length_win_rate_says_nothing_where_one_side_is_always_longer():
    a = torch.tensor([5.0, 6, 7, 8])
    assert common.equal_length_win_rate(torch.full((4,), 0.5), a + 3, a) is None
    assert common.equal_length_win_rate(torch.rand(4), a, 2 * a) is None


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
