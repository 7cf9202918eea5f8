from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file

import common
import sppo
from common import MASTER, InputError, SplitMaster, join_master, load_policy, make_optimizer, save_policy, split_master
from test_logps import llama

RULES = {
    "rmsprop": (torch.optim.RMSprop, {}),
    "rmsprop-alpha": (torch.optim.RMSprop, {"alpha": 0.9, "eps": 1e-5}),
    "adamw": (torch.optim.AdamW, {}),
    "adamw-betas": (torch.optim.AdamW, {"betas": (0.8, 0.95), "weight_decay": 0.1}),
}


@pytest.fixture(params=["torch", "triton"])
def update(request, monkeypatch):
    """The two ways to update a parameter; Triton runs through its interpreter (conftest.py)."""
    monkeypatch.setattr(common, "SLICE", 100)  # smaller than the parameters
    if request.param == "triton":
        if common.triton is None:
            pytest.skip("triton is for Linux only")
        monkeypatch.setattr(common, "update_master", common.update_master_triton)
    return request.param


def masters(params):
    return [join_master(p.data, p.master_remainder) for p in params]


def train_both(rule, steps, lr, moments=torch.float32, scale=0.1):
    """The same gradients to SplitMaster and to torch.optim on float32 parameters."""
    torch_class, settings = RULES[rule]
    torch.manual_seed(0)
    start = [(torch.randn(shape) * 0.02).bfloat16() for shape in ((7, 50), (33,))]
    mine, right = [torch.nn.Parameter(w.clone()) for w in start], [torch.nn.Parameter(w.float()) for w in start]
    optimizers = [
        SplitMaster(mine, lr, rule.split("-")[0], moments=moments, **settings),
        torch_class(right, lr, **settings),
    ]
    schedules = [torch.optim.lr_scheduler.LinearLR(o, 0.1, 1.0, total_iters=steps) for o in optimizers]
    for _ in range(steps):
        for a, b in zip(mine, right, strict=True):
            a.grad = (scale * torch.randn_like(a)).bfloat16()
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


@pytest.mark.parametrize("rule", RULES)
def test_200_steps_equal_a_float32_master_of_torch_bit_for_bit(rule, monkeypatch):
    monkeypatch.setattr(common, "SLICE", 100)
    start, mine, right = train_both(rule, 200, 1e-4)
    for w, master, p, q in zip(start, masters(mine), mine, right, strict=True):
        assert torch.equal(master, q.data)
        assert torch.equal(p.data, split_master(q.data)[0])
        assert not torch.equal(p.data, w), "and it went somewhere"


@pytest.mark.parametrize("rule", RULES)
def test_the_triton_kernel_goes_the_same_way(rule, update):
    _, mine, right = train_both(rule, 30, 1e-4)
    for master, q in zip(masters(mine), right, strict=True):
        torch.testing.assert_close(master, q.data, rtol=2e-6, atol=1e-9)  # its interpreter has no fused multiply-add


@pytest.mark.parametrize("rule", ["rmsprop", "adamw"])
@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16])
def test_a_tiny_learning_rate_arrives_in_full(rule, moments, update):
    """Weights held in bf16 alone would stay where they are: half their spacing is a hundred times the update."""
    lr, steps = 5e-7, 60
    start, mine, right = train_both(rule, steps, lr, moments)
    for w, master, q in zip(start, masters(mine), right, strict=True):
        drift, intended = master - w.float(), q.data - w.float()
        # An ulp of a weight here or there, by the CPU's make; else the stochastic rounding of v, of 8 bits.
        tolerance = 1e-4 if moments == torch.float32 else 0.05
        assert (drift - intended).norm() < tolerance * intended.norm()
        assert intended.abs().max() < 1e-4 < w.float().abs().max()
    alone, frozen = [w.clone() for w in start], [w.clone() for w in start]
    for w in alone:
        for _ in range(steps):
            w -= lr * torch.ones_like(w)
    moved = sum((a != b).sum() for a, b in zip(alone, frozen, strict=True)) / sum(map(torch.numel, alone))
    assert moved < 0.05


@pytest.mark.parametrize("rule", ["rmsprop", "adamw"])
def test_moments_in_bf16_follow_those_in_float32_on_average(rule, update):
    """With decay 0.99 a bf16 moment that is rounded to nearest stops within a few per cent; here 99.5 % must go."""
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.zeros(1000).bfloat16())
    optimizer = SplitMaster([p], 1e-6, rule, **({"alpha": 0.999} if rule == "rmsprop" else {}))
    right, steps = 0.0, 100
    for _ in range(steps):
        p.grad = torch.ones_like(p)
        optimizer.step()
        right = 0.999 * right + 0.001
    second = optimizer.state[p]["second"].float()
    assert second.mean().item() == pytest.approx(right, rel=2e-3)
    assert second.unique().numel() > 3, "each element is rounded on its own"


def test_eight_bytes_per_parameter_with_the_gradient():
    policy = llama().bfloat16()
    optimizer = make_optimizer(policy, "rmsprop", 5e-7)
    for p in policy.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    tensors = [x for p in policy.parameters() for x in (p, p.grad, p.master_remainder, *optimizer.state[p].values())]
    total = sum(x.numel() * x.itemsize for x in tensors if torch.is_tensor(x))
    assert total / policy.num_parameters() <= 8.1


def test_float32_models_get_the_optimisers_of_torch():
    for rule, right in (("rmsprop", torch.optim.RMSprop), ("adamw", torch.optim.AdamW)):
        assert type(make_optimizer(llama(), rule, 1e-3)) is right
        assert type(make_optimizer(llama().bfloat16(), rule, 1e-3)) is SplitMaster


def test_a_parameter_without_a_gradient_stays():
    p, q = (torch.nn.Parameter(torch.ones(5).bfloat16()) for _ in range(2))
    optimizer = SplitMaster([p, q], 0.1)
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert (p != 1).all()
    assert (q == 1).all()


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match="bf16"):
        SplitMaster([torch.nn.Parameter(torch.ones(5))], 0.1)
    with pytest.raises(ValueError, match="rule"):
        SplitMaster([torch.nn.Parameter(torch.ones(5).bfloat16())], 0.1, "sgd")


# On disk --------------------------------------------------------------------------------------------------------------


def steps_of(policy, optimizer, seed, n):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(n):
        for p in policy.parameters():
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        optimizer.step()


def test_the_master_is_saved_and_loaded_to_the_bit(tmp_path, workdir):
    policy, tokenizer = load_policy("tiny", dtype=torch.bfloat16)
    steps_of(policy, make_optimizer(policy, "rmsprop", 1e-5), 0, 5)
    save_policy(policy, tokenizer, tmp_path / "policy")
    assert (tmp_path / "policy" / MASTER).exists()
    right = dict(zip([n for n, _ in policy.named_parameters()], masters(policy.parameters()), strict=True))
    again, _ = load_policy(tmp_path / "policy", dtype=torch.bfloat16)
    exact, _ = load_policy(tmp_path / "policy")  # float32: the master itself
    plain = type(policy).from_pretrained(tmp_path / "policy")  # what others load
    for name, p in again.named_parameters():
        assert torch.equal(join_master(p.data, p.master_remainder), right[name])
        assert torch.equal(exact.get_parameter(name), right[name])
        assert torch.equal(plain.get_parameter(name), p)
        assert not torch.equal(p.float(), right[name])
    # and training goes on as if nothing had happened
    for x in (policy, again):
        steps_of(x, make_optimizer(x, "rmsprop", 1e-5), 1, 5)
    for a, b in zip(masters(policy.parameters()), masters(again.parameters()), strict=True):
        assert torch.equal(a, b)


def test_a_float32_policy_leaves_no_master(tmp_path, workdir):
    policy, tokenizer = load_policy("tiny")
    save_policy(policy, tokenizer, tmp_path / "policy")
    assert not (tmp_path / "policy" / MASTER).exists()


@pytest.mark.parametrize(
    "broken", ["truncated", "a name less", "a name more", "another shape", "another dtype", "a folder"]
)
def test_a_master_of_other_weights_is_refused(broken, tmp_path, workdir):
    policy, tokenizer = load_policy("tiny", dtype=torch.bfloat16)
    make_optimizer(policy, "rmsprop", 1e-5)
    save_policy(policy, tokenizer, tmp_path / "policy")
    file = tmp_path / "policy" / MASTER
    (tmp_path / "policy" / "sha256").unlink()  # with it any change is refused
    rests = load_file(file)
    name = next(iter(rests))
    if broken == "truncated":
        file.write_bytes(file.read_bytes()[:-9])
    elif broken == "a folder":
        file.unlink()
        file.mkdir()
    else:
        rest = rests.pop(name)
        last = {
            "a name less": {},
            "a name more": {name: rest, "other": rest.clone()},
            "another shape": {name: rest.T.contiguous()},  # with as many elements
            "another dtype": {name: rest.int()},
        }
        save_file({**rests, **last[broken]}, file)
    with pytest.raises(InputError, match=MASTER):
        load_policy(tmp_path / "policy")


def test_sppo_learns_in_bf16_as_on_a_gpu_and_keeps_the_master_between_iterations(workdir, monkeypatch, one_thread):
    monkeypatch.setattr(common, "load_policy", partial(load_policy, dtype=torch.bfloat16))
    carried, make = [], common.make_optimizer

    def spy(policy, rule, lr):
        carried.append({n: getattr(p, "master_remainder", None) for n, p in policy.named_parameters()})
        carried[-1] = {n: None if x is None else x.clone() for n, x in carried[-1].items()}
        return make(policy, rule, lr)

    monkeypatch.setattr(common, "make_optimizer", spy)
    settings = {"limit": 640, "n_eval": 160, "iterations": 2, "epochs": 2}
    start, _, last = sppo.main(sppo.Args(**settings, name="bf16"))
    assert last["exact_match"] > start["exact_match"] + 0.1
    first, second = carried
    assert all(x is None for x in first.values())
    for name, rest in load_file(workdir / "runs" / "bf16" / "iter_1" / "policy" / MASTER).items():
        assert torch.equal(second[name], rest)
        assert rest.any()
