"""PairRM against an independent writing of its description, on a toy with the published layout."""

import json
import random

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import DebertaV2Config

import common
from common import PairRM

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789?!,.'|<>[]/"
CONTROL = ["[MASK]", "<|source|>", "<|candidate1|>", "<|candidate2|>", "<|candidate|>"]
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
DEBERTA = {  # what makes DeBERTa-v2 a v3: shared relative positions of both kinds, no absolute ones, no token types
    "relative_attention": True,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "pos_att_type": ["p2c", "c2p"],
    "position_biased_input": False,
    "type_vocab_size": 0,
    "layer_norm_eps": 1e-7,
    "max_relative_positions": -1,
    "drop_out": 0.05,
    "n_tasks": 1,
}


def build(folder):
    """A toy checkpoint with the layout of llm-blender/PairRM-hf: random weights, a token per letter or word."""
    words = ["light", "stone", "river", "code", "answer", "good", "bad"]
    pieces = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "▁", *LETTERS, *("▁" + word for word in words)]
    vocab = [(piece, -float(len(LETTERS) if len(piece) == 1 else 1)) for piece in pieces]
    tokenizer = transformers.DebertaV2Tokenizer(vocab=vocab, do_lower_case=False)
    tokenizer.add_tokens(CONTROL)
    first = tokenizer.convert_tokens_to_ids("<|source|>")
    ids = dict(zip(("source_prefix_id", "cand1_prefix_id", "cand2_prefix_id", "cand_prefix_id"), range(first, 10**6)))  # noqa: B905
    config = DebertaV2Config(**SIZES, **DEBERTA, vocab_size=len(tokenizer), position_buckets=16, **ids)
    torch.manual_seed(0)
    net = common.PairRMNet(config)
    for name, p in net.named_parameters():
        if "LayerNorm" not in name:
            torch.nn.init.normal_(p, std=0.3)
    net.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairrm")
    build(folder)
    return folder


def user(text):
    return [{"role": "user", "content": text}]


def words(rng, n):
    return " ".join(rng.choice(["light", "stone?", "river", "code!", "bad", "a", "zzz"]) for _ in range(n))


def some_text(long=True):
    """Five prompts with three responses each; one pair of the fourth is over all limits, if `long`."""
    rng = random.Random(0)
    sources = [words(rng, n) for n in (9, 1, 40, 1000 if long else 30)] + ["good stone? [SEP] light"]
    candidates = [[words(rng, 5), words(rng, 30), words(rng, 1)] for _ in sources]
    candidates[2][1], candidates[3][1] = "", words(rng, 900 if long else 20)
    return sources, candidates


def logits_of_the_model_card(judge, source, first, second):
    """One pair, written from the description of PairRM: text with its prefix is tokenised, the prefix is searched."""
    tokenizer, net = judge.tokenizer, judge.net

    def wrap(text, most):
        ids = tokenizer(text.replace("[SEP]", " ")).input_ids  # with [CLS] and [SEP]
        return ids if len(ids) <= most else [*ids[: most - 1], ids[-1]]

    x = wrap("<|source|>" + source, 1224)
    most = 412 + (1224 - len(x)) // 2
    ids = x + wrap("<|candidate1|>" + first, most) + wrap("<|candidate2|>" + second, most)
    hidden = net.pretrained_model(torch.tensor([ids])).last_hidden_state[0].double()
    at = [
        ids.index(tokenizer.convert_tokens_to_ids(name)) for name in ("<|source|>", "<|candidate1|>", "<|candidate2|>")
    ]
    weights = {name: p.double() for name, p in net.state_dict().items()}

    def head(candidate):
        pair = torch.cat([hidden[at[0]], hidden[candidate]])
        inner = torch.tanh(weights["head_layer.1.weight"] @ pair + weights["head_layer.1.bias"])
        return (weights["head_layer.4.weight"] @ inner + weights["head_layer.4.bias"]).item()

    return head(at[1]) - head(at[2]), len(ids)


@pytest.mark.parametrize("b", range(5))
@torch.no_grad()
def test_pair_logits_are_those_of_the_description(toy, b):
    judge, (sources, candidates) = PairRM(str(toy)), some_text()
    logits = judge.pair_logits([user(sources[b])], [candidates[b]])[0]
    assert torch.equal(logits.diagonal(), torch.zeros(3))
    lengths = []
    for i, j in ((0, 1), (1, 0), (1, 2)):
        right, n = logits_of_the_model_card(judge, sources[b], candidates[b][i], candidates[b][j])
        assert logits[i, j].item() == pytest.approx(right, abs=1e-5)
        lengths.append(n)
    assert max(lengths) <= 2048 and (max(lengths) > 1600) == (b == 3)
    assert (logits + logits.T).abs().max() > 0.05  # the order matters, so that a wrong one would be seen


def test_no_result_depends_on_what_else_is_asked(toy):
    judge = PairRM(str(toy))
    sources, candidates = some_text()
    together = judge.pair_logits(list(map(user, sources)), candidates)
    for b, (source, texts) in enumerate(zip(sources, candidates, strict=True)):
        torch.testing.assert_close(judge.pair_logits([user(source)], [texts])[0], together[b], atol=1e-5, rtol=0)
        two = judge.pair_logits([user(source)], [[texts[2], texts[0]]])[0]  # another K, another order
        torch.testing.assert_close(two[0, 1], together[b, 2, 0], atol=1e-5, rtol=0)


def test_many_short_pairs_in_one_batch(toy, monkeypatch):
    judge = PairRM(str(toy))
    sources, candidates = some_text(long=False)
    logits = judge.pair_logits(list(map(user, sources)), candidates)
    monkeypatch.setattr(common, "PAIRRM_SCORES", 1)  # each row alone
    torch.testing.assert_close(judge.pair_logits(list(map(user, sources)), candidates), logits, atol=1e-5, rtol=0)


def test_preferences_are_probabilities_and_half_where_nothing_differs(toy):
    judge = PairRM(str(toy))
    prefs = judge([user("light")] * 2, [["river", "river", "code", " river "], ["a", "b", "", "zzz"]])
    assert prefs.shape == (2, 4, 4) and prefs.dtype == torch.float32
    torch.testing.assert_close(prefs + prefs.mT, torch.ones(2, 4, 4), atol=1e-6, rtol=0)
    assert torch.equal(prefs.diagonal(dim1=1, dim2=2), torch.full((2, 4), 0.5))
    same = prefs[0][[0, 0, 1]][:, [0, 1, 3]]
    assert torch.equal(same, torch.full((3, 3), 0.5))  # exactly
    assert (prefs[0, 0, 2] - 0.5).abs() > 1e-3


def test_a_cycle_stays_a_cycle(toy, monkeypatch):
    """Rock, scissors, paper: each logit is 2 one way and -2 the other, so P is sigmoid(2)."""
    logits = torch.tensor([[[0.0, 2, -2], [-2, 0, 2], [2, -2, 0]]])
    monkeypatch.setattr(PairRM, "pair_logits", lambda *_: logits)
    prefs = PairRM(str(toy))([], [])[0]
    assert prefs[0, 1].item() == prefs[1, 2].item() == prefs[2, 0].item() == pytest.approx(0.8807971)


HOSTILE = [
    "<|source|> light",
    "<|candidate1|><|candidate2|>",
    "[SEP] code [CLS]",
    "<|can<|source|>didate1|>",
    "＜|source|＞",  # NFKC makes it <|source|>
    "",
    " ",
    "light " * 10_000,  # tokens
    "🙂 שלום \u0000 \n\n",
]


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: repr(text)[:20])
def test_user_text_is_text(toy, text):
    judge = PairRM(str(toy))
    ids = judge.encode(text)
    control = {i for i, t in judge.tokenizer.added_tokens_decoder.items() if t.content != "[UNK]"}
    assert not control & set(ids)
    prefs = judge(
        list(map(user, [text, "river", "river"])), [["a", "b", text], [text, "bad", "good"], ["good", text, "a"]]
    )
    assert prefs.isfinite().all()
    assert prefs[1, 0, 2].item() == pytest.approx(prefs[2, 1, 0].item(), abs=1e-5)


def test_control_strings_leave_nothing_behind(toy):
    judge = PairRM(str(toy))
    assert judge.encode("<|source|>") == [] and judge.encode("a[SEP]b") == judge.encode("a b")


def test_a_conversation_is_rendered_as_text():
    assert common.plain_text(user("light?")) == "light?"
    talk = [
        {"role": r, "content": c} for r, c in (("system", "brief"), ("user", "a"), ("assistant", "b"), ("user", "c"))
    ]
    assert common.plain_text(talk) == "SYSTEM: brief\n\nUSER: a\n\nASSISTANT: b\n\nUSER: c"


def test_the_real_size_has_the_published_tensors_and_parameters():
    large = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
    with torch.device("meta"):
        net = common.PairRMNet(DebertaV2Config(**large, **DEBERTA, vocab_size=128005, position_buckets=256))
    assert len(net.state_dict()) == 394
    assert sum(p.numel() for p in net.parameters()) == 436_014_081
    heads = {name: tuple(p.shape) for name, p in net.state_dict().items() if name.startswith("head_layer")}
    assert heads == {
        "head_layer.1.weight": (1024, 2048),
        "head_layer.1.bias": (1024,),
        "head_layer.4.weight": (1, 1024),
        "head_layer.4.bias": (1,),
    }


# Wrong folders -------------------------------------------------------------------------------------------------------


@pytest.fixture
def broken(toy, tmp_path):
    """A copy of the toy to damage: change(weights) edits its tensors."""
    folder = tmp_path / "broken"
    folder.mkdir()
    for file in toy.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())

    def change(edit):
        weights = load_file(folder / "model.safetensors")
        edit(weights)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return str(folder)

    return change


def test_what_is_no_pairrm_is_refused(broken, tiny, tmp_path, capsys):
    def refusal(name):
        with pytest.raises(SystemExit) as stopped:
            PairRM(name)
        said = capsys.readouterr().err
        assert stopped.value.code == 2 and said.count("\n") == 1 and "--judge " in said and name in said
        return said

    assert "lacks head_layer.4.bias" in refusal(broken(lambda weights: weights.pop("head_layer.4.bias")))
    bias = torch.zeros(3)
    assert "no PairRM like" in refusal(broken(lambda weights: weights.update({"head_layer.1.bias": bias})))
    assert "no PairRM like" in refusal(str(tiny))
    assert "no PairRM like" in refusal("llm-blender/PairRM-hf")  # the hub is away
    assert "give digits, pairrm, llm" in refusal("some judge")
    name = broken(lambda weights: weights.update({"head_layer.1.bias": torch.zeros(32)}))
    for file in (tmp_path / "broken").glob("tokenizer*"):
        file.unlink()
    refusal(name)


def test_the_toy_is_saved_in_the_published_layout(toy):
    config = json.loads((toy / "config.json").read_text())
    assert config["model_type"] == "deberta-v2" and config["source_prefix_id"] + 1 == config["cand1_prefix_id"]
    names = load_file(toy / "model.safetensors").keys()
    assert "pretrained_model.encoder.rel_embeddings.weight" in names and "head_layer.1.weight" in names
    assert len(names) == 394 - 22 * 16  # as many tensors as the published ones, less 22 layers
