import functools
import gc
import random
import weakref

import pytest
import torch
import transformers as hf

import common
from common import Response, fits_slots, generate, generate_plain, sample_tokens, uniforms

V = 67
EOS = list(range(0, V, 17))  # four ids, so that some responses end and some are cut
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
SIZES = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,  # far from uniform, so that a wrong mask or position changes what is sampled
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
GPT2 = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}
HEADS_OF_8 = {"head_dim": 8, "query_pre_attn_scalar": 8}
SOFTCAPS = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 10.0}
FAMILIES = {  # all windows are shorter than the sequences
    "llama": (hf.LlamaConfig, {}),
    "mistral-window": (hf.MistralConfig, {"sliding_window": 6}),
    "qwen3-mixed": (
        hf.Qwen3Config,
        {"head_dim": 8, "use_sliding_window": True, "sliding_window": 6, "layer_types": MIXED},
    ),
    "gemma3-mixed": (hf.Gemma3TextConfig, {**HEADS_OF_8, "sliding_window": 6, "layer_types": MIXED}),
    "gemma2-eager": (
        hf.Gemma2Config,
        {**HEADS_OF_8, **SOFTCAPS, "sliding_window": 6, "attn_implementation": "eager"},
    ),
    "gpt-neox": (hf.GPTNeoXConfig, {}),
    "gpt2": (hf.GPT2Config, GPT2),
}
NOT_PLAIN_KV = {  # state spaces and hybrids of attention with something recurrent
    "mamba": (hf.MambaConfig, {"state_size": 4}),
    "recurrent-gemma": (hf.RecurrentGemmaConfig, {"lru_width": 32, "attention_window_size": 6}),
    "qwen3-next": (
        hf.Qwen3NextConfig,
        {
            "num_hidden_layers": 2,
            "layer_types": ["linear_attention", "full_attention"],
            "head_dim": 8,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "num_experts": 0,
            "mlp_only_layers": [0, 1],
        },
    ),
}
LENGTHS = [1, 12, 5, 2, 9, 5]
PROMPTS = [random.Random(length * n).choices(range(V), k=length) for n, length in enumerate(LENGTHS)]


pytestmark = pytest.mark.usefixtures("one_thread")


def build(config_class, settings):
    settings = {**SIZES, **settings}
    attention = settings.pop("attn_implementation", None)
    torch.manual_seed(0)
    policy = hf.AutoModelForCausalLM.from_config(config_class(**settings), attn_implementation=attention)
    return policy.eval()


@functools.cache
def make(family):
    return build(*FAMILIES[family])


@pytest.fixture(params=FAMILIES)
def policy(request):
    return make(request.param)


@pytest.fixture
def mistral():
    return make("mistral-window")


def greedy_of_transformers(policy, prompt, max_new_tokens):
    """The oracle: the library's own generate, one prompt at a time."""
    ids = torch.tensor([prompt])
    settings = {"max_new_tokens": max_new_tokens, "eos_token_id": EOS, "pad_token_id": 0}
    out = policy.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, use_cache=True, **settings)
    return out[0, len(prompt) :].tolist()


# The same samples by three ways ---------------------------------------------------------------------------------------


def test_the_slot_cache_fits(policy):
    assert fits_slots(policy)


def test_samples_equal_those_without_a_cache_for_any_number_of_slots(policy):
    settings = {"k": 3, "max_new_tokens": 20, "eos_ids": EOS, "seed": 1}
    right = generate_plain(policy, PROMPTS, **settings)
    assert {r.finished for row in right for r in row} == {True, False}
    for slots in (1, 4, 64):
        assert generate(policy, PROMPTS, **settings, slots=slots) == right, f"slots={slots}"


@pytest.mark.parametrize(("looks", "bucket"), [(8, 128), (3, 16), (50, 1)])
def test_samples_depend_neither_on_how_often_the_host_looks_nor_on_buckets(policy, looks, bucket, monkeypatch):
    """On a GPU a row that has ended decodes on until the next look, over keys rounded up to a bucket."""
    settings = {"k": 3, "max_new_tokens": 20, "eos_ids": EOS, "seed": 1}
    right = generate_plain(policy, PROMPTS, **settings)
    monkeypatch.setattr(common, "LOOKS", {"cpu": looks})
    monkeypatch.setattr(common, "BUCKETS", {"cpu": bucket})
    for slots in (4, 64):
        assert generate(policy, PROMPTS, **settings, slots=slots) == right, f"slots={slots}"


def test_greedy_equals_generate_of_transformers(policy):
    right = [greedy_of_transformers(policy, prompt, 20) for prompt in PROMPTS]
    for slots in (1, 4):
        rows = generate(policy, PROMPTS, k=2, max_new_tokens=20, temperature=0, eos_ids=EOS, slots=slots)
        assert [[r.ids for r in row] for row in rows] == [[ids, ids] for ids in right], f"slots={slots}"


@pytest.mark.parametrize("family", NOT_PLAIN_KV)
def test_an_architecture_without_a_plain_kv_cache_falls_back_with_a_notice(family, capsys):
    policy = build(*NOT_PLAIN_KV[family])
    settings = {"k": 2, "max_new_tokens": 8, "eos_ids": EOS}
    sampled = generate(policy, PROMPTS[:3], **settings)
    assert "without a cache" in capsys.readouterr().out
    assert sampled == generate_plain(policy, PROMPTS[:3], **settings)
    greedy = generate(policy, PROMPTS[:3], **settings, temperature=0)
    assert capsys.readouterr().out == "", "one notice is enough"
    assert [row[0].ids for row in greedy] == [greedy_of_transformers(policy, x, 8) for x in PROMPTS[:3]]


def test_a_local_window_that_the_config_does_not_call_sliding_window():
    """GPT-Neo measures its `window_size` from the last key, so rows at different positions cannot share a step."""
    alternate = {"attention_types": [[["global", "local"], 1]], "window_size": 10}
    policy = build(hf.GPTNeoConfig, {**alternate, "num_hidden_layers": 2, "num_heads": 4})
    settings = {"k": 3, "max_new_tokens": 20, "eos_ids": EOS}
    assert generate(policy, PROMPTS, **settings, slots=8) == generate_plain(policy, PROMPTS, **settings)


# Independence ---------------------------------------------------------------------------------------------------------


def test_a_sample_depends_on_neither_slots_nor_order_nor_batch_mates(mistral):
    settings = {"k": 3, "max_new_tokens": 20, "eos_ids": EOS, "seed": 5}
    together = generate(mistral, PROMPTS, **settings)
    assert all(generate(mistral, PROMPTS, **settings, slots=slots) == together for slots in (2, 3, 7, 1000))
    assert generate(mistral, PROMPTS[::-1], **settings)[::-1] == together
    alone = [generate(mistral, [prompt], **settings)[0] for prompt in PROMPTS]
    assert alone == together


def test_a_sample_depends_on_its_index_but_not_on_k(mistral):
    settings = {"max_new_tokens": 20, "eos_ids": EOS, "slots": 4}
    two, five = (generate(mistral, PROMPTS, k=k, **settings) for k in (2, 5))
    assert [row[:2] for row in five] == two
    assert all(len({tuple(r.ids) for r in row}) > 1 for row in five)


def test_a_sample_depends_on_the_seed(mistral):
    settings = {"k": 3, "max_new_tokens": 20, "eos_ids": EOS}
    first, second, text = (generate(mistral, PROMPTS, **settings, seed=seed) for seed in (1, 2, "1 sample 2"))
    assert first != second != text != first
    assert generate(mistral, PROMPTS, **settings, seed=1) == first


def test_prompts_that_repeat_get_the_same_samples(mistral):
    settings = {"k": 2, "max_new_tokens": 20, "eos_ids": EOS, "slots": 3}
    once, other, again = generate(mistral, [PROMPTS[1], PROMPTS[2], PROMPTS[1]], **settings)
    assert once == again != other


def test_the_cache_is_gone_when_generate_returns(mistral, monkeypatch):
    """Tens of gigabytes on a GPU: they cannot wait for the garbage collector."""
    caches, make = [], common.SlotCache.__init__

    def spy(self, *args):
        make(self, *args)
        caches.append(weakref.ref(self.layers[0].keys))

    monkeypatch.setattr(common.SlotCache, "__init__", spy)
    gc.collect()
    gc.disable()
    try:
        generate(mistral, PROMPTS, k=2, max_new_tokens=8, eos_ids=EOS, slots=4)
        assert [ref() for ref in caches] == [None]
    finally:
        gc.enable()


def test_sampling_leaves_the_global_random_numbers_alone(mistral):
    before = torch.get_rng_state()
    generate(mistral, PROMPTS[:2], k=2, max_new_tokens=4, eos_ids=EOS)
    assert torch.equal(torch.get_rng_state(), before)


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
    prompt, never = PROMPTS[2], [V]
    settings = {"temperature": 0.7, "top_p": top_p, "eos_ids": never, "slots": 4000}
    (row,) = generate(mistral, [prompt], k=4000, max_new_tokens=2, **settings)
    firsts = [r.ids[0] for r in row]
    assert follows(firsts, exact(mistral, prompt, 0.7, top_p))
    common_first = max(set(firsts), key=firsts.count)
    seconds = [r.ids[1] for r in row if r.ids[0] == common_first]
    assert len(seconds) > 500
    assert follows(seconds, exact(mistral, [*prompt, common_first], 0.7, top_p))
    # and the test can tell: these are wrong
    assert not follows(firsts, exact(mistral, prompt, 0.8, top_p))
    assert not follows(firsts, exact(mistral, prompt, 0.7, top_p - 0.15))
    assert not follows(seconds, exact(mistral, prompt, 0.7, top_p))


def test_top_p_never_leaves_the_nucleus(mistral):
    settings = {"k": 20, "max_new_tokens": 3, "temperature": 1.3, "eos_ids": [V]}
    for prompt, row in zip(PROMPTS, generate(mistral, PROMPTS, **settings, top_p=0.4), strict=True):
        for r in row:
            for n, token in enumerate(r.ids):
                assert exact(mistral, [*prompt, *r.ids[:n]], 1.3, 0.4)[token] > 0
    without = generate(mistral, PROMPTS, **settings)
    nuclei = [exact(mistral, prompt, 1.3, 0.4) for prompt in PROMPTS]
    outside = [nucleus[r.ids[0]] == 0 for nucleus, row in zip(nuclei, without, strict=True) for r in row]
    assert sum(outside) > 30, "without top_p about 6 in 10 are outside"


def test_a_tiny_top_p_is_greedy(mistral):
    settings = {"k": 3, "max_new_tokens": 20, "eos_ids": EOS}
    greedy = generate(mistral, PROMPTS, **settings, temperature=0)
    assert generate(mistral, PROMPTS, **settings, top_p=1e-6) == greedy
    assert generate(mistral, PROMPTS, **settings, temperature=0, top_p=0.9, seed=9) == greedy


# Responses ------------------------------------------------------------------------------------------------------------


def all_responses(policy, **settings):
    return [r for row in generate(policy, PROMPTS, **settings) for r in row]


@pytest.mark.parametrize("eos_ids", [[31], EOS], ids=["one-eos", "four-eos"])
def test_a_response_ends_with_its_only_eos_or_is_cut(mistral, eos_ids):
    responses = all_responses(mistral, k=8, max_new_tokens=20, eos_ids=eos_ids, slots=16)
    for r in responses:
        ends = [n for n, token in enumerate(r.ids) if token in eos_ids]
        assert ends == ([len(r.ids) - 1] if r.finished else [])
        assert 1 <= len(r.ids) <= 20
        assert r.finished or len(r.ids) == 20
    assert {r.finished for r in responses} == {True, False}
    assert len({r.ids[-1] for r in responses if r.finished}) == len(eos_ids), "each EOS ends some response"


def test_a_response_that_ends_in_the_very_last_token_is_finished(mistral):
    long = all_responses(mistral, k=8, max_new_tokens=20, eos_ids=EOS)
    length = next(len(r.ids) for r in long if r.finished and len(r.ids) > 3)
    short = all_responses(mistral, k=8, max_new_tokens=length, eos_ids=EOS)
    cut = [Response(r.ids[:length], r.finished and len(r.ids) <= length) for r in long]
    assert short == cut, "max_new_tokens changes nothing but where a response is cut"


def test_the_first_token_may_be_eos(mistral):
    assert all(r.finished and len(r.ids) == 1 for r in all_responses(mistral, k=3, max_new_tokens=9, eos_ids=range(V)))
    favourite = generate(mistral, PROMPTS[:1], k=1, max_new_tokens=1, temperature=0, eos_ids=[V])[0][0].ids
    lengths = [len(r.ids) for r in all_responses(mistral, k=8, max_new_tokens=9, eos_ids=favourite, slots=5)]
    assert lengths.count(1) > 0 < lengths.count(9)


def test_one_new_token(mistral):
    one = all_responses(mistral, k=8, max_new_tokens=1, eos_ids=EOS, slots=5)
    assert all(len(r.ids) == 1 and r.finished == (r.ids[0] in EOS) for r in one)
    assert {r.finished for r in one} == {True, False}


def test_progress_counts_every_response(mistral):
    class Bar:
        total = 0

        def update(self, n=1):
            self.total += n

    for sample in (generate, generate_plain):
        bar = Bar()
        sample(mistral, PROMPTS, k=3, max_new_tokens=4, eos_ids=EOS, progress=bar)
        assert bar.total == 3 * len(PROMPTS)


@pytest.mark.parametrize(
    "wrong",
    [
        {"prompts": []},
        {"prompts": [[1, 2], []]},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"k": 0},
        {"max_new_tokens": 0},
        {"temperature": -0.1},
        {"slots": 0},
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(mistral, wrong):
    settings = {"prompts": PROMPTS, "k": 2, "max_new_tokens": 3, "eos_ids": EOS, **wrong}
    with pytest.raises(ValueError, match="generate wants"):
        generate(mistral, **settings)


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


def test_a_large_vocabulary_is_drawn_from_end_to_end():
    logits = torch.zeros(3, 250_000)
    logits[:, -1] = -torch.inf
    token = sample_tokens(logits, torch.tensor([0.0, 0.5, BELOW_ONE]), temperature=1.0, top_p=1.0).tolist()
    assert token[0] == 0
    assert abs(token[1] - 125_000) <= 1
    assert token[2] == 249_998


def test_a_token_inverts_the_cdf():
    logits = torch.tensor([0.25, 0.5, 0.25]).log().expand(4, 3)
    uniform = torch.tensor([0.1, 0.3, 0.7, 0.8])
    assert sample_tokens(logits, uniform, temperature=1.0, top_p=1.0).tolist() == [0, 1, 1, 2]
    assert sample_tokens(logits, uniform, temperature=1.0, top_p=0.5).tolist() == [1, 1, 1, 1]
    assert sample_tokens(logits, uniform, temperature=0, top_p=1.0).tolist() == [1, 1, 1, 1]


def test_uniforms_belong_to_seed_prompt_and_sample():
    first = uniforms(0, [1, 2], 0, 1000)
    assert torch.equal(uniforms(0, [1, 2], 0, 10), first[:10])
    assert first.min() >= 0 and first.max() < 1
    for other in (uniforms(1, [1, 2], 0, 1000), uniforms(0, [12], 0, 1000), uniforms(0, [1, 2], 1, 1000)):
        assert abs(torch.corrcoef(torch.stack([first, other]))[0, 1]) < 0.2  # six standard errors are 0.19
