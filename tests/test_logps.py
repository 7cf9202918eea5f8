"""Log-probs: the fused head, in torch and in Triton, against a plain one in float64; responses; micro-batches."""

import itertools
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from steps import stopped
from transformers import GPT2Config, LlamaConfig

import common
from common import add_logps, micro_batches, response_logps, token_logps
from test_generate import HAS_TRITON, V, build, make

PROMPTS = [[1, 5, 9], [1], [1, 7, 7, 7, 7, 7, 2, 40], [3, 3]]
RESPONSES = [[8, 9, 2], [4, 4, 4, 4, 4, 4, 4, 2], [2], [60, 0, 0]]  # with id 0, the padding, and 2, an EOS, inside


def llama(**more):
    return build(LlamaConfig, more)


@pytest.fixture(params=["llama", "mistral-window", "gpt2"])
def policy(request):
    return make(request.param)


@pytest.fixture(params=["torch", pytest.param("triton", marks=HAS_TRITON)])
def rows(request, monkeypatch):
    """The two ways from products to log-probs and slopes, three rows at a time; Triton runs through its interpreter."""
    monkeypatch.setattr(common, "CHUNK", {"cpu": 3})
    if request.param == "triton":
        monkeypatch.setattr(common, "row_logps", common.row_logps_triton)


def plain_token_logps(hidden, weight, targets, scale=1.0, softcap=0.0):
    """The plain version, through autograd: whole logits, log_softmax, gather."""
    logits = hidden @ weight.T * scale
    logits = torch.tanh(logits / softcap) * softcap if softcap else logits
    return torch.log_softmax(logits, -1).gather(1, targets[:, None])[:, 0]


def compare(n, d, v, options, sharpness=1.0, tied=False, dtype=torch.float32, device="cpu"):
    """token_logps against the plain version in float64: (error in nats, relative error of gradients)."""
    torch.manual_seed(n + v)
    hidden, weight, targets = torch.randn(n, d), torch.randn(v, d) / d**0.5, torch.randint(v, (n,))
    if tied:  # the embedding is the head, so its gradient comes from both ends
        hidden = torch.randint(v, (n,))
    elif sharpness > 1:  # the target gets nearly all of the probability
        hidden = sharpness * weight[targets]
    hidden = hidden.to(device, hidden.dtype if tied else dtype)
    weight, targets, g, results = weight.to(device, dtype), targets.to(device), torch.randn(n).to(device), []
    for function, wide in ((token_logps, dtype), (plain_token_logps, torch.float64)):
        leaves = [x.detach().to(wide).requires_grad_() for x in ([weight] if tied else [weight, hidden])]
        logps = function(torch.tanh(leaves[0][hidden]) if tied else leaves[1], leaves[0], targets, **options)
        results.append([logps, *torch.autograd.grad(logps @ g.to(logps.dtype), leaves)])
    mine, right = results
    errors = [((a - b).norm() / b.norm().clamp(1e-30)).item() for a, b in zip(mine[1:], right[1:], strict=True)]
    return (mine[0] - right[0]).abs().max().item(), max(errors)


OPTIONS = [{}, {"scale": 0.25}, {"softcap": 3.0}, {"scale": 2.0, "softcap": 5.0}]
# v = 5003 takes two tiles of the Triton kernel. At a sharpness of 18, p - 1 from a rounded p would be 0.
CASES = [(v, options, {}) for v in (2, 61, 5003) for options in OPTIONS]
CASES += [(61, {}, {"sharpness": 12.0}), (61, {}, {"sharpness": 18.0}), (61, {}, {"tied": True})]


@pytest.mark.parametrize(("v", "options", "more"), CASES, ids=str)
def test_float32_error_is_below_1e_5_nats_and_gradients_1e_4(v, options, more, rows):
    error, gradients = compare(8, 24, v, options, **more)
    assert error < 1e-5 and gradients < 1e-4


def test_a_vocabulary_of_262144_costs_no_digits_on_a_cpu():
    """torch's float32 log_softmax would be off by up to 1e-5 nats here."""
    for seed in range(3):
        torch.manual_seed(seed)
        hidden, weight, targets = torch.randn(8, 4), torch.randn(2**18, 4), torch.randint(2**18, (8,))
        right = plain_token_logps(hidden.double(), weight.double(), targets)
        assert (token_logps(hidden, weight, targets) - right).abs().max() < 2e-6
        assert (token_logps(hidden.double(), weight.double(), targets) - right).abs().max() < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_slope_of_a_confident_token_by_hand(dtype, rows):
    """In bf16, p would round to 1 and the gradient would vanish."""
    hidden, weight = torch.ones(1, 1, dtype=dtype), torch.tensor([[8.0], [0.0]], dtype=dtype).requires_grad_()
    (grad,) = torch.autograd.grad(token_logps(hidden, weight, torch.tensor([0])).sum(), weight)
    assert grad[0].item() == pytest.approx(1 / (1 + math.exp(8)), rel=5e-3)


def test_token_logps_gradients():
    torch.manual_seed(1)
    leaves, targets = [torch.randn(n, 4).double().requires_grad_() for n in (5, 9)], torch.randint(9, (5,))
    assert torch.autograd.gradcheck(lambda *x: token_logps(*x, targets, scale=0.7, softcap=2.0), leaves)


def test_bf16_gradients_come_in_bf16_and_log_probs_keep_float32_precision(rows):
    error, gradients = compare(400, 64, 1000, {}, dtype=torch.bfloat16)
    assert error < 1e-4 and gradients < 0.01
    hidden, weight = (torch.randn(n, 4).bfloat16().requires_grad_() for n in (3, 9))
    logps = token_logps(hidden, weight, torch.tensor([1, 2, 3]))
    assert logps.dtype == torch.float32
    assert all(x.dtype == torch.bfloat16 for x in torch.autograd.grad(logps.sum(), [hidden, weight]))


def test_slopes_are_kept_in_the_weights_dtype_and_only_for_a_gradient():
    hidden, weight, targets, kept = torch.randn(40, 8), torch.randn(61, 8), torch.randint(61, (40,)), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append((*x.shape, x.dtype)) or x, lambda x: x):
        assert token_logps(hidden, weight, targets).grad_fn is None
        with torch.no_grad():
            assert token_logps(hidden, weight.requires_grad_(), targets).grad_fn is None
        assert kept == []
        for dtype in (torch.float32, torch.bfloat16):
            token_logps(hidden.to(dtype), weight.to(dtype), targets)
            assert (40, 61, dtype) in kept


def test_no_tokens_and_shapes_that_do_not_fit():
    hidden, weight = torch.zeros(0, 4, requires_grad=True), torch.ones(9, 4, requires_grad=True)
    logps = token_logps(hidden, weight, torch.zeros(0, dtype=torch.long))
    grads = torch.autograd.grad(logps.sum(), [hidden, weight])
    assert logps.shape == (0,) and grads[0].shape == (0, 4) and torch.equal(grads[1], torch.zeros(9, 4))
    one = token_logps(torch.ones(4), torch.zeros(9, 4), torch.tensor(3))
    assert one.shape == () and one.item() == pytest.approx(-math.log(9))
    for d, n in ((5, 3), (4, 2)):
        with pytest.raises(ValueError, match="token_logps wants"):
            token_logps(torch.zeros(3, 4), torch.zeros(9, d), torch.zeros(n, dtype=torch.long))


COMPILE = """
import common, triton
from triton.backends.compiler import GPUTarget
for kernel, types, constants, options in {kernels}:
    types = types | dict.fromkeys(constants, "constexpr")
    source = triton.compiler.ASTSource(fn=getattr(common, kernel), signature=types, constexprs=constants)
    for compute_capability in (80, 90):
        kernel = triton.compile(source, target=GPUTarget("cuda", compute_capability, 32), options=options)
        assert kernel.asm["cubin"] and kernel.metadata.shared < 100_000
"""


@HAS_TRITON
def test_the_triton_kernels_compile_for_gpus_that_are_not_here(tmp_path):
    """The interpreter shows that the numbers are right, not that the compiler takes the program."""
    types = {"logits": "*fp32", "targets": "*i64", "logps": "*fp32", "slopes": "*bf16", "V": "i32", "softcap": "fp32"}
    constants = [{"SOFTCAP": on, "SLOPES": on, "BLOCK": 4096} for on in (True, False)]
    kernels = [("row_kernel", types, some, {"num_warps": 16}) for some in constants]
    strides = dict.fromkeys(("row_stride", "head_stride", "key_stride", "window"), "i32")
    for dtype, dim in ((dtype, dim) for dtype in ("*bf16", "*fp32") for dim in (80, 256)):
        types = dict.fromkeys(("query", "keys", "values", "out"), dtype) | {"pos": "*i64"} | strides
        block = max(16, min(64, 2**14 // (max(128, dim) * (2 if dtype == "*bf16" else 4))))
        some = {"SOFTCAP": dim == 256, "GROUP": 4, "DIM": dim, "ROWS": 16, "COLUMNS": 128 if dim == 80 else dim}
        types |= {"scale": "fp32", "softcap": "fp32"}
        kernels.append(("attention_kernel", types, some | {"BLOCK": block}, {}))
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": str(Path(common.__file__).parent), "TRITON_CACHE_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", COMPILE.format(kernels=kernels)], env=env, check=True)


# Responses ------------------------------------------------------------------------------------------------------------


def test_response_logps_is_the_sum_over_the_response_alone_whatever_else_is_in_the_batch(policy, monkeypatch):
    right, seen = [], []
    monkeypatch.setattr(common, "token_logps", lambda h, **head: seen.append(len(h)) or token_logps(h, **head))
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):  # one row, no padding, one token at a time
        total = 0.0
        for n, token in enumerate(response):
            logits = policy(torch.tensor([prompt + response[:n]])).logits[0, -1].double()
            total += torch.log_softmax(logits, -1)[token].item()
        right.append([total])
    torch.testing.assert_close(response_logps(policy, PROMPTS, RESPONSES), torch.tensor(right)[:, 0], atol=1e-5, rtol=0)
    assert seen == [sum(map(len, RESPONSES))], "prompts and padding never reach the head"
    for max_tokens in (1, 13, 10_000):  # alone, with some, with all
        rows = [{"prompt_ids": x, "responses": [{"ids": y}]} for x, y in zip(PROMPTS, RESPONSES, strict=True)]
        rows = add_logps(policy, rows, "logps", max_tokens)
        torch.testing.assert_close(torch.tensor([row["logps"] for row in rows]), torch.tensor(right), atol=1e-5, rtol=0)


def test_eos_is_part_of_the_response_even_when_it_is_the_padding_id():
    """With masks made by `ids == pad` the EOS would drop out, and the policy would never learn to stop."""
    policy, eos, log_eos = llama(eos_token_id=0, pad_token_id=0), 0, []
    for _ in range(2):  # before and after a step
        with_eos, without = response_logps(policy, [[1, 5], [1, 5]], [[8, 9, eos], [8, 9]])
        log_eos.append(torch.log_softmax(policy(torch.tensor([[1, 5, 8, 9]])).logits[0, -1], -1)[eos])
        torch.testing.assert_close(with_eos - without, log_eos[-1], atol=1e-5, rtol=0)
        with_eos.backward()
        torch.optim.SGD(policy.parameters(), 1e-3, maximize=True).step()
    assert log_eos[1] > log_eos[0]


@pytest.mark.parametrize(("prompts", "responses"), [([[]], [[1]]), ([[1]], [[]]), ([[1], [2]], [[1]]), ([], [])])
def test_response_logps_rejects_what_has_no_log_prob(prompts, responses):
    with pytest.raises(ValueError, match="response_logps wants"):
        response_logps(llama(), prompts, responses)


def test_dropout_would_be_noise():
    drops = [dict.fromkeys(("resid_pdrop", "attn_pdrop", "embd_pdrop"), p) for p in (0.0, 0.5)]
    plain, noisy = (build(GPT2Config, {"n_embd": 32, "n_layer": 2, "n_head": 4, **some}) for some in drops)
    assert torch.equal(response_logps(noisy, PROMPTS, RESPONSES), response_logps(plain, PROMPTS, RESPONSES))
    with pytest.raises(AssertionError, match="eval"):
        response_logps(noisy.train(), PROMPTS, RESPONSES)


# Micro-batches --------------------------------------------------------------------------------------------------------


def random_pairs(n):
    lengths = torch.randint(1, 30, (n, 3), generator=torch.Generator().manual_seed(0)).tolist()
    return [{"prompt_ids": [1] * x, "responses": [{"ids": [5] * y}, {"ids": [6] * z}]} for x, y, z in lengths]


def sizes(pairs, name="prompt_ids"):
    """(tokens of their rectangle, bytes of their slopes)"""
    rows = [(len(pair[name]), len(y["ids"])) for pair in pairs for y in pair["responses"]]
    return len(rows) * max(map(sum, rows)), V * 4 * sum(y for _, y in rows)


@pytest.mark.parametrize("max_tokens", [1, 60, 500, 10**6])
@pytest.mark.parametrize("most", [1, V * 4 * 150, 10**9])
@pytest.mark.parametrize("name", ["prompt_ids", "refined_ids"])
def test_micro_batches_hold_every_pair_once_within_both_budgets(max_tokens, most, name, monkeypatch):
    monkeypatch.setattr(common, "SLOPE_BYTES", {"cpu": most})
    # Of sr_dpo.py's two prompts the longer one, refined_ids, counts.
    pairs = [{**pair, name: [7] * 20 + pair["prompt_ids"]} for pair in random_pairs(120)]
    batches = micro_batches(llama(), pairs, max_tokens)
    assert sorted(id(pair) for part in batches for pair in part) == sorted(map(id, pairs))
    over = lambda part: sizes(part, name)[0] > max_tokens or sizes(part, name)[1] > most  # noqa: E731
    assert all(len(part) == 1 or not over(part) for part in batches)
    assert all(over([*part, later[0]]) for part, later in itertools.pairwise(batches)), "none is needlessly small"


@pytest.mark.parametrize("bad", [-1, 10**6])
def test_ids_outside_the_vocabulary_are_refused(bad, capsys):
    pair = {"prompt_ids": [1], "responses": [{"ids": [2, 3]}, {"ids": [4, bad]}]}
    assert "not in the model's vocabulary" in stopped(capsys, micro_batches, llama(), [pair], 100)
