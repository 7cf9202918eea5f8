"""token_logps and response_logps: against float64, by torch and by Triton, and against one token at a time."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

import common
from common import add_logps, micro_batches, pair_logps, response_logps, token_logps

SIZES = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def llama(**more):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2, initializer_range=0.3, **more)).eval()


def mistral_with_window():
    torch.manual_seed(0)
    config = MistralConfig(**SIZES, num_key_value_heads=2, initializer_range=0.3, sliding_window=4)
    return MistralForCausalLM(config).eval()


def gpt2(dropout=0.0):
    torch.manual_seed(0)
    drops = {"resid_pdrop": dropout, "attn_pdrop": dropout, "embd_pdrop": dropout}
    return GPT2LMHeadModel(GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=4, **drops)).eval()


POLICIES = {"llama": llama, "mistral-window": mistral_with_window, "gpt2": gpt2}
PROMPTS = [[1, 5, 9], [1], [1, 7, 7, 7, 7, 7, 2, 40], [3, 3]]
RESPONSES = [[8, 9, 2], [4, 4, 4, 4, 4, 4, 4, 2], [2], [60, 0, 0]]  # with id 0, the padding, and 2, an EOS, inside


def softmax_by_hand(hidden, weight, target, scale=1.0, softcap=0.0):
    """Source: the definition, in float64, one token at a time."""
    logits = [float(weight[v].double() @ hidden.double()) for v in range(61)]
    logits = torch.tensor(logits, dtype=torch.float64) * scale
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    return (logits[target].exp() / logits.exp().sum()).log()


def plain_token_logps(hidden, weight, targets, scale=1.0, softcap=0.0):
    """The plain version, through autograd: whole logits, log_softmax, gather."""
    logits = hidden @ weight.T * scale
    logits = torch.tanh(logits / softcap) * softcap if softcap else logits
    return torch.log_softmax(logits, -1).gather(1, targets[:, None])[:, 0]


@pytest.fixture(params=["torch", "triton"])
def rows(request, monkeypatch):
    """The two ways from raw products to log-probs and slopes; Triton runs through its interpreter (conftest.py)."""
    if request.param == "triton":
        if common.triton is None:
            pytest.skip("triton is for Linux only")
        by_triton, by_torch = common.row_logps_triton, common.row_logps
        rows = lambda logits, *more: (by_torch if logits.dtype == torch.float64 else by_triton)(logits, *more)  # noqa: E731
        monkeypatch.setattr(common, "row_logps", rows)


@pytest.fixture
def chunks(monkeypatch):
    """Three rows at a time."""
    monkeypatch.setattr(common, "CHUNK", {"cpu": 3})


OPTIONS = [{}, {"scale": 0.25}, {"softcap": 3.0}, {"scale": 2.0, "softcap": 5.0}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_token_logps_is_log_softmax_of_the_head(options, rows, chunks):
    torch.manual_seed(1)
    hidden, weight, targets = torch.randn(7, 16), torch.randn(61, 16), torch.randint(61, (7,))
    right = [softmax_by_hand(h, weight, t, **options) for h, t in zip(hidden, targets, strict=True)]
    got = token_logps(hidden, weight, targets, **options)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), torch.stack(right), atol=1e-5, rtol=0)


def compare(n, d, v, options, sharpness=1.0, tied=False):
    """token_logps in float32 against the plain version in float64: (error in nats, relative errors of gradients)."""
    torch.manual_seed(n + v)
    hidden, weight, targets = torch.randn(n, d), torch.randn(v, d) / d**0.5, torch.randint(v, (n,))
    if tied:  # the embedding is the head, so its gradient comes from both ends
        hidden = torch.randint(v, (n,))
    elif sharpness > 1:  # the target gets nearly all of the probability
        hidden = sharpness * weight[targets]
    inputs = [weight] if tied else [hidden, weight]
    g, results = torch.randn(n), []
    for function, dtype in ((token_logps, torch.float32), (plain_token_logps, torch.float64)):
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        w = leaves[0] if tied else leaves[1]
        h = torch.tanh(w[hidden]) if tied else leaves[0]
        logps = function(h, w, targets, **options)
        results.append([logps, *torch.autograd.grad(logps @ g.to(dtype), leaves)])
    mine, right = results
    error = (mine[0] - right[0]).abs().max().item() if n else 0.0
    return error, [((a - b).norm() / b.norm().clamp(1e-30)).item() for a, b in zip(mine[1:], right[1:], strict=True)]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("v", [2, 61, 5003])
def test_float32_error_is_below_1e_5_nats_and_gradients_1e_4(v, options, rows, chunks):
    error, gradients = compare(8, 24, v, options)
    assert error < 1e-5
    assert max(gradients) < 1e-4


def test_a_probability_near_one_keeps_its_digits(rows, chunks):
    """p - 1 computed from a rounded p would be 0 or off by whole digits: gradients of confident tokens would vanish."""
    for sharpness in (12.0, 18.0):
        error, gradients = compare(8, 24, 61, {}, sharpness)
        assert error < 1e-5
        assert max(gradients) < 1e-4
    for dtype in (torch.float32, torch.bfloat16):  # in bf16, p would round to 1
        hidden, weight = torch.ones(1, 1, dtype=dtype), torch.tensor([[8.0], [0.0]], dtype=dtype).requires_grad_()
        (grad,) = torch.autograd.grad(token_logps(hidden, weight, torch.tensor([0])).sum(), weight)
        assert grad[0].item() == pytest.approx(1 / (1 + math.exp(8)), rel=5e-3)


def test_tied_weights_get_the_gradient_of_both_ends(rows, chunks):
    error, gradients = compare(40, 24, 61, {}, tied=True)
    assert error < 1e-5
    assert max(gradients) < 1e-4


def test_token_logps_gradients(chunks):
    torch.manual_seed(1)
    hidden, weight = torch.randn(5, 4, dtype=torch.float64), torch.randn(9, 4, dtype=torch.float64)
    targets = torch.randint(9, (5,))

    def all_options(hidden, weight):
        return token_logps(hidden, weight, targets, scale=0.7, softcap=2.0)

    assert torch.autograd.gradcheck(all_options, [x.requires_grad_() for x in (hidden, weight)])


def test_the_error_does_not_grow_with_the_vocabulary():
    """At 256k tokens torch's log_softmax is off by up to 1e-5 nats a token, which adds up over a long answer."""
    torch.manual_seed(0)
    v = 262_144
    hidden, weight, targets = torch.randn(6, 16), torch.randn(v, 16) / 2, torch.randint(v, (6,))
    right = plain_token_logps(hidden.double(), weight.double(), targets)
    assert (token_logps(hidden, weight, targets).double() - right).abs().max() < 2e-6


def test_bf16_gradients_come_in_bf16_and_are_right_to_a_percent(rows, chunks):
    torch.manual_seed(1)
    hidden, weight = torch.randn(600, 32).bfloat16(), (0.2 * torch.randn(101, 32)).bfloat16()
    targets, g = torch.randint(101, (600,)), torch.randn(600)
    leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
    mine = torch.autograd.grad(token_logps(*leaves, targets) @ g, leaves)
    leaves = [x.double().requires_grad_() for x in (hidden, weight)]
    right = torch.autograd.grad(plain_token_logps(*leaves, targets) @ g.double(), leaves)
    for a, b in zip(mine, right, strict=True):
        assert a.dtype == torch.bfloat16
        assert (a.double() - b).norm() / b.norm() < 0.01


def test_no_gradient_asked_nothing_kept():
    hidden, weight = torch.randn(40, 8), torch.randn(61, 8, requires_grad=True)
    targets = torch.randint(61, (40,))
    with torch.no_grad():
        assert token_logps(hidden, weight, targets).grad_fn is None
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.shape) or x, lambda x: x):
        token_logps(hidden, weight.detach(), targets)
        assert kept == []
        token_logps(hidden, weight, targets)
        assert torch.Size([40, 61]) in kept


def test_token_logps_of_no_tokens(chunks):
    hidden, weight = torch.zeros(0, 4, requires_grad=True), torch.ones(9, 4, requires_grad=True)
    logps = token_logps(hidden, weight, torch.zeros(0, dtype=torch.long))
    assert logps.shape == (0,)
    grads = torch.autograd.grad(logps.sum(), [hidden, weight])
    assert grads[0].shape == (0, 4)
    assert torch.equal(grads[1], torch.zeros(9, 4))


COMPILE = """
import common, triton
from triton.backends.compiler import GPUTarget
for kernel, signature, constants in {kernels}:
    source = triton.compiler.ASTSource(fn=getattr(common, kernel), signature=signature, constexprs=constants)
    for compute_capability in (80, 90):
        assert triton.compile(source, target=GPUTarget("cuda", compute_capability, 32)).asm["cubin"]
"""


def test_the_triton_kernels_compile_for_gpus_that_are_not_here(tmp_path):
    """The interpreter shows that the numbers are right, not that the compiler takes the program."""
    if common.triton is None:
        pytest.skip("triton is for Linux only")
    kernels = []
    for on in (False, True):
        tensors = {
            "logits": "*fp32",
            "targets": "*i64",
            "logps": "*fp32",
            "slopes": "*bf16",
            "V": "i32",
            "softcap": "fp32",
        }
        kernels.append(("row_kernel", tensors, {"SOFTCAP": on, "SLOPES": on, "BLOCK": 4096}))
    tensors = {"weight": "*i16", "remainder": "*i16", "grad": "*bf16", "moment": "*i16", "n": "i32", "seed": "i32"}
    numbers = dict.fromkeys(("lr", "alpha", "alpha_left", "eps"), "fp32")
    kernels.append(("update_kernel", {**tensors, **numbers}, {"BLOCK": 1024}))
    kernels = [
        (name, {**types, **dict.fromkeys(constants, "constexpr")}, constants) for name, types, constants in kernels
    ]
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": str(Path(common.__file__).parent), "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE.format(kernels=kernels)], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_token_logps_rejects_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match=r"hidden \(N, D\)"):
        token_logps(torch.zeros(3, 4), torch.zeros(9, 5), torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match="targets"):
        token_logps(torch.zeros(3, 4), torch.zeros(9, 4), torch.zeros(2, dtype=torch.long))


def test_sums_of_bf16_models_keep_float32_precision():
    """Log-probs summed in bf16 came back as -2240 instead of -2247.9 in admired code."""
    torch.manual_seed(1)
    hidden, weight = torch.randn(400, 64).bfloat16(), (0.3 * torch.randn(1000, 64)).bfloat16()
    targets = torch.randint(1000, (400,))
    right = torch.log_softmax(hidden.double() @ weight.double().T, -1).gather(1, targets[:, None]).sum()
    got = token_logps(hidden, weight, targets)
    assert got.dtype == torch.float32 and right < -2000
    assert abs(got.sum().double() - right) < 1e-2


@pytest.mark.parametrize("name", POLICIES)
def test_response_logps_is_the_sum_over_the_response_alone(name):
    policy = POLICIES[name]()
    right = []
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
        total = 0.0
        for n, token in enumerate(response):  # one row, no padding, one token at a time
            logits = policy(torch.tensor([prompt + response[:n]])).logits[0, -1].double()
            total += torch.log_softmax(logits, -1)[token].item()
        right.append(total)
    torch.testing.assert_close(response_logps(policy, PROMPTS, RESPONSES), torch.tensor(right), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", POLICIES)
def test_a_row_depends_neither_on_its_batch_mates_nor_on_their_order(name):
    policy = POLICIES[name]()
    together = response_logps(policy, PROMPTS, RESPONSES)
    alone = [response_logps(policy, [x], [y]) for x, y in zip(PROMPTS, RESPONSES, strict=True)]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=0)
    backwards = response_logps(policy, PROMPTS[::-1], RESPONSES[::-1]).flip(0)
    torch.testing.assert_close(together, backwards, atol=1e-5, rtol=0)
    pairs = [{"prompt_ids": x, "responses": [{"ids": y}]} for x, y in zip(PROMPTS, RESPONSES, strict=True)]
    for max_tokens in (1, 13, 10_000):
        add_logps(policy, pairs, "logps", max_tokens)
        logps = torch.tensor([pair["logps"][0] for pair in pairs])
        torch.testing.assert_close(together, logps, atol=1e-5, rtol=0)


def test_eos_is_part_of_the_response_even_when_it_is_the_padding_id():
    """With masks made by `ids == pad` the EOS would drop out, and the policy would never learn to stop."""
    policy, eos = llama(eos_token_id=0, pad_token_id=0), 0
    with_eos, without = response_logps(policy, [[1, 5], [1, 5]], [[8, 9, eos], [8, 9]])
    log_eos = torch.log_softmax(policy(torch.tensor([[1, 5, 8, 9]])).logits[0, -1], -1)[eos]
    torch.testing.assert_close(with_eos - without, log_eos, atol=1e-5, rtol=0)
    with_eos.backward()
    before = log_eos.item()
    with torch.no_grad():
        for p in policy.parameters():
            p += 1e-3 * p.grad
    after = torch.log_softmax(policy(torch.tensor([[1, 5, 8, 9]])).logits[0, -1], -1)[eos]
    assert after > before


def test_prompt_tokens_never_reach_the_head(monkeypatch):
    policy, rows = llama(), []
    monkeypatch.setattr(common, "token_logps", lambda h, **head: rows.append(len(h)) or token_logps(h, **head))
    response_logps(policy, PROMPTS, RESPONSES)
    assert rows == [sum(map(len, RESPONSES))]


@pytest.mark.parametrize(("prompts", "responses"), [([[]], [[1]]), ([[1]], [[]]), ([[1], [2]], [[1]])])
def test_response_logps_rejects_what_has_no_log_prob(prompts, responses):
    with pytest.raises(ValueError, match="response_logps wants"):
        response_logps(llama(), prompts, responses)


def test_dropout_would_be_noise():
    with pytest.raises(AssertionError, match="eval"):
        response_logps(gpt2(dropout=0.5).train(), PROMPTS, RESPONSES)
    policy = gpt2(dropout=0.5)
    assert torch.equal(response_logps(policy, PROMPTS, RESPONSES), response_logps(policy, PROMPTS, RESPONSES))


def some_pairs(n=100):
    lengths = torch.randint(1, 50, (n, 3), generator=torch.Generator().manual_seed(0)).tolist()
    return [{"prompt_ids": [1] * x, "responses": [{"ids": [5] * y}, {"ids": [6] * z}]} for x, y, z in lengths]


def size_of(batch):
    """(padded tokens, response tokens) of a micro-batch."""
    ys = [[len(y["ids"]) for y in pair["responses"]] for pair in batch]
    longest = max(len(pair["prompt_ids"]) + max(y) for pair, y in zip(batch, ys, strict=True))
    return 2 * len(batch) * longest, sum(map(sum, ys))


@pytest.mark.parametrize("budget", [1, 60, 500, 10**6])
@pytest.mark.parametrize("slopes", [10**9, 61 * 4 * 120], ids=["much", "120 response tokens"])
def test_micro_batches_hold_every_pair_once_within_both_budgets(budget, slopes, monkeypatch):
    monkeypatch.setattr(common, "SLOPES", {"cpu": slopes})
    policy, pairs = llama(), some_pairs()
    batches = micro_batches(policy, pairs, budget)
    assert sorted(id(pair) for batch in batches for pair in batch) == sorted(map(id, pairs))
    for batch in batches:
        padded, answered = size_of(batch)
        assert len(batch) == 1 or (padded <= budget and answered * 61 * 4 <= slopes)


def test_micro_batches_put_similar_lengths_together():
    batches = micro_batches(llama(), some_pairs(), 1000)
    padded = sum(size_of(batch)[0] for batch in batches)
    assert padded < 1.1 * sum(size_of([pair])[0] for pair in some_pairs())


def test_micro_batches_do_not_change_the_gradient():
    policy, pairs, gradients = llama(), some_pairs(8), []
    for batches in ([pairs], [[pair] for pair in pairs]):
        policy.zero_grad()
        for batch in batches:
            (pair_logps(policy, batch).sum() / len(pairs)).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None]))
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)
