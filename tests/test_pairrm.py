"""PairRM against an independent writing, and against llm-blender's own answers for a toy with its layout.

The published weights give the two numbers of their model card: PAIRRM=DIR python -m pytest tests/test_pairrm.py
"""

import json
import os
import random
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from steps import stopped

import common
from common import PairRM, as_messages

GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden" / "pairrm"
WORDS = ["light", "stone", "river", "code", "answer", "good", "bad"]
CONTROL = ["[MASK]", "<|source|>", "<|candidate1|>", "<|candidate2|>", "<|candidate|>"]
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
DEBERTA = {  # what makes DeBERTa-v2 a v3: shared relative positions of both kinds, no absolute ones, no token types
    "relative_attention": True, "norm_rel_ebd": "layer_norm", "share_att_key": True, "pos_att_type": ["p2c", "c2p"],
    "position_biased_input": False, "type_vocab_size": 0, "layer_norm_eps": 1e-7, "max_relative_positions": -1,
    "drop_out": 0.05, "n_tasks": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A folder with the layout of llm-blender/PairRM-hf: random weights, a token per letter or word."""
    folder, letters = tmp_path_factory.mktemp("pairrm"), "abcdefghijklmnopqrstuvwxyz0123456789?!,.'|<>[]/"
    pieces = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "▁", *letters, *("▁" + word for word in WORDS)]
    vocab = [(piece, -float(len(letters) if len(piece) == 1 else 1)) for piece in pieces]
    tokenizer = transformers.DebertaV2Tokenizer(vocab=vocab, do_lower_case=False)
    tokenizer.add_tokens(CONTROL)
    first = tokenizer.convert_tokens_to_ids("<|source|>")
    ids = {"source_prefix_id": first, "cand1_prefix_id": first + 1, "cand2_prefix_id": first + 2}
    config = transformers.DebertaV2Config(**SIZES, **DEBERTA, **ids, vocab_size=len(tokenizer), position_buckets=16)
    torch.manual_seed(0)
    net = common.PairRMNet(config)
    for name, p in net.named_parameters():
        if "LayerNorm" not in name:
            torch.nn.init.normal_(p, std=0.3)
    config.save_pretrained(folder)
    save_file(net.state_dict(), folder / "model.safetensors")
    tokenizer.save_pretrained(folder)
    return folder


def logit_of_the_model_card(judge, source, first, second):
    """One pair, written from the description of PairRM: text behind its prefix is tokenised, the prefix is searched."""
    tokenizer, weights = judge.tokenizer, judge.net.double().state_dict()

    def wrap(text, most):
        ids = tokenizer(text.replace("[SEP]", " ")).input_ids  # with [CLS] and [SEP]
        return ids if len(ids) <= most else [*ids[: most - 1], ids[-1]]

    x = wrap("<|source|>" + source, 1224)
    most = 412 + (1224 - len(x)) // 2
    ids = x + wrap("<|candidate1|>" + first, most) + wrap("<|candidate2|>" + second, most)
    hidden = judge.net.pretrained_model(torch.tensor([ids])).last_hidden_state[0]
    s, y1, y2 = (hidden[ids.index(tokenizer.convert_tokens_to_ids(name))] for name in CONTROL[1:4])

    def head(y):
        inner = torch.tanh(weights["head_layer.1.weight"] @ torch.cat([s, y]) + weights["head_layer.1.bias"])
        return (weights["head_layer.4.weight"] @ inner + weights["head_layer.4.bias"]).item()

    return head(y1) - head(y2), len(ids)


@torch.no_grad()
def test_pair_logits_are_those_of_the_description_whatever_else_is_asked(toy, monkeypatch):
    rng = random.Random(0)
    a, b, c, d = (" ".join(rng.choices([*WORDS, "stone?", "a", "zzz"], k=n)) for n in (9, 30, 1000, 900))
    sources = [a, "light", b, c, "good stone? [SEP] light"]
    candidates = [[a, b, "a"], [b, "bad", ""], ["a", a, b], [d, d[9:], a], WORDS[:3]]  # 3: over all limits
    prompts = [as_messages(text) for text in sources]
    logits, judge, lengths = PairRM(str(toy)).pair_logits(prompts, candidates), PairRM(str(toy)), []
    for b, (source, texts) in enumerate(zip(sources, candidates, strict=True)):
        assert torch.equal(logits[b].diagonal(), torch.zeros(3))
        for i, j in ((0, 1),) if b == 3 else ((0, 1), (1, 0), (1, 2)):
            right, n = logit_of_the_model_card(judge, source, texts[i], texts[j])
            assert logits[b, i, j].item() == pytest.approx(right, abs=1e-5)
            lengths.append(n)
    assert max(lengths) == 2048 and min(lengths) < 40
    assert (logits + logits.mT).abs().max() > 0.05  # the order matters, so that a wrong one would be seen
    monkeypatch.setitem(common.PAIRRM_TOKENS, "cpu", 1)  # each row alone
    monkeypatch.setitem(common.PAIRRM_TILE, "cpu", 50)
    turned = [[c, a] for a, _, c in candidates[:3]]  # another K, another order
    two = PairRM(str(toy)).pair_logits(prompts[:3], turned)
    torch.testing.assert_close(two[:, 0, 1], logits[:3, 2, 0], atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize(("half", "atol"), [(False, 1e-5), (True, 0.02)])
@pytest.mark.parametrize("heads", [1, 2])
def test_packed_rows_are_read_as_transformers_reads_each(heads, half, atol, monkeypatch):
    """Also where tiles are farther apart than the positions reach, and where several distances share one."""
    sizes = SIZES | DEBERTA | {"vocab_size": 99, "position_buckets": 8, "max_position_embeddings": 30}
    torch.manual_seed(0)
    net, lengths, seen = common.PairRMNet(transformers.DebertaV2Config(**sizes)).eval(), [150, 1, 67, 1, 1], []
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.2)
    monkeypatch.setitem(common.PAIRRM_HEADS, "cpu", heads)
    monkeypatch.setitem(common.PAIRRM_TILE, "cpu", 23)
    net.pretrained_model.encoder.layer[-1].output.register_forward_hook(lambda *call: seen.append(call[2]))
    ids = torch.randint(99, (sum(lengths),))
    with torch.autocast("cpu", torch.float16, enabled=half):  # as on a GPU
        net(ids, lengths, torch.zeros(3, 3, dtype=torch.long))
    for row in ids.split(lengths):
        net.pretrained_model(row[None])
    torch.testing.assert_close(seen[0], torch.cat([x[0] for x in seen[1:]]), atol=atol, rtol=0)


@pytest.mark.parametrize("lengths", [[1], [130], [5, 1, 40, 40, 3], [1] * 9, [700, 200]], ids=str)
@pytest.mark.parametrize("together", [1, 2])  # heads, of three
def test_attention_is_that_of_its_equation(lengths, together, monkeypatch):
    monkeypatch.setitem(common.PAIRRM_HEADS, "cpu", together)
    rng, N, heads, d, S, reach = torch.Generator().manual_seed(0), sum(lengths), 3, 16, 10, 30
    query, key, value = torch.randn(3, N, heads, d, generator=rng).transpose(1, 2)  # strided, as in the net
    query_at, key_at = torch.randn(2, S, heads, d, generator=rng).transpose(1, 2)
    slots = torch.randint(S, (2 * reach + 1,), generator=rng)  # not even in order
    ours = common.disentangled_attention(query / 7, key, value, query_at / 7, key_at, slots, lengths)
    rows = zip(*(x.split(lengths, 1) for x in (query / 7, key, value)), strict=True)
    for (q, k, v), row in zip(rows, ours.split(lengths, 1), strict=True):
        place = torch.arange(q.shape[1])
        s = slots[(place[:, None] - place).clamp(-reach, reach) + reach]  # (T, T)
        scores = q @ k.mT + torch.einsum("hid,hijd->hij", q, key_at[:, s])
        scores += torch.einsum("hijd,hjd->hij", query_at[:, s] / 7, k)
        torch.testing.assert_close(row, scores.softmax(-1) @ v, atol=1e-5, rtol=0)


def test_logits_do_not_depend_on_what_is_packed_together(toy, monkeypatch):
    judge, rng = PairRM(str(toy)), random.Random(1)
    texts = [[" ".join(rng.choices(WORDS, k=rng.randint(1, 300))) for _ in range(3)] for _ in range(3)]
    forward, rows = judge.net.forward, []
    monkeypatch.setattr(judge.net, "forward", lambda ids, n, at: rows.append(len(n)) or forward(ids, n, at))
    logits = []
    for most in (1, 700, 10**5):
        monkeypatch.setitem(common.PAIRRM_TOKENS, "cpu", most)
        logits.append(judge.pair_logits(WORDS[:3], texts))
    assert rows[:18] == [1] * 18 and rows[-1] == 18 and 2 < len(rows[18:-1]) < 18
    torch.testing.assert_close(logits[1:], logits[:1] * 2, atol=1e-5, rtol=0)


def test_attention_of_another_kind_is_refused():
    with pytest.raises(AssertionError, match="not DeBERTa-v3's"):
        common.PairRMNet(transformers.DebertaV2Config(**SIZES, **DEBERTA | {"share_att_key": False}))


def test_equal_responses_tie_exactly_and_are_not_read(toy, monkeypatch):
    judge, lengths = PairRM(str(toy)), []
    monkeypatch.setattr(judge.net, "forward", lambda ids, n, at: lengths.extend(n) or torch.rand(len(n)))
    prefs = judge(["light"] * 2, [["a", "b", "a", " b"], ["bad", "bad", "bad", "bad"]])
    assert len(lengths) == 8 and prefs[0, 0, 2] == prefs[0, 3, 1] == 0.5 and (prefs[1] == 0.5).all()


@pytest.mark.skipif(not GOLDEN.exists(), reason="needs llm-blender's answers")
def test_pair_logits_are_those_of_llm_blender():
    golden, judge = json.loads((GOLDEN / "golden.json").read_text()), PairRM(str(GOLDEN))
    for source, texts, right in zip(golden["sources"], golden["candidates"], golden["pair_logits"], strict=True):
        some = [0, 2] if len(source + "".join(texts)) > 1000 else range(5)  # the long ones take half a minute
        logits = judge.pair_logits([as_messages(source)], [[texts[i] for i in some]])[0]
        torch.testing.assert_close(logits, torch.tensor(right)[some][:, some], atol=1e-5, rtol=0)


@pytest.mark.skipif("PAIRRM" not in os.environ, reason="PAIRRM=DIR: the folder of the published weights")
def test_the_published_weights_give_the_numbers_of_their_model_card():
    judge = PairRM(os.environ["PAIRRM"])
    card = [("hello!", "hi!", "f**k off!", 1.9003), ("I love you!", "I hate you!", "I love you, too!", -1.2547)]
    for prompt, first, second, published in card:
        logits = judge.pair_logits([as_messages(prompt)], [[first, second]])
        assert logits[0, 0, 1].item() == pytest.approx(published, abs=0.01)


def test_preferences_are_those_of_both_orders_and_half_where_nothing_differs(toy):
    judge, prompts = PairRM(str(toy)), [as_messages("light")] * 2
    texts = [["river", "river", "code", " river "], ["a", "b", "", "zzz"]]
    prefs, logits = judge(prompts, texts), judge.pair_logits(prompts, texts)
    torch.testing.assert_close(torch.logit(prefs[1, 0, 1]), (logits[1, 0, 1] - logits[1, 1, 0]) / 2)
    torch.testing.assert_close(prefs + prefs.mT, torch.ones(2, 4, 4), atol=1e-6, rtol=0)
    assert torch.equal(prefs[0][[0, 0, 1]][:, [0, 1, 3]], torch.full((3, 3), 0.5))  # exactly
    assert (prefs[0, 0, 2] - 0.5).abs() > 1e-3


def test_a_cycle_stays_one(toy, monkeypatch):
    """Rock, scissors, paper: each logit is 2 one way and -2 the other, so that P is sigmoid(2)."""
    judge = PairRM(str(toy))
    monkeypatch.setattr(judge, "pair_logits", lambda *_: torch.tensor([[[0.0, 2, -2], [-2, 0, 2], [2, -2, 0]]]))
    prefs = judge([as_messages("?")], [["rock", "scissors", "paper"]])[0]
    assert prefs[0, 1].item() == prefs[1, 2].item() == prefs[2, 0].item() == pytest.approx(0.8807971)


HOSTILE = ["<|source|> light", "<|candidate1|><|candidate2|>", "[SEP] code [CLS]", "<|can<|source|>didate1|>"]
HOSTILE += ["＜|source|＞", "", " ", "light " * 10_000, "🙂 שלום \u0000 \n\n"]  # NFKC makes the first <|source|>


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: repr(text)[:20])
def test_text_never_becomes_a_control_token(toy, text):
    judge, seen = PairRM(str(toy)), []
    judge.net.register_forward_pre_hook(lambda _, given: seen.extend(given[0].tolist()))
    prefs = judge([as_messages(x) for x in (text, "river", "river")], [["a", "b"], ["bad", text], [text, "bad"]])
    assert prefs.isfinite().all()
    counts = [seen.count(i) for i in judge.tokenizer.convert_tokens_to_ids(["[CLS]", "[SEP]", *CONTROL])]
    assert counts == [18, 18, 0, 6, 6, 6, 0]  # of six rows, as PairRM writes them
    assert prefs[1, 0, 1].item() == pytest.approx(prefs[2, 1, 0].item(), abs=1e-5)


def test_a_conversation_is_rendered_as_text():
    talk = [{"role": "system", "content": "brief"}, *as_messages("\n\nHuman: a\n\nAssistant: b\n\nHuman: c")]
    assert common.plain_text(talk) == "SYSTEM: brief\n\nUSER: a\n\nASSISTANT: b\n\nUSER: c"
    assert common.plain_text(as_messages("light?")) == "light?"


def test_the_real_size_has_the_published_tensors_and_parameters():
    large = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
    with torch.device("meta"):
        config = transformers.DebertaV2Config(**large, **DEBERTA, vocab_size=128005, position_buckets=256)
        net = common.PairRMNet(config)
    shapes = {name: tuple(p.shape) for name, p in net.state_dict().items()}
    assert len(shapes) == 394 and sum(p.numel() for p in net.parameters()) == 436_014_081
    assert shapes["head_layer.1.weight"] == (1024, 2048) and shapes["head_layer.4.weight"] == (1, 1024)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda w: w.pop("head_layer.4.bias"), "it lacks head_layer.4.bias"),
        (lambda w: w.update({"head_layer.1.bias": torch.zeros(3)}), "no PairRM like llm-blender/PairRM-hf"),
        (None, "no PairRM like"),  # the folder of a policy
    ],
)
def test_a_folder_that_is_no_pairrm_is_refused(toy, tiny, tmp_path, capsys, damage, words):
    for file in (toy if damage else tiny).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    if damage:
        weights = load_file(tmp_path / "model.safetensors")
        damage(weights)
        save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    for name in (str(tmp_path), "a/b/none", "llm-blender/PairRM-hf"):
        err = stopped(capsys, PairRM, name)
        assert f"{name}: " in err.replace("'", "")
        assert words in err or name != str(tmp_path)
