"""SPPO: its loss by hand and on a game with a known equilibrium, its pairs, its steps as the paper writes them."""

import math

import pytest
import torch
import transformers
from steps import TWO, check_two_steps, cli, lines, log_pi, run, stopped, tensor

import sppo
from sppo import Args, log_partition, make_pairs, official_prefs, sppo_loss, win_rates

# The loss ------------------------------------------------------------------------------------------------------------


def test_win_rates_by_hand():
    prefs = tensor([[0.5, 0.9, 0.2], [0.1, 0.5, 0.6], [0.8, 0.4, 0.5]])
    torch.testing.assert_close(win_rates(prefs), tensor([1.6 / 3, 1.2 / 3, 1.7 / 3]))
    assert win_rates(torch.rand(2, 4, 4)).shape == (2, 4)
    with pytest.raises(ValueError, match=r"\(B, K, K\)"):
        win_rates(torch.rand(4, 5))


@pytest.mark.parametrize(
    ("logp", "ref", "win_rate", "eta", "loss"),
    [
        (-3.0, -5.0, 0.5, 7.0, 4.0),  # w = 1/2: h^2 = 2^2
        (-5.0, -5.0, 0.75, 8.0, 4.0),  # policy = pi_t: (8 * 0.25)^2
        (-1.0, -2.0, 0.25, 4.0, 4.0),  # (1 + 1)^2
        (-250.0, -300.0, 1.0, 1000.0, 202500.0),  # (50 - 500)^2, the size of the paper's eta
    ],
)
def test_loss_by_hand(logp, ref, win_rate, eta, loss):
    assert sppo_loss(tensor(logp), tensor(ref), tensor(win_rate), eta).item() == pytest.approx(loss, abs=1e-9)


def test_loss_gradients():
    logps, ref_logps, w = (torch.randn(6, dtype=torch.float64) for _ in range(3))
    assert torch.autograd.gradcheck(lambda x: sppo_loss(x, ref_logps, w, 3.0), logps.requires_grad_())


def test_loss_rejects_nonsense():
    one = torch.ones(2)
    with pytest.raises(ValueError, match="eta"):
        sppo_loss(one, one, one, 0.0)
    with pytest.raises(ValueError, match="shapes"):
        sppo_loss(one, one, torch.ones(2, 1), 1.0)  # would broadcast to (2, 2)
    with pytest.raises(ValueError, match="shapes"):
        sppo_loss(one, one, one, 1.0, log_z=torch.ones(2, 1))


def test_hard_labels_are_eq_412():
    """(a - 1/2)^2 + (b + 1/2)^2 with a, b = beta h of the winner and the loser, beta = 1 / eta."""
    eta, h_winner, h_loser = 20.0, 3.0, -1.0
    losses = sppo_loss(tensor(h_winner, h_loser), tensor(0.0, 0.0), tensor(1.0, 0.0), eta)
    assert losses.sum() / eta**2 == pytest.approx((h_winner / eta - 0.5) ** 2 + (h_loser / eta + 0.5) ** 2)


def test_log_partition_is_the_log_of_the_mean_weight():
    w = tensor([0.25, 0.75])
    right = math.log((math.exp(4 * 0.25) + math.exp(4 * 0.75)) / 2)
    assert log_partition(w, 4.0).item() == pytest.approx(right)
    prefs = torch.rand(100, 5, 5, dtype=torch.float64)
    prefs = (prefs + 1 - prefs.mT) / 2
    for eta in (0.1, 1.0, 50.0):  # appendix A: between eta / 2 and eta
        log_z = log_partition(win_rates(prefs), eta)
        assert (log_z >= eta / 2 - 1e-9).all() and (log_z <= eta).all()


def test_the_multiplicative_update_on_the_samples_has_no_loss():
    """If the K samples were all there is, pi_{t+1} = pi_t exp(eta w) / Z makes every term of eq. 4.5 zero."""
    w, eta = torch.rand(1, 5, dtype=torch.float64), 6.0
    pi_t = torch.full((5,), math.log(1 / 5), dtype=torch.float64)
    loss = sppo_loss(torch.log_softmax(pi_t + eta * w[0], -1), pi_t, w[0], eta, log_partition(w, eta).expand(5))
    torch.testing.assert_close(loss, torch.zeros(5, dtype=torch.float64), atol=1e-20, rtol=0)


# Pairs ---------------------------------------------------------------------------------------------------------------


def pairs_of(prefs, ids=(1, 2, 3), **args):
    rows = [{"prompt": "x", "responses": [{"ids": [i]} for i in ids]}]
    pairs = make_pairs(rows, torch.tensor([prefs]), Args(**args))
    assert all(pair["prompt"] == "x" for pair in pairs)
    return [[y["ids"][0] for y in pair["responses"]] for pair in pairs]


def test_pairs_are_the_best_and_the_worst():
    prefs = [[0.5, 0.2, 0.6], [0.8, 0.5, 0.9], [0.4, 0.1, 0.5]]
    assert pairs_of(prefs) == [[2, 3]]
    assert pairs_of(prefs, pairing="all") == [[2, 1, 3]]


def test_best_and_worst_go_by_the_mean_score_not_by_the_mean_probability():
    """y1 beats y2 by 0.999 and loses to y3 by 0.3: mean probability 0.5997, mean score (6.9 - 0.85) / 3 = 2.02.
    y3 wins twice by 0.7: mean probability 0.633, mean score 0.56."""
    prefs = [[0.5, 0.999, 0.3], [0.001, 0.5, 0.3], [0.7, 0.7, 0.5]]
    assert pairs_of(prefs) == [[1, 2]]
    assert win_rates(torch.tensor([prefs])).argmax() == 2


def test_nothing_preferred_or_nothing_different_makes_no_pair():
    tie = [[0.5] * 3] * 3
    clear = [[0.5, 0.9, 0.9], [0.1, 0.5, 0.5], [0.1, 0.5, 0.5]]
    assert pairs_of(tie) == []
    assert pairs_of(clear, ids=(1, 1, 1)) == []
    assert pairs_of(clear) == [[1, 3]]


def test_pairs_carry_their_targets_and_log_z():
    prefs, rows = torch.tensor([[[0.5, 1.0], [0.0, 0.5]]]), [{"responses": [{"ids": [1]}, {"ids": [2]}]}]
    flags = {}, {"log_z": "estimate"}, {"targets": "hard"}
    half, estimate, hard = (make_pairs(rows, prefs, Args(eta=4.0, **more))[0] for more in flags)
    assert half["win_rate"] == [0.75, 0.25] and half["log_z"] == [2.0, 2.0]
    assert estimate["log_z"] == pytest.approx([math.log((math.exp(3) + math.exp(1)) / 2)] * 2)
    assert hard["win_rate"] == [1.0, 0.0]  # eq. 4.12


def test_official_prefs_are_those_of_the_scores_of_the_official_code():
    """PairRM's rank gives each response the mean over k of M(y, y_k) - M(y_k, y); P is the sigmoid of a difference."""
    logits = torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(0)) * (1 - torch.eye(4))  # M
    scores = [[sum(float(m[i, k] - m[k, i]) for k in range(4)) / 4 for i in range(4)] for m in logits]
    theirs = [[[1 / (1 + math.exp(b - a)) for b in row] for a in row] for row in scores]
    mine = official_prefs(torch.sigmoid((logits - logits.mT) / 2))  # of this project's P
    torch.testing.assert_close(mine, torch.tensor(theirs), atol=1e-5, rtol=0)


# Steps ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings", [{"micro_tokens": 1}, {"pairing": "all", "log_z": "estimate"}, {"targets": "hard"}], ids=str
)
def test_the_steps_minimise_eq_47_as_written_from_the_paper(workdir, tiny, settings):
    folder, _ = run(sppo, **TWO, eta=2.0, **settings)

    def value(policy, pair):
        h = log_pi(policy, pair) - torch.tensor(pair["ref_logps"])
        log_z = torch.tensor(pair["log_z"]) if "log_z" in settings else 1.0  # eta / 2
        return ((h - (2.0 * torch.tensor(pair["win_rate"]) - log_z)) ** 2).mean()

    pairs, steps = check_two_steps(folder, tiny, value)
    reference = transformers.AutoModelForCausalLM.from_pretrained(tiny)
    with torch.no_grad():
        for pair in pairs[:5]:  # pi_t is the start
            torch.testing.assert_close(torch.tensor(pair["ref_logps"]), log_pi(reference, pair), atol=1e-3, rtol=0)
    assert abs(steps[0]["chosen_log_ratio"]) < 1e-4 < abs(steps[1]["chosen_log_ratio"])
    assert [step["epoch"] for step in steps] == [1, 2] and [step["step"] for step in steps] == [1, 2]


def test_every_epoch_has_each_pair_once_in_an_order_of_its_own(workdir, monkeypatch):
    seen, cut = [], sppo.micro_batches
    monkeypatch.setattr(sppo, "micro_batches", lambda *x: seen.append([str(y["prompt"]) for y in x[1]]) or cut(*x))
    folder, table = run(sppo, limit=40, n_eval=4, iterations=1, epochs=2, batch_size=10)
    n = math.ceil(table[1]["pairs"] / 10)
    first, second = ([prompt for batch in part for prompt in batch] for part in (seen[:n], seen[n:]))
    pairs = sorted(str(pair["prompt"]) for pair in lines(folder / "iter_1/pairs.jsonl"))
    assert sorted(first) == sorted(second) == pairs and first != second


def test_the_schedule_may_be_longer_than_the_training(workdir):
    """4 steps of the first of 18 epochs, with a warmup of int(0.1 * 72) = 7 steps: the rate rises by lr / 7 a step."""
    few = {"limit": 60, "n_eval": 4, "iterations": 1, "epochs": 1, "schedule_epochs": 18, "learning_rate": 7e-5}
    folder, table = run(sppo, **few, batch_size=15)
    steps = lines(folder / "iter_1/steps.jsonl")
    assert 45 < table[1]["pairs"] <= 56 and len(steps) == 4
    assert [row["learning_rate"] for row in steps] == pytest.approx([0, 1e-5, 2e-5, 3e-5])


@pytest.mark.parametrize(("warmup", "rates"), [(2.0, [0, 4e-5, 8e-5, 4e-5]), (0.5, [0, 4e-5, 8e-5, 4e-5]), (8.0, None)])
def test_a_warmup_is_a_number_of_steps_or_a_share_of_them(workdir, capsys, warmup, rates):
    few = {"limit": 60, "n_eval": 4, "iterations": 1, "epochs": 1, "learning_rate": 8e-5, "batch_size": 15}
    folder, _ = run(sppo, **few, warmup_steps=warmup)
    found = [row["learning_rate"] for row in lines(folder / "iter_1/steps.jsonl")]
    assert found == pytest.approx(rates or [0, 1e-5, 2e-5, 3e-5])
    assert ("the rate never reaches" in capsys.readouterr().out) == (rates is None)


def test_a_gradient_that_is_not_finite_ends_the_run_in_one_line(workdir, monkeypatch, capsys):
    monkeypatch.setattr(sppo, "sppo_loss", lambda logps, *_: logps * math.nan)
    assert "lower --learning_rate" in stopped(capsys, cli, sppo, "--limit", "40", "--n_eval", "4")


def test_the_recipe_has_the_values_of_the_paper():
    paper = Args(**sppo.RECIPES["paper"])
    assert (paper.k, paper.eta, paper.iterations, paper.learning_rate, paper.batch_size) == (5, 1e3, 3, 5e-7, 64)
    assert (paper.temperature, paper.top_p, paper.epochs, paper.warmup_steps) == (1.0, 1.0, 1, 0.1)
    assert paper.schedule_epochs == 18  # 312 steps: to 2.77e-7, 1.39e-7 in the mean
    policy = torch.nn.Linear(1, 1)
    policy.dtype = torch.float32
    _, scheduler = sppo.make_optimizer(policy, 5e-7, 0.1, 18 * 312)
    rates = [5e-7 * scheduler.lr_lambdas[0](step) for step in range(312)]
    assert (max(rates), sum(rates) / 312) == pytest.approx((2.77e-7, 1.39e-7), rel=5e-3)
