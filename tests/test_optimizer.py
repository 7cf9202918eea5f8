"""SplitMaster: a float32 master of bf16 weights in two halves, to the bit; RMSprop as torch's, on average."""

import pytest
import torch
from safetensors.torch import load_file

import common
import sppo
from common import SplitMaster, join_master, load_policy, make_optimizer, save_policy, split_master
from test_logps import llama


@pytest.fixture(params=["torch", "triton"])
def update(request, monkeypatch):
    """The two ways to update a parameter; Triton runs through its interpreter (conftest.py)."""
    monkeypatch.setattr(common, "SLICE", 100)  # smaller than the parameters
    if request.param == "triton":
        if common.triton is None:
            pytest.skip("triton is for Linux only")
        monkeypatch.setattr(common, "update_torch", common.update_triton)


def masters(params):
    return [join_master(p.data, p.master_remainder) for p in params]


def train_both(steps, lr, **settings):
    """The same gradients to SplitMaster and to torch's RMSprop on float32 parameters."""
    torch.manual_seed(0)
    start = [(torch.randn(shape) * 0.02).bfloat16() for shape in ((7, 50), (33,))]
    mine, right = [torch.nn.Parameter(w.clone()) for w in start], [torch.nn.Parameter(w.float()) for w in start]
    optimizers = [SplitMaster(mine, lr, **settings), torch.optim.RMSprop(right, lr, **settings)]
    schedules = [torch.optim.lr_scheduler.LinearLR(o, 0.1, 1.0, total_iters=steps) for o in optimizers]
    for _ in range(steps):
        for a, b in zip(mine, right, strict=True):
            a.grad = (0.1 * torch.randn_like(a)).bfloat16()
            b.grad = a.grad.float()
        for x in (*optimizers, *schedules):
            x.step()
    return start, mine, right


def test_any_float32_splits_and_joins_to_the_bit():
    bits = torch.randint(-(2**31), 2**31, (200_000,), generator=torch.Generator().manual_seed(0)).int()
    edges = torch.tensor([0.0, -0.0, 1e-45, 3.4e38, -3.4e38, torch.inf, -torch.inf, 1 + 2**-8, -1 - 2**-8])
    x = torch.cat([bits.view(torch.float32), edges])
    x = x[~x.isnan()]
    weight, remainder = split_master(x)
    assert (weight.dtype, remainder.dtype) == (torch.bfloat16, torch.int16)
    assert torch.equal(join_master(weight, remainder).view(torch.int32), x.view(torch.int32))


def test_the_high_half_is_the_nearest_bf16():
    x = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    weight, _ = split_master(x)
    assert ((weight.float() - x).abs() <= (x.bfloat16().float() - x).abs()).all()


def test_the_first_step_is_torchs_to_the_last_bits(update):
    """The moment is not rounded yet."""
    _, mine, right = train_both(1, 1e-4)
    for master, q in zip(masters(mine), right, strict=True):
        torch.testing.assert_close(master, q.data, rtol=2e-6, atol=1e-9)  # the interpreter has no fused multiply-add


@pytest.mark.parametrize("settings", [{}, {"alpha": 0.9, "eps": 1e-5}], ids=str)
def test_a_tiny_learning_rate_arrives_in_full(settings, update):
    """Weights held in bf16 alone would stay where they are: half their spacing is a hundred times the update."""
    start, mine, right = train_both(60, 5e-7, **settings)
    for w, p, master, q in zip(start, mine, masters(mine), right, strict=True):
        drift, intended = master - w.float(), q.data - w.float()
        assert (drift - intended).norm() < 0.05 * intended.norm()  # the stochastic rounding of a moment of 8 bits
        assert intended.abs().max() < 1e-4 < w.float().abs().max()
        assert torch.equal(p.data, split_master(master)[0])


def test_both_ways_read_and_write_the_same_state():
    """But for the random numbers by which the moment is rounded up or down."""
    if common.triton is None:
        pytest.skip("triton is for Linux only")
    results = []
    for way in (common.update_torch, common.update_triton):
        torch.manual_seed(0)
        p = torch.nn.Parameter((torch.randn(500) * 0.02).bfloat16())
        p.master_remainder, p.grad = torch.randint(-9, 9, (500,)).to(torch.int16), torch.randn(500).bfloat16()
        moment = torch.rand(500).bfloat16()
        way(p, moment, 1e-3, 0.99, 1e-8, seed=7)
        results.append((join_master(p.data, p.master_remainder), moment.float()))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=2e-6, atol=1e-9)
    assert ((results[0][1] - results[1][1]).abs() <= results[0][1] * 2**-6).all()  # at most one bf16 apart


def test_the_moment_in_bf16_follows_one_in_float32_on_average(update):
    """With alpha 0.999 a bf16 moment that is rounded to nearest stops within a few per cent."""
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.zeros(1000).bfloat16())
    optimizer, right = SplitMaster([p], 1e-6, alpha=0.999), 0.0
    for _ in range(100):
        p.grad = torch.ones_like(p)
        optimizer.step()
        right = 0.999 * right + 0.001
    moment = optimizer.state[p]["moment"].float()
    assert moment.mean().item() == pytest.approx(right, rel=2e-3)
    assert moment.unique().numel() > 3, "each element is rounded on its own"


def test_eight_bytes_per_parameter_with_the_gradient():
    policy = llama().bfloat16()
    optimizer = make_optimizer(policy, 5e-7)
    for p in policy.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    tensors = [x for p in policy.parameters() for x in (p, p.grad, p.master_remainder, *optimizer.state[p].values())]
    total = sum(x.numel() * x.itemsize for x in tensors if torch.is_tensor(x))
    assert total / policy.num_parameters() <= 8.1


def test_float32_models_get_the_optimiser_of_torch():
    assert type(make_optimizer(llama(), 1e-3)) is torch.optim.RMSprop
    assert type(make_optimizer(llama().bfloat16(), 1e-3)) is SplitMaster
    with pytest.raises(ValueError, match="bf16"):
        SplitMaster([torch.nn.Parameter(torch.ones(5))], 0.1)


def test_a_parameter_without_a_gradient_stays():
    p, q = (torch.nn.Parameter(torch.ones(5).bfloat16()) for _ in range(2))
    optimizer = SplitMaster([p, q], 0.1)
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert (p != 1).all() and (q == 1).all()


# On disk --------------------------------------------------------------------------------------------------------------


def steps_of(policy, seed, n):
    generator, optimizer = torch.Generator().manual_seed(seed), make_optimizer(policy, 1e-5)
    for _ in range(n):
        for p in policy.parameters():
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        optimizer.step()


def test_the_master_is_saved_and_loaded_to_the_bit(tmp_path, tiny):
    policy, tokenizer = load_policy(tiny)
    policy = policy.bfloat16()
    steps_of(policy, 0, 5)
    save_policy(policy, tokenizer, tmp_path / "policy")
    right = dict(zip([n for n, _ in policy.named_parameters()], masters(policy.parameters()), strict=True))
    exact, _ = load_policy(tmp_path / "policy")  # float32: the master itself
    plain = type(policy).from_pretrained(tmp_path / "policy")  # what others load
    remainders = load_file(tmp_path / "policy" / "master.safetensors")
    for name, p in plain.named_parameters():
        assert p.dtype == torch.bfloat16 and not torch.equal(p.float(), right[name])
        assert torch.equal(exact.get_parameter(name), right[name])
        assert torch.equal(join_master(p.data, remainders[name]), right[name])
        p.master_remainder = remainders[name]
    for x in (policy, plain):  # and training goes on as if nothing had happened
        steps_of(x, 1, 5)
    for a, b in zip(masters(policy.parameters()), masters(plain.parameters()), strict=True):
        assert torch.equal(a, b)


def test_sppo_in_bf16_as_on_a_gpu_keeps_the_master_between_iterations(workdir, monkeypatch):
    load = load_policy

    def in_bf16(*args):
        policy, tokenizer = load(*args)
        return policy.bfloat16(), tokenizer

    carried, make = [], common.make_optimizer

    def spy(policy, lr):
        carried.append({n: getattr(p, "master_remainder", None) for n, p in policy.named_parameters()})
        carried[-1] = {n: None if x is None else x.clone() for n, x in carried[-1].items()}
        return make(policy, lr)

    monkeypatch.setattr(sppo, "load_policy", in_bf16)
    monkeypatch.setattr(sppo, "make_optimizer", spy)
    table = sppo.main(sppo.Args(limit=160, n_eval=40, iterations=2, epochs=1, name="bf16"))
    first, second = carried
    assert len(table) == 3 and all(x is None for x in first.values())
    for name, remainder in load_file(workdir / "runs/bf16/iter_1/policy/master.safetensors").items():
        assert torch.equal(second[name], remainder) and remainder.any()
