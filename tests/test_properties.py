"""Properties that hold for any input: parsers, pair rules, splits, files, and that no text becomes a control token."""

import itertools
import json
import math
import random
import types

import pytest
import torch
import transformers
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

import common
import dno
import sppo
from common import InputError, LeftOut
from test_models import byte_level_tokenizer

try:
    from scipy import stats
except ImportError:
    stats = None

settings.register_profile("plain", derandomize=True, deadline=None, max_examples=150, database=None)
settings.load_profile("plain")
pytestmark = pytest.mark.usefixtures("one_thread")

REFUSED = (LeftOut, ValueError, AttributeError, TypeError, ArithmeticError)  # what _load turns into a count or a line
SURROGATE = "\ud83d"
TEXTS = st.text(max_size=8) | st.sampled_from(
    ["", " ", "\n\nHuman: a\n\nAssistant: b", "\n\nHuman: a", "\n\nAssistant:", "N/A", "5", SURROGATE, "\0", "a\u2028b"]
)
NUMBERS = st.integers() | st.floats() | st.sampled_from([10**400, -(10**400), 1e308, -1e308, True])
JSON = st.recursive(
    st.none() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=8,
)
ROLES = st.sampled_from(["user", "assistant", "system", "", SURROGATE])
MESSAGES = st.lists(st.fixed_dictionaries({"role": ROLES, "content": TEXTS}), max_size=3)
RATINGS = st.dictionaries(TEXTS, st.fixed_dictionaries({"Rating": TEXTS | NUMBERS}) | JSON, max_size=2) | JSON
COMPLETION = st.fixed_dictionaries(
    {},
    optional={
        "response": TEXTS | JSON,
        "model": st.just("gpt-4") | TEXTS,
        "annotations": RATINGS,
        "fine-grained_score": NUMBERS | JSON,
        "overall_score": NUMBERS | JSON,
    },
)
RESPONSE = TEXTS | st.fixed_dictionaries(
    {"text": TEXTS},
    optional={
        "ids": st.lists(st.integers()) | JSON,
        "token_ids": st.lists(st.integers()) | JSON,
        "finished": st.booleans() | JSON,
        "finish_reason": st.sampled_from(["stop", "length"]) | JSON,
        "score": NUMBERS | JSON,
    },
)
ROW = st.fixed_dictionaries(
    {},
    optional={
        **dict.fromkeys(("prompt", "chosen", "rejected"), TEXTS | MESSAGES | JSON),
        **dict.fromkeys(("instruction", "input", "gold", "response", "output"), TEXTS | JSON),
        **dict.fromkeys(("score_chosen", "score_rejected"), NUMBERS | JSON),
        "completions": st.lists(COMPLETION, max_size=3) | JSON,
        "responses": st.lists(RESPONSE, max_size=3) | JSON,
        "all_generated_responses": st.lists(RESPONSE | MESSAGES, max_size=3) | JSON,
        "all_rm_scores": st.lists(NUMBERS, max_size=3) | JSON,
        "other": JSON,
    },
).map(lambda row: {name: value for name, value in row.items() if value is not None})
SOUND_ROW = st.fixed_dictionaries(  # of which more are read than refused
    {"prompt": st.text(min_size=1), "chosen": TEXTS, "rejected": TEXTS},
    optional={
        **dict.fromkeys(("score_chosen", "score_rejected"), NUMBERS),
        "responses": st.lists(RESPONSE, min_size=2, max_size=3),
        "all_rm_scores": st.lists(NUMBERS, min_size=2, max_size=2),
        "gold": TEXTS,
    },
)


def read(parser, *values):
    """What the parser makes of it, or None where it refuses in one of the ways that _load knows."""
    try:
        return parser(*values)
    except REFUSED:
        return None


def is_character(text):
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def assert_prompt(messages):
    assert isinstance(messages, list) and messages
    for message in messages:
        assert message.keys() == {"role", "content"} and {type(value) for value in message.values()} == {str}
        assert is_character(message["role"]) and is_character(message["content"])
    assert messages[-1]["role"] == "user" and messages[-1]["content"].strip()


# Parsers -------------------------------------------------------------------------------------------------------------


@given(ROW | SOUND_ROW)
def test_read_prompt(row):
    prompt = read(common.read_prompt, row)
    if prompt is not None:
        assert_prompt(prompt)


@given(ROW | SOUND_ROW)
@example({"prompt": "a", "chosen": "b", "rejected": "c", "score_chosen": 1e308, "score_rejected": -1e308})
def test_read_pair(row):
    pair = read(common.read_pair, row)
    if pair is not None:
        assert_prompt(pair.pop("prompt"))
        gap = pair.pop("gap", 0)
        assert type(gap) in (int, float) and -math.inf < gap < math.inf
        assert pair.keys() == {"chosen", "rejected"} and pair["chosen"] != pair["rejected"]
        assert all(isinstance(text, str) and text.strip() and is_character(text) for text in pair.values())


@given(ROW | SOUND_ROW, st.integers(1, 3))
def test_read_responses(row, k):
    found = read(common.read_responses, row, k)
    if found is not None:
        assert_prompt(found["prompt"])
        assert found.keys() == {"prompt", "responses"} and len(found["responses"]) == k
        for y in found["responses"]:
            assert {"text"} <= y.keys() <= {"text", "ids", "finished", "score"}
            assert isinstance(y["text"], str) and is_character(y["text"])
            assert isinstance(y.get("ids", []), list) and isinstance(y.get("finished", True), bool)
            assert -math.inf < y.get("score", 0) < math.inf
        assert len({"score" in y for y in found["responses"]}) == 1


@given(ROW | SOUND_ROW)
def test_read_gold(row):
    found = read(common.read_gold, row)
    if found is not None:
        assert_prompt(found["prompt"])
        assert found.keys() == {"prompt", "gold"} and found["gold"].strip() and is_character(found["gold"])


@given(JSON | MESSAGES | TEXTS)
def test_as_messages(value):
    messages = read(common.as_messages, value)
    if messages is not None:
        assert messages and all(m.keys() == {"role", "content"} for m in messages)
        assert {type(text) for m in messages for text in m.values()} == {str}
    else:
        assert not isinstance(value, str), "any text is a prompt or a transcript"


@given(st.lists(COMPLETION, max_size=4) | JSON)
def test_completion_scores(completions):
    scored = read(common.completion_scores, completions)
    if scored is not None:
        assert len(scored) != 1
        assert all(type(score) is float and math.isfinite(score) and isinstance(text, str) for score, text in scored)


@given(st.lists(st.text("ab \n\t\u3000", max_size=6), min_size=1, max_size=3), st.lists(st.text(" \n\t"), min_size=9))
def test_prompt_key_knows_words_and_not_white_space(contents, spaces):
    spaces = itertools.cycle([*spaces, " "])

    def key(contents, role="user"):
        return common.prompt_key([{"role": role, "content": content} for content in contents])

    wider = [f"{next(spaces)}{f' {next(spaces)}'.join(content.split())}{next(spaces)}" for content in contents]
    assert key(wider) == key(contents)
    assert key([*contents[:-1], contents[-1] + " c"]) != key(contents) != key([*contents, ""])
    assert key(contents, "assistant") != key(contents)


SCORES = st.sampled_from(['"id0_score": 3', '"id1_score": "5"', "“id1_score”: 6", "'id2_score': 7", '"id01_score": 1'])
REPLIES = st.lists(
    SCORES | st.sampled_from([", ", "{", "}", "{{", "<think>", "</think>", "\n", SURROGATE]) | st.text(max_size=3)
)


@given(JSON | REPLIES.map("".join), st.integers(1, 3))
@example('{"id0_score": ' + "[" * 100_000 + "}", 1)
def test_read_points(reply, n):
    points = common.read_points(reply, n)
    assert points is None or (len(points) == n and all(type(p) is int and 0 <= p <= 6 for p in points))


@given(st.lists(st.integers(0, 6), min_size=1, max_size=12), st.text("abc .:{"), st.randoms(use_true_random=False))
def test_read_points_finds_what_was_said(points, prose, rng):
    said = [(f"id{i}_score", rng.choice([p, str(p)])) for i, p in enumerate(points)]
    said += [(f"id{i}_justification", "good, because") for i in range(len(points))]
    rng.shuffle(said)
    assert common.read_points(prose.replace("{", "") + json.dumps(dict(said)), len(points)) == points


DATES = st.lists(st.sampled_from(["Mon", ",", " ", "21", "Oct", "2026", "07:28:00", "GMT", "-0000", "99", ":", "\0"]))


@given(st.none() | st.text() | st.floats().map(str) | DATES.map(" ".join) | DATES.map("".join))
@example("Wed, 21 Oct 0001 00:00:00 +2359")
@example("9" * 400)
def test_retry_after(value):
    assert type(common.retry_after(value)) is float


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("files")


SOUND_LINE = b'{"prompt": "one"}\n'


@given(
    st.binary() | st.lists(st.sampled_from([SOUND_LINE, b"[", b"]", b",", b"{", b"\xef\xbb\xbf", b"\0", b"\r", b"1"]))
)
@example([b"[" * 100_000])
def test_load_prompts_of_any_bytes(folder, content):
    path = folder / "any.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else b"".join(content))
    try:
        prompts = common.load_prompts(str(path))
    except InputError as error:
        assert str(error).startswith(f"--prompts {path}")
    else:
        assert prompts and all(prompt[-1]["content"].strip() for prompt in prompts)


# Pairs, replay, splits -----------------------------------------------------------------------------------------------

IDS = st.lists(st.integers(0, 2), min_size=1, max_size=2)


@st.composite
def candidates(draw):
    """Candidates of some prompts as dno.rank leaves them, by points or by win rates in eighths, some not judged."""
    unit, rows = draw(st.sampled_from(["points", "win_rate"])), []
    for _ in range(draw(st.integers(1, 3))):
        judged = draw(st.integers(0, 5)) > 0
        value = st.integers(0, 6) if unit == "points" else st.integers(0, 8).map(lambda n: n / 8)
        row = [{"ids": draw(IDS), unit: draw(value) if judged else None} for _ in range(draw(st.integers(2, 4)))]
        if draw(st.booleans()):
            row[-1]["teacher"] = True
        rows.append(row)
    return unit, rows


def chosen_pairs(rows, **flags):
    made, failed = dno.make_pairs([{"prompt": b} for b in range(len(rows))], rows, dno.Args(**flags))
    return {(row["prompt"], *map(id, row["responses"])): row for row in made}, len(made), sum(failed.values())


@given(candidates(), st.integers(0, 6), st.integers(0, 6), st.integers(0, 6), st.sampled_from(["contrastive", "exact"]))
def test_dno_pairs_keep_the_rules(found, least, margin, student_margin, loss):
    unit, rows = found
    flags = {"min_score": least, "margin": margin, "student_margin": student_margin, "loss": loss}
    flags |= {"min_win_rate": least / 8, "win_rate_margin": margin / 8}
    step = {"points": (least, margin, student_margin), "win_rate": (least / 8, margin / 8, margin / 16)}[unit]
    sets = {}
    for kind in ("all", "dno", "restrictive", "spin"):
        sets[kind], made, failed = chosen_pairs(rows, pairs=kind, **flags)
        assert made == len(sets[kind]) and made + failed == sum(math.comb(len(row), 2) for row in rows)
    assert sets["restrictive"].keys() <= sets["dno"].keys() <= sets["all"].keys()
    assert sets["spin"].keys() <= sets["all"].keys()
    wanted = 0
    for row in rows:
        for a, b in itertools.combinations(row, 2):
            tied = a[unit] == b[unit] and loss == "contrastive"
            wanted += a[unit] is not None and a["ids"] != b["ids"] and not tied
    assert len(sets["all"]) == wanted
    for kind, pairs in sets.items():
        for row in pairs.values():
            better, worse = row["responses"]
            assert better["ids"] != worse["ids"] and better[unit] >= worse[unit]
            assert better[unit] > worse[unit] or loss == "exact"
            assert row["kind"].startswith("teacher" if "teacher" in better else "student")
            if kind in ("restrictive", "spin"):
                assert "teacher" in better and "teacher" not in worse
            if kind in ("dno", "restrictive") and loss == "contrastive":
                assert better[unit] >= step[0]
                assert better[unit] - worse[unit] >= (step[1] if "teacher" in better else step[2])


@st.composite
def fair_prefs(draw):
    """prefs (B, K, K) with P + P^T = 1, some of them 0 or 1."""
    b, k = draw(st.integers(1, 3)), draw(st.integers(2, 4))
    prefs = torch.full((b, k, k), 0.5)
    for n in range(b):
        for i, j in itertools.combinations(range(k), 2):
            prefs[n, i, j] = draw(st.integers(0, 16)) / 16
            prefs[n, j, i] = 1 - prefs[n, i, j]
    return prefs


@given(fair_prefs(), st.data(), st.sampled_from(["extremes", "all"]), st.sampled_from(["half", "estimate"]))
def test_sppo_pairs_are_the_best_and_the_worst(prefs, data, kind, log_z):
    b, k, _ = prefs.shape
    responses = [[{"ids": data.draw(IDS)} for _ in range(k)] for _ in range(b)]
    args = sppo.Args(pairs=kind, log_z=log_z)
    rows = {row["n"]: row for row in sppo.make_pairs([{"n": n} for n in range(b)], responses, prefs, args)}
    for n in range(b):
        scores = []
        for i in range(k):
            clamped = [min(max(p, 1e-6), 1 - 1e-6) for p in prefs[n, i].tolist()]
            scores.append(sum(math.log(p / (1 - p)) for p in clamped) / k)
        if n in rows:
            by_id = {id(y): score for y, score in zip(responses[n], scores, strict=True)}
            order = [by_id[id(y)] for y in rows[n]["responses"]]
            assert order[0] >= max(scores) - 1e-4 and order[-1] <= min(scores) + 1e-4
            assert len(order) == (k if kind == "all" else 2)
            assert all(a >= b - 1e-4 for a, b in itertools.pairwise(order))
            assert rows[n]["responses"][0]["ids"] != rows[n]["responses"][-1]["ids"]
            assert 0 < rows[n]["log_z"] <= args.eta
        else:
            distinct = len({tuple(y["ids"]) for y in responses[n]}) == k
            assert max(scores) - min(scores) < 1e-4 or not distinct


@given(st.integers(0, 40), st.lists(st.integers(0, 60), max_size=4), st.integers(0, 99))
def test_replay_keeps_its_shares(new, earlier, percent):
    rows = [[(t, n) for n in range(size)] for t, size in enumerate(earlier)]
    fresh, share = [("new", n) for n in range(new)], percent / 100
    pairs = dno.with_replay(fresh, rows, share, random.Random(0))
    assert pairs[:new] == fresh and len(set(pairs)) == len(pairs)
    for t, size in enumerate(earlier):
        count = sum(pair[0] == t for pair in pairs)
        most = int(share / 2 ** (len(earlier) - 1 - t) * len(pairs))
        assert count == min(size, most), "as many as the share allows, and no more"


@given(st.sets(st.integers(0, 10**4), max_size=40), st.integers(1, 4), st.integers(2, 9), st.data())
def test_splits_are_disjoint_and_whole(numbers, iterations, n_eval, data):
    prompts = [{"prompt": [{"role": "user", "content": f"{n} "}]} for n in sorted(numbers)]
    asked = data.draw(st.lists(st.sampled_from(prompts), max_size=5)) if prompts else []
    left = len(prompts) - len({row["prompt"][0]["content"] for row in asked})
    try:
        parts, held_out = common.split_prompts(prompts, iterations, n_eval, 1, asked)
    except InputError:
        assert left // 4 < 2 or left - min(n_eval, left // 4) < iterations
        return
    used = [row["prompt"][0]["content"] for part in [held_out, *parts] for row in part]
    assert len(set(used)) == len(used) and not set(used) & {row["prompt"][0]["content"] for row in asked}
    assert len(held_out) == min(n_eval, left // 4) and len({len(part) for part in parts}) == 1
    assert 0 <= left - len(used) < iterations, "only what does not divide is left over"


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 9)), max_size=20), st.integers(1, 60), st.booleans())
def test_micro_batches_are_a_partition_within_the_budget(rows, budget, shares):
    policy = types.SimpleNamespace(_shares_prompts=shares)
    prompts, responses = [[n] * (n + 1) for n, _ in rows], [[0] * size for _, size in rows]
    batches = common.micro_batches(policy, prompts, responses, budget)
    assert sorted(itertools.chain(*batches)) == list(range(len(rows)))
    for batch in batches:
        groups = []
        for i in batch:  # neighbours with the same prompt share it, if the policy can
            if shares and groups and groups[-1][-1] == i - 1 and prompts[i] == prompts[i - 1]:
                groups[-1].append(i)
            else:
                groups.append([i])
        sizes = [len(prompts[group[0]]) + sum(len(responses[i]) for i in group) for group in groups]
        assert len(groups) == 1 or len(groups) * max(sizes) <= budget
        for i in batch:
            assert not (shares and i and prompts[i] == prompts[i - 1]) or i - 1 in batch


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 9), st.integers(1, 9)), max_size=9), st.integers(1, 60))
def test_micro_batches_of_pairs_keep_pairs_together(pairs, budget):
    prompts = [[n] * (n + 1) for n, _, _ in pairs for _ in range(2)]
    responses = [[0] * size for _, *sizes in pairs for size in sizes]
    for shares in (True, False):
        policy = types.SimpleNamespace(_shares_prompts=shares)
        batches = common.micro_batches(policy, prompts, responses, budget, pairs=True)
        assert sorted(itertools.chain(*batches)) == list(range(len(prompts)))
        assert all(b == a + 1 and a % 2 == 0 for batch in batches for a, b in zip(batch[::2], batch[1::2], strict=True))
        for batch in [] if shares else batches:
            longest = max(len(prompts[i]) + len(responses[i]) for i in batch)
            assert len(batch) == 2 or len(batch) * longest <= budget


# Small functions -----------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 5), max_size=9), st.sets(st.integers(0, 5), max_size=3))
def test_cut_response(ids, ends):
    cut = common.cut_response(ids, ends)
    assert cut.ids == ids[: len(cut.ids)] and cut.finished == bool(set(ids) & ends)
    assert not set(cut.ids[:-1]) & ends if cut.finished else cut.ids == ids
    assert not cut.finished or cut.ids[-1] in ends


@given(st.lists(st.integers(0, 2), max_size=30), st.integers(1, 5))
def test_repeated_share(ids, n):
    share, seen, repeated = common.repeated_share(ids, n), [], 0
    for i in range(len(ids) - n + 1):
        repeated += ids[i : i + n] in seen
        seen.append(ids[i : i + n])
    assert 0 <= share < 1 and share == pytest.approx(repeated / max(1, len(seen)))


@given(st.lists(st.tuples(st.floats(0, 1), st.integers(1, 99), st.integers(1, 99)), max_size=9))
def test_equal_length_win_rate_is_a_probability(rows):
    wins, mine, theirs = torch.tensor(rows, dtype=torch.float).view(-1, 3).unbind(1)
    reading = common.equal_length_win_rate(wins, mine, theirs)
    if reading is not None:
        assert len(rows) > 2 and 0 <= reading[0] <= 1 and reading[1] >= 0
        assert not (mine > theirs).all() and not (mine < theirs).all()


@given(st.data(), st.booleans())
def test_as_prefs_is_fair_and_the_defective_lose(data, by_points):
    opinion = data.draw(fair_prefs())
    b, k, _ = opinion.shape
    if by_points:
        points = st.lists(st.integers(0, 6), min_size=k, max_size=k) | st.just([math.nan] * k)
        opinion = torch.tensor(data.draw(st.lists(points, min_size=b, max_size=b)), dtype=torch.float)
    flags = st.fixed_dictionaries({"finished": st.booleans(), "repeats": st.booleans()})
    responses = [[data.draw(flags) for _ in range(k)] for _ in range(b)]
    prefs = common.as_prefs(opinion, responses)
    assert torch.equal(prefs + prefs.mT, torch.ones(b, k, k))
    for n, i, j in itertools.product(range(b), range(k), range(k)):
        sound = [responses[n][m]["finished"] and not responses[n][m]["repeats"] for m in (i, j)]
        if not all(sound):
            assert prefs[n, i, j] == (1 + sound[0] - sound[1]) / 2
        elif by_points and not opinion[n].isnan().any():
            assert (
                prefs[n, i, j]
                == (1 + (opinion[n, i] > opinion[n, j]).int() - (opinion[n, i] < opinion[n, j]).int()) / 2
            )


def rank(values, x):
    return sum(v < x for v in values) + (sum(v == x for v in values) + 1) / 2


def pearson(x, y):
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    dx, dy = [a - mean_x for a in x], [b - mean_y for b in y]
    product = sum(a * b for a, b in zip(dx, dy, strict=True))
    return product / math.sqrt(sum(a * a for a in dx) * sum(b * b for b in dy))


@given(st.lists(st.tuples(st.integers(-5, 5), st.integers(-5, 5)), min_size=3, max_size=12))
def test_correlations_are_those_of_plain_loops(rows):
    x, y = zip(*rows, strict=True)
    assume(len(set(x)) > 1 and len(set(y)) > 1)
    found = common.correlations(torch.tensor(x, dtype=torch.float), torch.tensor(y, dtype=torch.float))
    agree, pairs_x, pairs_y = 0, 0, 0
    for (a, b), (c, d) in itertools.combinations(rows, 2):
        agree += ((a > c) - (a < c)) * ((b > d) - (b < d))
        pairs_x, pairs_y = pairs_x + (a != c), pairs_y + (b != d)
    right = {
        "pearson": pearson(x, y),
        "spearman": pearson([rank(x, v) for v in x], [rank(y, v) for v in y]),
        "kendall": agree / math.sqrt(pairs_x * pairs_y),
    }
    assert found == pytest.approx(right, abs=1e-9)
    if stats:
        theirs = {"pearson": stats.pearsonr, "spearman": stats.spearmanr, "kendall": stats.kendalltau}
        assert found == pytest.approx({name: test(x, y)[0] for name, test in theirs.items()}, abs=1e-9)


# Files ---------------------------------------------------------------------------------------------------------------

FINITE = st.floats(allow_nan=False, allow_infinity=False)
JSON_TEXTS = st.lists(
    st.text(max_size=3) | st.sampled_from([SURROGATE, "\udfff", "\u2028", "\x85", "\r\n", "\0", "\\u"])
)
JSON_ROW = st.dictionaries(
    JSON_TEXTS.map("".join), st.none() | st.booleans() | st.integers() | FINITE | JSON_TEXTS.map("".join), max_size=3
).map(lambda row: json.loads(json.dumps(row)))  # two halves side by side are one character to JSON


@given(st.lists(JSON_ROW, max_size=5))
def test_what_write_jsonl_writes_read_jsonl_reads(folder, rows):
    common.write_jsonl(folder / "rows.jsonl", rows)
    assert common.read_jsonl(folder / "rows.jsonl") == rows
    common.write_json(folder / "rows.json", rows)
    assert json.loads((folder / "rows.json").read_text(encoding="utf-8")) == rows


@given(st.lists(JSON_ROW, max_size=7), st.integers(0, 9), st.integers(0, 7))
def test_a_stage_is_made_once_in_chunks_and_goes_on_after_an_error(folder, items, chunk, fails_at):
    path, asked = folder / "stage.jsonl", []
    for old in folder.glob("stage*"):
        old.unlink()

    def make(rows):
        asked.extend(map(id, rows))
        if len(asked) > fails_at:
            raise RuntimeError("killed")
        return [{"made": row} for row in rows]

    right = [{"made": row} for row in items]
    try:
        assert common.stage(path, items, make, chunk) == right
    except RuntimeError:
        assert not path.exists()
        kept = set(asked[: fails_at // chunk * chunk]) if chunk else set()
        again = []
        assert common.stage(path, items, lambda rows: again.extend(map(id, rows)) or make_all(rows), chunk) == right
        assert not kept & set(again), "whole chunks are not made again"
    assert common.stage(path, items, None, chunk) == right and [p.name for p in folder.glob("stage*")] == [path.name]


def make_all(rows):
    return [{"made": row} for row in rows]


# No text becomes a control token -------------------------------------------------------------------------------------

IM = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n<|turn|>{{ m['content'] }}<|im_end|>\n{% endfor %}<|im_start|>"
)
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|eot_id|>"]
ADDED = "<|turn|>"  # not special, but the template writes it


def chat_bpe(normalizer=None):
    """Byte-level BPE with special tokens and added ones that are none: one that the template writes, and two blanks."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=SPECIAL, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(["<|im_start|>user turn im end eot id <| |> start"] * 9, trainer)
    if normalizer:
        tokenizer.normalizer = normalizer
    names = {"eos_token": "<|im_end|>", "extra_special_tokens": SPECIAL[::2], "chat_template": IM}
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    wrapped.add_tokens([AddedToken(ADDED, normalized=bool(normalizer)), AddedToken("  ", normalized=False)])
    return wrapped


def sentencepiece_like():
    """As Mistral's and Llama-2's: blanks become ▁, one is put in front of each text, unknown letters become bytes."""
    spelled = ["<unk>", "<s>", "</s>", *(f"<0x{n:02X}>" for n in range(256)), "▁", *"abcdeimnorstu<>|/_[]", "▁a", "st"]
    model = models.BPE({token: i for i, token in enumerate(spelled)}, [("▁", "a"), ("s", "t")], unk_token="<unk>",
                       byte_fallback=True, fuse_unk=True)  # fmt: skip
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    blanks = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(blanks)
    template = "{{ bos_token }}{% for m in messages %}[{{ m['content'] }}]{{ eos_token }}{% endfor %}"
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template, **names)


FAMILIES = {
    "letters": (common.tiny_tokenizer, False),  # what is no ASCII is <unk>
    "byte-level": (byte_level_tokenizer, True),
    "chat": (chat_bpe, True),
    "chat, NFKC": (lambda: chat_bpe(normalizers.NFKC()), False),
    "sentencepiece": (sentencepiece_like, True),
}
TOKENIZERS = {}


def family(name):
    if name not in TOKENIZERS:
        tokenizer = FAMILIES[name][0]()
        control = {i: t.content for i, t in tokenizer.added_tokens_decoder.items() if t.special or t.content == ADDED}
        control.pop(tokenizer.unk_token_id, None)  # what is in no vocabulary is <unk>, which says nothing
        TOKENIZERS[name] = tokenizer, control
    return TOKENIZERS[name]


def pieces_of(name):
    """Spellings of control tokens, their beginnings and ends, look-alikes, letters and blanks."""
    spelled = list(family(name)[1].values())
    parts = [token[:n] for token in spelled for n in range(1, len(token))]
    parts += [token[n:] for token in spelled for n in range(1, len(token))]
    wide = ["".join(chr(ord(letter) + 0xFEE0) for letter in token) for token in spelled]  # what NFKC makes narrow
    marks = ["\ue000", "\ue0000\ue001", "  ", " ", "\n", "é", "☃"]
    return (
        st.sampled_from(spelled)
        | st.sampled_from(parts)
        | st.sampled_from(wide + marks)
        | st.text("ab <|>/_", max_size=3)
    )


@pytest.mark.parametrize("name", FAMILIES)
@given(data=st.data())
@settings(max_examples=120)
def test_no_text_becomes_a_control_token(name, data):
    tokenizer, control = family(name)
    text = "".join(data.draw(st.lists(pieces_of(name), max_size=8)))
    found = [control[i] for i in common.encode_text(tokenizer, text) if i in control]
    assert found == [], text


@pytest.mark.parametrize("turns", [1, 3])
@pytest.mark.parametrize("name", FAMILIES)
@given(data=st.data())
@settings(max_examples=80)
def test_the_template_alone_writes_control_tokens(name, turns, data):
    tokenizer, control = family(name)
    roles = ["user", "assistant"] * turns
    texts = ["".join(data.draw(st.lists(pieces_of(name), max_size=6))) for _ in range(turns)]

    def control_of(texts):
        messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
        return [control[i] for i in common.encode(tokenizer, messages) if i in control]

    right = control_of(["a"] * turns)
    assert right and control_of(texts) == right, texts


@pytest.mark.parametrize("name", [name for name, (_, lossless) in FAMILIES.items() if lossless])
@given(data=st.data())
@settings(max_examples=120)
def test_all_of_a_text_is_still_there(name, data):
    tokenizer, _ = family(name)
    text = "".join(data.draw(st.lists(pieces_of(name), max_size=8)))
    assert tokenizer.decode(common.encode_text(tokenizer, text)) == text
