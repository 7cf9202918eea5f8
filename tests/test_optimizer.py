"""SplitMaster: a float32 master in two halves, to the bit; RMSprop as torch's; a moment that is right on average."""

import copy

import pytest
import torch
from safetensors.torch import load_file

import common
import sppo
from common import SplitMaster, join_master, load_policy, make_optimizer, split_master
from test_logps import llama


@pytest.fixture
def slices(monkeypatch):
    monkeypatch.setattr(common, "SLICE", 100)  # smaller than the parameters


def train_both(steps, lr, same_moment, device="cpu", **settings):
    """SplitMaster and torch's RMSprop on float32 parameters: (start, parameters and masters of ours, torch's).

    Both get the same gradients and rates. same_moment: before each step torch's gets our moment, rounded as it is.
    """
    torch.manual_seed(0)
    start = [(torch.randn(shape) * 0.02).to(device, torch.bfloat16) for shape in ((7, 50), (33,))]
    mine, right = [torch.nn.Parameter(w.clone()) for w in start], [torch.nn.Parameter(w.float()) for w in start]
    optimizers = [SplitMaster(mine, lr, **settings), torch.optim.RMSprop(right, lr, **settings)]
    schedules = [torch.optim.lr_scheduler.LinearLR(o, 0.1, 1.0, total_iters=steps) for o in optimizers]
    for step in range(steps):
        for a, b in zip(mine, right, strict=True):
            a.grad = (0.1 * torch.randn_like(a)).bfloat16()
            b.grad = a.grad.float()
            if same_moment and step:
                optimizers[1].state[b]["square_avg"].copy_(optimizers[0].state[a]["moment"])
        for x in (*optimizers, *schedules):
            x.step()
    return start, mine, [join_master(p.data, p.master_remainder) for p in mine], right


def test_any_float32_splits_and_joins_to_the_bit():
    bits = torch.randint(-(2**31), 2**31, (200_000,), generator=torch.Generator().manual_seed(0)).int()
    edges = torch.tensor([0.0, -0.0, 1e-45, 3.4e38, -3.4e38, torch.inf, -torch.inf, 1 + 2**-8, -1 - 2**-8])
    x = torch.cat([bits.view(torch.float32), edges])
    x = x[~x.isnan()]
    weight, remainder = split_master(x)
    assert (weight.dtype, remainder.dtype) == (torch.bfloat16, torch.int16)
    assert torch.equal(join_master(weight, remainder).view(torch.int32), x.view(torch.int32))
    x = torch.randn(100_000)
    assert ((split_master(x)[0].float() - x).abs() <= (x.bfloat16().float() - x).abs()).all(), "the nearest bf16"


@pytest.mark.parametrize("settings", [{}, {"alpha": 0.9, "eps": 1e-5}], ids=str)
def test_30_steps_equal_torchs_on_a_float32_master(settings, slices):
    """Bit for bit, where torch's has the same moment."""
    start, mine, masters, right = train_both(30, 1e-4, same_moment=True, **settings)
    for w, p, master, q in zip(start, mine, masters, right, strict=True):
        assert torch.equal(master, q)
        assert torch.equal(p.data, split_master(master)[0]) and not torch.equal(p.data, w)


def test_a_tiny_learning_rate_arrives_in_full(slices):
    """Weights held in bf16 alone would stay where they are: half their spacing is a hundred times the update."""
    start, _, masters, right = train_both(60, 5e-7, same_moment=False)
    for w, master, q in zip(start, masters, right, strict=True):
        drift, intended = master - w.float(), q.data - w.float()
        assert (drift - intended).norm() < 0.05 * intended.norm()  # the stochastic rounding of a moment of 8 bits
        assert intended.abs().max() < 1e-4 < w.float().abs().max()


def test_the_moment_is_right_on_average(slices):
    """With alpha 0.999 a bf16 moment that is rounded to nearest stops within a few per cent."""
    p = torch.nn.Parameter(torch.zeros(1000).bfloat16())
    optimizer, right = SplitMaster([p], 1e-6, alpha=0.999), 0.0
    for _ in range(100):
        p.grad = torch.ones_like(p)
        optimizer.step()
        right = 0.999 * right + 0.001
    assert optimizer.state[p]["moment"].float().mean().item() == pytest.approx(right, rel=2e-3)


def test_each_element_parameter_and_step_is_rounded_anew_and_without_bias(slices):
    params = [torch.nn.Parameter(torch.zeros(1000).bfloat16()) for _ in range(2)]
    optimizer, rows = SplitMaster(params, 1e-6), []
    for _ in range(3):
        for p in params:  # the same moment in all, 0.01 g^2, between two bf16 numbers
            p.grad = torch.full_like(p, 0.37)
            optimizer.state[p]["moment"].zero_()
        optimizer.step()
        rows += [optimizer.state[p]["moment"].float() for p in params]
    rows, exact = torch.stack(rows), 0.01 * params[0].grad[0].float() ** 2
    low, high = rows.unique()  # exactly two numbers, neighbours
    assert low < exact < high < low * (1 + 2**-6)
    share = (exact - low) / (high - low)
    assert abs((rows == high).float().mean() - share) < 6 * (share * (1 - share) / 6000) ** 0.5
    assert torch.corrcoef(rows).fill_diagonal_(0).abs().max() < 0.2  # six standard errors are 0.19


def test_bf16_weights_take_8_bytes_with_their_gradient_and_float32_ones_torchs_optimiser():
    assert type(make_optimizer(llama(), 1e-3, 0.1, 10)[0]) is torch.optim.RMSprop
    with pytest.raises(ValueError, match="bf16"):
        SplitMaster(llama().parameters(), 0.1)
    first, *others = llama().bfloat16().parameters()
    optimizer, before = SplitMaster([first, *others], 0.1), first.clone()
    for p in others:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert torch.equal(first, before), "without a gradient a parameter stays"
    tensors = [x for p in others for x in (p, p.grad, *optimizer.state[p].values())]
    assert sum(x.numel() * x.itemsize for x in tensors if torch.is_tensor(x)) == 8 * sum(p.numel() for p in others)


def test_sppo_in_bf16_as_on_a_gpu_keeps_the_master_between_iterations(workdir, monkeypatch):
    def in_bf16(*args):
        policy, tokenizer = load_policy(*args)
        return policy.bfloat16(), tokenizer

    def spy(policy, *rest):
        named = policy.named_parameters()
        remainders.append({name: p.master_remainder.clone() for name, p in named if hasattr(p, "master_remainder")})
        return make_optimizer(policy, *rest)

    remainders = []  # at the start of each iteration
    monkeypatch.setattr(sppo, "load_policy", in_bf16)
    monkeypatch.setattr(sppo, "make_optimizer", spy)
    table = sppo.main(sppo.Args(limit=160, n_eval=40, iterations=2, epochs=1, name="bf16"))
    saved = load_file(workdir / "runs/bf16/iter_1/policy/master.remainders")
    assert len(table) == 3 and remainders[0] == {} and remainders[1].keys() == saved.keys()
    assert all(x.any() and torch.equal(x, remainders[1][name]) for name, x in saved.items())


def test_each_group_has_its_own_rate_a_closure_is_called_and_what_would_go_wrong_is_refused(slices):
    fast, slow = (torch.nn.Parameter(torch.ones(7, 50).bfloat16()) for _ in range(2))
    optimizer = SplitMaster([{"params": [fast], "lr": 1e-2}, {"params": [slow]}], 1e-4)
    optimizer.zero_grad()

    def closure():
        loss = (fast.float() + slow.float()).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 700
    moved = [(1 - join_master(p.data, p.master_remainder)).mean().item() for p in (fast, slow)]
    assert moved == pytest.approx([0.1, 0.001], rel=1e-2)  # lr g / sqrt(0.01 g^2)
    with pytest.raises(ValueError, match=r"contiguous bf16 parameters, got \(50, 7\)"):
        SplitMaster([{"params": [fast]}, {"params": [torch.nn.Parameter(slow.data.T)]}], 1e-4)
    with pytest.raises(ValueError, match="float32"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(3))]})


def test_state_dicts_carry_the_master(slices):
    def new():
        torch.manual_seed(0)
        layer = torch.nn.Linear(30, 20).bfloat16()
        return layer, SplitMaster(layer.parameters(), 1e-4)

    def train(layer, optimizer, steps):
        for step in steps:
            for p in layer.parameters():
                p.grad = torch.full_like(p, 0.1 * (step + 1))
            optimizer.step()
        return [join_master(p.data, p.master_remainder) for p in layer.parameters()]

    layer, optimizer = new()
    train(layer, optimizer, range(3))
    saved = copy.deepcopy([layer.state_dict(), optimizer.state_dict()])
    right = train(layer, optimizer, range(3, 6))
    layer, optimizer = new()
    layer.load_state_dict(saved[0]), optimizer.load_state_dict(saved[1])
    assert all(torch.equal(a, b) for a, b in zip(train(layer, optimizer, range(3, 6)), right, strict=True))
    assert all(p.master_remainder is optimizer.state[p]["remainder"] for p in layer.parameters())
