"""The suite of a GPU. test_scripts.py runs it in a process of its own, as conftest.py hides the GPU from all others."""

import os
import random

import pytest
import torch
from steps import cli, lines

import common
import dno
import sppo
import sr_dpo
from common import generate
from test_generate import FAMILIES, MORE, V, build, generate_plain
from test_logps import compare
from test_optimizer import train_both
from test_pairrm import WORDS, toy  # noqa: F401
from test_resume import measured_iteration

ON = "ON_CUDA" in os.environ
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # with ON_CUDA=1 and no GPU: whether this file itself is right
pytestmark = pytest.mark.skipif(not ON, reason="run by test_scripts.py where there is a GPU")
kernels = pytest.mark.skipif(DEVICE == "cpu", reason="wants a GPU")


@kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("options", "vocab"), [({}, 32_000), ({"softcap": 5.0}, 131_072)])
def test_token_logps_and_its_gradients_against_float64(dtype, options, vocab):
    error, gradients = compare(300, 64, vocab, options, dtype=dtype, device=DEVICE)
    assert error < 1e-4 and gradients < (1e-4 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("family", FAMILIES | MORE)
@torch.no_grad()
def test_slots_equal_the_way_without_a_cache(family):
    policy, lengths = build(*(FAMILIES | MORE)[family]).to(DEVICE), (40, 3, 20) if family == "gpt2" else (130, 3, 66)
    prompts = [random.Random(n).choices(range(V), k=n) for n in lengths]
    common.check_architecture(policy, family)  # log-probs, too
    settings = {"k": 3, "max_new_tokens": 12, "eos_ids": []}
    right = generate_plain(policy, prompts, **settings)
    for slots in (2, 64):
        found = generate(policy, prompts, **settings, slots=slots)
        same = [a == b for ys, zs in zip(found, right, strict=True) for a, b in zip(ys, zs, strict=True)]
        assert sum(same) >= len(same) - 1, "but for a draw at the edge of two tokens"
    policy = policy.bfloat16()
    common.check_architecture(policy, family)
    greedy = generate(policy, prompts, k=1, max_new_tokens=12, temperature=0, eos_ids=[])
    for x, (y,) in zip(prompts, greedy, strict=True):
        logits = policy(input_ids=torch.tensor([x + y], device=DEVICE)).logits[0, len(x) - 1 : -1].float()
        picked = logits.gather(1, torch.tensor(y, device=DEVICE)[:, None])[:, 0]
        assert (logits.amax(1) - picked).max() < 0.03 * logits.abs().max()


def test_split_master_is_torchs_rmsprop_on_a_float32_master():
    _, _, masters, right = train_both(30, 1e-4, same_moment=True, device=DEVICE)
    assert all(torch.allclose(master, q, rtol=2e-6, atol=1e-8) for master, q in zip(masters, right, strict=True))


@kernels
def test_the_memory_is_back_when_generate_returns():
    policy = build(*FAMILIES["llama"]).to(DEVICE, torch.bfloat16)
    settings = {"k": 4, "max_new_tokens": 64, "eos_ids": []}
    generate(policy, [[2, 3]], **settings)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    generate(policy, [[2, 3]] * 64, **settings)
    assert torch.cuda.memory_allocated() <= before + 2**20


def test_pairrm_judges_as_on_the_cpu(toy):  # noqa: F811
    prompts = [" ".join(random.Random(n).choices(WORDS, k=n)) for n in (9, 700)]
    texts = [[" ".join(random.Random(n).choices(WORDS, k=n)) for n in (1, 40, 600)] for _ in prompts]
    right = common.PairRM(str(toy))(prompts, texts)
    torch.testing.assert_close(common.PairRM(str(toy), DEVICE)(prompts, texts), right, atol=2e-3, rtol=0)


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
        cli(script, *flags)
    cli(script, "--resume", "runs/x")
    table = lines(workdir / "runs/x/metrics.jsonl")
    assert len(table) == (2 if script is sr_dpo else 3) and all(row["kl"] >= -0.5 for row in table[1:])
    policy, _ = common.load_policy(workdir / "runs/x/iter_1/policy", DEVICE)
    assert hasattr(next(policy.parameters()), "master_remainder") == (DEVICE == "cuda")


def test_a_whole_iteration_as_it_is_measured(workdir, monkeypatch):
    found = measured_iteration(workdir, monkeypatch, DEVICE)
    assert (found["killed"]["step"]["peak GB"] > 0) == (DEVICE == "cuda")
