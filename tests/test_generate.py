"""Sampling: against a writing without a cache, against transformers' generate, and against exact probabilities."""

import functools
import gc
import random
import weakref

import pytest
import torch
import transformers as hf
from torch.fx.experimental.proxy_tensor import make_fx

import common
from common import check_architecture, generate, head_logits, head_of, sample_tokens, uniforms

HAS_TRITON = pytest.mark.skipif(not common.triton, reason="triton is for Linux only")
V = 67
EOS = list(range(0, V, 17))  # four ids, so that some responses end and some are cut
MIXED = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
SIZES = {
    "vocab_size": V, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 160, "pad_token_id": 0, "bos_token_id": None,
    "eos_token_id": None, "initializer_range": 0.3,  # far from uniform: a wrong mask or position changes the samples
}  # fmt: skip
HEADS_OF_8 = {"head_dim": 8, "query_pre_attn_scalar": 8}
SOFTCAPS = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 10.0}
FAMILIES = {  # grouped-query attention in most; all windows are shorter than the sequences
    "llama": (hf.LlamaConfig, {}),
    "mistral-window": (hf.MistralConfig, {"sliding_window": 6}),
    "qwen3-mixed": (hf.Qwen3Config, {"head_dim": 8, "use_sliding_window": True, **MIXED}),
    "gemma3-mixed": (hf.Gemma3TextConfig, {**HEADS_OF_8, **MIXED}),
    "gemma2-eager": (hf.Gemma2Config, {**HEADS_OF_8, **SOFTCAPS, "sliding_window": 6, "attention": "eager"}),
    "cohere-scale": (hf.CohereConfig, {"logit_scale": 0.25}),
    "gpt-neox": (hf.GPTNeoXConfig, {}),
    "gpt2": (hf.GPT2Config, {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}),  # absolute positions
}
PROMPTS = [random.Random(n).choices(range(V), k=length) for n, length in enumerate([1, 12, 5, 2, 9, 5])]


def build(config_class, settings):
    settings = {**SIZES, **settings}
    attention = settings.pop("attention", None)
    torch.manual_seed(0)
    return hf.AutoModelForCausalLM.from_config(config_class(**settings), attn_implementation=attention).eval()


@functools.cache
def make(family):
    return build(*FAMILIES[family])


@pytest.fixture(params=FAMILIES)
def policy(request):
    return make(request.param)


@pytest.fixture
def mistral():
    return make("mistral-window")


@torch.no_grad()
def generate_plain(policy, prompts, *, k, max_new_tokens, temperature=1.0, top_p=1.0, eos_ids, seed=0):
    """`generate` without a cache and without slots: a whole forward of every row for every token."""
    out = []
    for prompt in prompts:
        noise = torch.stack([uniforms(seed, prompt, j, max_new_tokens) for j in range(k)]).to(policy.device)
        ids = torch.tensor([prompt] * k, device=policy.device)
        for n in range(max_new_tokens):
            hidden = policy.base_model(input_ids=ids, use_cache=False).last_hidden_state[:, -1]
            token = sample_tokens(head_logits(hidden, **head_of(policy)), noise[:, n], temperature, top_p)
            ids = torch.cat([ids, token[:, None]], 1)
        rows = ids[:, len(prompt) :].tolist()
        ends = [next((n for n, token in enumerate(row, 1) if token in eos_ids), max_new_tokens) for row in rows]
        out.append([row[:n] for row, n in zip(rows, ends, strict=True)])
    return out


# The same samples by three ways ---------------------------------------------------------------------------------------


def test_samples_equal_those_without_a_cache_for_any_slots_looks_and_prefills(policy, monkeypatch):
    """On a GPU a row that has ended decodes on until the next look, over keys rounded up to a bucket."""
    settings, before = {"k": 3, "max_new_tokens": 20, "eos_ids": EOS, "seed": 1}, torch.get_rng_state()
    right = generate_plain(policy, PROMPTS, **settings)
    assert {y[-1] in EOS for row in right for y in row} == {True, False}
    assert all(generate(policy, PROMPTS, **settings, slots=slots) == right for slots in (1, 4, 64))
    for looks, prefill in ((8, 1), (3, 16), (50, 64)):
        monkeypatch.setattr(common, "SYNC_EVERY", {"cpu": looks})
        monkeypatch.setattr(common, "PREFILL", prefill)
        assert generate(policy, PROMPTS, **settings, slots=4) == right, (looks, prefill)
    assert torch.equal(torch.get_rng_state(), before), "the global random numbers are left alone"


def test_greedy_equals_generate_of_transformers_and_the_architecture_is_accepted(policy):
    check_architecture(policy, "this")
    settings, right = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": EOS, "pad_token_id": 0}, []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        right.append(policy.generate(ids, attention_mask=torch.ones_like(ids), **settings)[0, len(prompt) :].tolist())
    for slots in (1, 4):
        rows = generate(policy, PROMPTS, k=2, max_new_tokens=20, temperature=0, eos_ids=EOS, slots=slots)
        assert rows == [[ids, ids] for ids in right], f"slots={slots}"


# The kernel -----------------------------------------------------------------------------------------------------------

WIDE = {"hidden_size": 96, "num_attention_heads": 6, "initializer_range": 0.15}
MORE = {  # heads that are no power of two, one for all queries, three queries to a key; a window of two blocks
    "llama-heads-of-20": (hf.LlamaConfig, {"head_dim": 20}),
    "llama-heads-of-80": (hf.LlamaConfig, {"head_dim": 80, "num_key_value_heads": 1}),
    "mistral-window-70": (hf.MistralConfig, {"sliding_window": 70, **WIDE}),
}


@HAS_TRITON
@pytest.mark.parametrize("family", [*FAMILIES, *MORE])
def test_samples_through_the_kernel_equal_those_without_a_cache(family, monkeypatch):
    policy = build(*(FAMILIES | MORE)[family])
    settings, prompts = {"k": 2, "max_new_tokens": 3, "eos_ids": EOS, "seed": 1}, [PROMPTS[1], PROMPTS[3]]
    if "window-70" in family:
        prompts = [random.Random(0).choices(range(V), k=n) for n in (130, 66)]
    right = generate_plain(policy, prompts, **settings)
    monkeypatch.setattr(common, "attend_torch", common.attend_triton)  # through Triton's interpreter
    assert generate(policy, prompts, **settings, slots=3) == right


@HAS_TRITON
@pytest.mark.parametrize("dim", [8, 20, 64, 80, 128, 256])
def test_the_kernel_and_its_twin_equal_attention_in_float64(dim):
    generator = torch.Generator().manual_seed(dim)
    pos = torch.tensor([0, 63, 64, 129, 17])[:, None, None, None]
    query, keys, values = (torch.randn(5, 2, n, dim, generator=generator) for n in (3, 140, 140))
    for row, n in enumerate(pos.flatten().tolist()):  # what a row does not see may be anything
        keys[row, :, n + 1 :], values[row, :, n + 1 :] = 1e4, 1e4
    for window, softcap in ((1, 0.0), (6, 2.0), (64, 0.0), (70, 2.0), (140, 0.0)):
        right = torch.zeros(5, 2, 3, dim, dtype=torch.float64)
        for row, n in enumerate(pos.flatten().tolist()):
            seen = slice(max(0, n + 1 - window), n + 1)
            scores = torch.einsum("hgd,hkd->hgk", query[row].double(), keys[row, :, seen].double()) * 0.2
            scores = softcap * torch.tanh(scores / softcap) if softcap else scores
            right[row] = torch.einsum("hgk,hkd->hgd", scores.softmax(-1), values[row, :, seen].double())
        for attend in (common.attend_triton, common.attend_torch):
            found = attend(query, keys, values, pos, 0.2, softcap, window)
            assert (found - right).norm() < 2e-6 * right.norm(), (attend, window, softcap)


def test_a_step_recorded_once_serves_a_whole_call(policy, monkeypatch):
    """As a CUDA graph does: Python runs once, and its operations are replayed on the same tensors ever after.

    make_fx raises where a step reads a number from a tensor, which on CUDA would wait for the device.
    """

    def attend(query, keys, values, pos, scale, softcap, window):  # attend_torch over the whole capacity
        key, scores = torch.arange(keys.shape[2]), (query * scale) @ keys.mT
        scores = torch.tanh(scores / softcap) * softcap if softcap else scores
        return scores.masked_fill((key > pos) | (key <= pos - window), -float("inf")).softmax(-1) @ values

    def capture(step, device):
        step()
        recorded.append(make_fx(lambda: step())())
        return recorded[-1]

    settings, recorded = {"k": 2, "max_new_tokens": 5, "eos_ids": EOS, "seed": 1}, []
    right = generate_plain(policy, PROMPTS, **settings)
    monkeypatch.setattr(common, "capture", capture)
    monkeypatch.setattr(common, "attend_torch", attend)
    monkeypatch.setattr(common, "SYNC_EVERY", {"cpu": 8})
    assert [generate(policy, PROMPTS, **settings, slots=slots) for slots in (3, 64)] == [right, right]
    assert len(recorded) == 2, "one graph a call"


def test_the_policy_has_its_own_attention_back_also_after_an_error(mistral, monkeypatch):
    own = mistral.config._attn_implementation
    monkeypatch.setattr(common, "attend_torch", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        generate(mistral, PROMPTS, k=1, max_new_tokens=2, eos_ids=EOS)
    assert mistral.config._attn_implementation == own == "sdpa"


# Independence ---------------------------------------------------------------------------------------------------------


def test_a_sample_depends_on_seed_prompt_and_index_alone(mistral):
    settings = {"max_new_tokens": 20, "eos_ids": EOS, "seed": 5}
    together = generate(mistral, PROMPTS, k=3, **settings)
    assert generate(mistral, PROMPTS[::-1], k=3, **settings)[::-1] == together
    assert [generate(mistral, [prompt], k=3, **settings)[0] for prompt in PROMPTS] == together
    assert [row[:3] for row in generate(mistral, PROMPTS, k=5, **settings, slots=4)] == together
    assert all(len(set(map(tuple, row))) > 1 for row in together)
    twice = generate(mistral, [PROMPTS[1], PROMPTS[2], PROMPTS[1]], k=3, **settings, slots=2)
    assert twice == [together[1], together[2], together[1]]
    others = [generate(mistral, PROMPTS, k=3, **{**settings, "seed": seed}) for seed in (6, "1 sample 2")]
    assert together != others[0] != others[1] != together


def test_the_cache_is_gone_when_generate_returns(mistral, monkeypatch):
    """Tens of gigabytes on a GPU: they cannot wait for the garbage collector."""
    keys, make_layer = [], common.slot_layer

    def spy(*args):
        layer = make_layer(*args)
        keys.append(weakref.ref(layer.keys))
        return layer

    monkeypatch.setattr(common, "slot_layer", spy)
    gc.collect()
    gc.disable()
    try:
        generate(mistral, PROMPTS, k=2, max_new_tokens=8, eos_ids=EOS, slots=4)
        assert [ref() for ref in keys] == [None] * 3
    finally:
        gc.enable()


# Statistics -----------------------------------------------------------------------------------------------------------


def exact(policy, ids, temperature, top_p=1.0):
    """The distribution of the token after `ids`, (V,) float64: softmax, then the smallest set that reaches top_p."""
    with torch.no_grad():
        probs = (policy(input_ids=torch.tensor([ids])).logits[0, -1].double() / temperature).softmax(0).tolist()
    nucleus, total = [], 0.0
    for token in sorted(range(V), key=lambda token: -probs[token]):
        if total < top_p:
            nucleus.append(token)
            total += probs[token]
    return torch.tensor([probs[token] / total if token in nucleus else 0.0 for token in range(V)], dtype=torch.float64)


def follows(tokens, probs):
    """Pearson's chi-square test; a right sampler fails it once in a million.

    With d degrees of freedom P(chi2 > d + 2 sqrt(d t) + 2 t) <= exp(-t) (Laurent and Massart 2000, lemma 1); t = 14.
    """
    counts, expected = torch.bincount(torch.tensor(tokens), minlength=V).double(), len(tokens) * probs
    if counts[probs == 0].any():
        return False
    rare = expected < 5  # too few for the limit theorem: one cell for all of them
    counts, expected = (torch.cat([x[~rare], x[rare].sum()[None]]) for x in (counts, expected))
    counts, expected = counts[expected > 0], expected[expected > 0]
    d = len(expected) - 1
    return ((counts - expected) ** 2 / expected).sum() < d + 2 * (14 * d) ** 0.5 + 28


@pytest.mark.parametrize("top_p", [1.0, 0.8])
def test_tokens_have_the_frequencies_of_the_exact_distribution(mistral, top_p):
    prompt = PROMPTS[2]
    settings = {"temperature": 0.7, "top_p": top_p, "eos_ids": [], "slots": 4000}
    (row,) = generate(mistral, [prompt], k=4000, max_new_tokens=2, **settings)
    firsts = [first for first, _ in row]
    assert follows(firsts, exact(mistral, prompt, 0.7, top_p))
    likely = max(set(firsts), key=firsts.count)
    seconds = [second for first, second in row if first == likely]
    assert len(seconds) > 500 and follows(seconds, exact(mistral, [*prompt, likely], 0.7, top_p))
    # and the test can tell: these are wrong
    assert not follows(firsts, exact(mistral, prompt, 0.8, top_p))
    assert not follows(firsts, exact(mistral, prompt, 0.7, top_p - 0.15))
    assert not follows(seconds, exact(mistral, prompt, 0.7, top_p))


# One token ------------------------------------------------------------------------------------------------------------

BELOW_ONE = torch.nextafter(torch.tensor(1.0), torch.tensor(0.0)).item()  # the largest float32 that may be drawn


@pytest.mark.parametrize("top_p", [1.0, 0.9])
@pytest.mark.parametrize("uniform", [0.0, BELOW_ONE], ids=["lowest", "highest"])
def test_a_token_of_probability_zero_is_never_drawn(uniform, top_p):
    torch.manual_seed(0)
    logits = 5 * torch.randn(2000, V)
    logits[torch.rand(2000, V) < 0.7] = -torch.inf
    logits[torch.rand(2000, V) < 0.5] -= 1e5  # underflows to exactly 0
    logits[:, 33] = 0.0
    token = sample_tokens(logits, torch.full((2000,), uniform), temperature=0.7, top_p=top_p)
    assert (logits.double() / 0.7).softmax(-1).gather(1, token[:, None]).min() > 0


def test_a_token_inverts_the_cdf():
    logits = torch.tensor([0.25, 0.5, 0.25]).log().expand(4, 3)
    uniform = torch.tensor([0.1, 0.3, 0.7, 0.8])
    assert sample_tokens(logits, uniform, temperature=1.0, top_p=1.0).tolist() == [0, 1, 1, 2]
    assert sample_tokens(logits, uniform, temperature=1.0, top_p=0.5).tolist() == [1, 1, 1, 1]
    assert sample_tokens(logits, uniform, temperature=1.0, top_p=1e-6).tolist() == [1, 1, 1, 1]
    assert sample_tokens(logits, uniform, temperature=0, top_p=0.9).tolist() == [1, 1, 1, 1]
    large = torch.zeros(3, 250_000)  # drawn from end to end
    large[:, -1] = -torch.inf
    token = sample_tokens(large, torch.tensor([0.0, 0.5, BELOW_ONE]), temperature=1.0, top_p=1.0).tolist()
    assert token[0] == 0 and abs(token[1] - 125_000) <= 1 and token[2] == 249_998


def test_uniforms_belong_to_seed_prompt_and_sample():
    first = uniforms(0, [1, 2], 0, 1000)
    assert torch.equal(uniforms(0, [1, 2], 0, 10), first[:10])
    assert first.min() >= 0 and first.max() < 1
    for other in (uniforms(1, [1, 2], 0, 1000), uniforms(0, [12], 0, 1000), uniforms(0, [1, 2], 1, 1000)):
        assert abs(torch.corrcoef(torch.stack([first, other]))[0, 1]) < 0.2  # six standard errors are 0.19
