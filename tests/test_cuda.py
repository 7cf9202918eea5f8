"""The suite of a GPU. test_scripts.py runs it in a process of its own, as conftest.py hides the GPU from all others."""

import json
import os

import pytest
import torch
import transformers as hf

import common
import dno
import sppo
import sr_dpo
from common import generate, response_logps, sample_tokens, uniforms

ON = "ON_CUDA" in os.environ
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # with ON_CUDA=1 and no GPU: whether this file itself is right
pytestmark = pytest.mark.skipif(not ON, reason="run by test_scripts.py where there is a GPU")
kernels = pytest.mark.skipif(DEVICE == "cpu", reason="wants a GPU")
SIZES = {
    "vocab_size": 101,
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
SIZES |= {"num_key_value_heads": 2, "initializer_range": 0.1, "max_position_embeddings": 512}
SIZES |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}
WINDOW = {"sliding_window": 70}
MIXED = {**WINDOW, "layer_types": ["sliding_attention", "full_attention"], "head_dim": 32}
FAMILIES = {
    "llama": (hf.LlamaConfig, {}),
    "llama, heads of 20": (hf.LlamaConfig, {"head_dim": 20}),
    "mistral, window": (hf.MistralConfig, WINDOW),
    "qwen3, mixed": (hf.Qwen3Config, {**MIXED, "use_sliding_window": True}),
    "gemma2, soft-caps": (hf.Gemma2Config, {**MIXED, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 10.0}),
    "gemma3, mixed": (hf.Gemma3TextConfig, MIXED),
    "gpt-neox": (hf.GPTNeoXConfig, {}),
    "cohere": (hf.CohereConfig, {"logit_scale": 0.5}),
    "granite": (hf.GraniteConfig, {"logits_scaling": 2.0}),
    "smollm3": (hf.SmolLM3Config, {}),
}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def build(family, dtype=torch.float32):
    config_class, more = FAMILIES[family]
    torch.manual_seed(0)
    attention = "eager" if "soft-caps" in family else "sdpa"
    policy = hf.AutoModelForCausalLM.from_config(config_class(**SIZES | more), attn_implementation=attention)
    return policy.to(DEVICE, dtype).eval()


@kernels
@DTYPES
@pytest.mark.parametrize(("softcap", "vocab"), [(0.0, 32_000), (5.0, 131_072)])
def test_token_logps_and_its_gradients_against_float64(dtype, softcap, vocab):
    torch.manual_seed(0)
    hidden, weight = (
        torch.randn(300, 64, device=DEVICE).to(dtype),
        (0.3 * torch.randn(vocab, 64, device=DEVICE)).to(dtype),
    )
    targets, found = torch.randint(vocab, (300,), device=DEVICE), []
    for wide in (False, True):
        x, w = (t.double().requires_grad_() if wide else t.clone().requires_grad_() for t in (hidden, weight))
        logits = x @ w.T if wide else None
        capped = softcap * torch.tanh(logits / softcap) if wide and softcap else logits
        logps = capped.log_softmax(1).gather(1, targets[:, None])[:, 0] if wide else None
        logps = common.token_logps(x, w, targets, softcap=softcap) if logps is None else logps
        logps.sum().backward()
        found.append((logps.detach(), x.grad, w.grad))
    (logps, dx, dw), (right, right_dx, right_dw) = found
    assert (logps - right).abs().max() < 1e-4
    for grad, exact in ((dx, right_dx), (dw, right_dw)):
        assert (grad - exact).norm() < (1e-4 if dtype == torch.float32 else 1e-2) * exact.norm()


@torch.no_grad()
def plain(policy, prompts, k, n):
    """Without a cache: the whole sequence through the policy for each token."""
    out = []
    for x in prompts:
        numbers = torch.stack([uniforms(0, x, j, n) for j in range(k)]).to(DEVICE)
        ids = torch.tensor([x] * k, device=DEVICE)
        for t in range(n):
            logits = policy(input_ids=ids, use_cache=False).logits[:, -1].float()
            ids = torch.cat([ids, sample_tokens(logits, numbers[:, t], 1.0, 1.0)[:, None]], 1)
        out.append(ids[:, len(x) :].tolist())
    return out


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_slots_equal_the_way_without_a_cache(family):
    policy, prompts = build(family), [torch.randint(2, 101, (n,)).tolist() for n in (130, 3, 66)]
    common.check_architecture(policy, family)
    right = plain(policy, prompts, 3, 12)
    for slots in (2, 64):
        found = generate(policy, prompts, k=3, max_new_tokens=12, eos_ids=[], slots=slots)
        same = [a == b for ys, zs in zip(found, right, strict=True) for a, b in zip(ys, zs, strict=True)]
        assert sum(same) >= len(same) - 1, "but for a draw at the edge of two tokens"
    policy = policy.bfloat16()
    common.check_architecture(policy, family)
    for x, (y,) in zip(
        prompts, generate(policy, prompts, k=1, max_new_tokens=12, temperature=0, eos_ids=[]), strict=True
    ):
        logits = policy(input_ids=torch.tensor([x + y], device=DEVICE)).logits[0, len(x) - 1 : -1].float()
        picked = logits.gather(1, torch.tensor(y, device=DEVICE)[:, None])[:, 0]
        assert (logits.amax(1) - picked).max() < 0.03 * logits.abs().max()


@DTYPES
@torch.no_grad()
def test_response_logps_against_float64(dtype):
    policy = build("llama", dtype)
    prompts, ys = [[2, 3, 4], [5] * 40], [[6, 7], [8] * 30]
    for x, y, logp in zip(prompts, ys, response_logps(policy, prompts, ys).tolist(), strict=True):
        logits = policy(input_ids=torch.tensor([x + y], device=DEVICE)).logits[0, len(x) - 1 : -1].double()
        right = logits.log_softmax(1).gather(1, torch.tensor(y, device=DEVICE)[:, None]).sum().item()
        assert logp == pytest.approx(right, abs=(1e-4 if dtype == torch.float32 else 0.02) * len(y))


def test_split_master_is_torchs_rmsprop_on_a_float32_master():
    torch.manual_seed(0)
    start = (0.02 * torch.randn(1000, device=DEVICE)).bfloat16()
    mine, right = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.float())
    ours, theirs = common.SplitMaster([mine], 1e-4), torch.optim.RMSprop([right], 1e-4)
    for step in range(30):
        mine.grad = (0.1 * torch.randn_like(mine)).bfloat16()
        right.grad = mine.grad.float()
        if step:
            theirs.state[right]["square_avg"].copy_(ours.state[mine]["moment"])
        ours.step(), theirs.step()
    assert torch.allclose(common.join_master(mine.data, mine.master_remainder), right, rtol=2e-6, atol=1e-8)


@kernels
def test_the_memory_is_back_when_generate_returns():
    policy = build("llama", torch.bfloat16)
    settings = {"k": 4, "max_new_tokens": 64, "eos_ids": []}
    generate(policy, [[2, 3]], **settings)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    generate(policy, [[2, 3]] * 64, **settings)
    assert torch.cuda.memory_allocated() <= before + 2**20


@pytest.mark.parametrize("script", [sppo, dno, sr_dpo], ids=lambda script: script.__name__)
def test_a_short_run_and_its_resume(script, workdir, monkeypatch):
    flags = ["--limit", "200", "--n_eval", "40", "--epochs", "1", "--device", DEVICE, "--name", "x"]
    flags += [] if script is sr_dpo else ["--iterations", "2", "--k", "3"]
    evaluate, calls = script.evaluate, []

    def once(*args):
        calls.append(args[5])
        if args[5] == 1 and calls.count(1) == 1:
            raise KeyboardInterrupt
        return evaluate(*args)

    monkeypatch.setattr(script, "evaluate", once)
    with pytest.raises(SystemExit):
        common.cli(script.main, script.Args, script.RECIPES, script.__doc__, flags)
    common.cli(script.main, script.Args, script.RECIPES, script.__doc__, ["--resume", "runs/x"])
    table = [json.loads(line) for line in (workdir / "runs/x/metrics.jsonl").read_text().splitlines()]
    assert len(table) == (2 if script is sr_dpo else 3) and all(row["kl"] >= -0.5 for row in table[1:])
    policy, _ = common.load_policy(workdir / "runs/x/final", DEVICE)
    assert hasattr(next(policy.parameters()), "master_remainder") == (DEVICE == "cuda")
