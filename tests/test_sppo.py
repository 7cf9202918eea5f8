import copy
import math

import pytest
import torch
from transformers import get_constant_schedule

import common
from sppo import RECIPES, Args, log_partition, make_pairs, sppo_loss, train_step, win_rates
from test_logps import PROMPTS, RESPONSES, gpt2, llama


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


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


def test_loss_at_its_known_points():
    logps, w = -10 * torch.rand(50), torch.rand(50)
    h = torch.randn(50)
    torch.testing.assert_close(sppo_loss(logps, logps, w, 30.0), (30 * (w - 0.5)) ** 2, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sppo_loss(logps + h, logps, torch.full((50,), 0.5), 30.0), h**2, rtol=1e-4, atol=1e-4)


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
    log_pi = torch.log_softmax(math.log(1 / 5) + eta * w, -1)
    loss = sppo_loss(
        log_pi[0], torch.full((5,), math.log(1 / 5), dtype=torch.float64), w[0], eta, log_partition(w, eta).expand(5)
    )
    torch.testing.assert_close(loss, torch.zeros(5, dtype=torch.float64), atol=1e-20, rtol=0)


# The game ------------------------------------------------------------------------------------------------------------

# Biased rock, paper, scissors: P(R > S) = 0.9, P(P > R) = 0.6, P(S > P) = 0.6; at Nash 1/6, 2/3, 1/6.
GAME = tensor([0.5, 0.4, 0.9], [0.6, 0.5, 0.4], [0.1, 0.6, 0.5])
NASH = tensor(1 / 6, 2 / 3, 1 / 6)


def duality_gap(policy):
    return (GAME @ policy).max().item() - 0.5


def average_iterate(T, exact_log_z):
    """T iterations of self-play on GAME, the shipped loss minimised over y ~ pi_t by natural-gradient steps."""
    eta, theta, total = 8 / math.sqrt(T), tensor(0.5, 0.0, -0.5), torch.zeros(3, dtype=torch.float64)
    for _ in range(T):
        log_pi_t = torch.log_softmax(theta, 0)
        pi_t, w = log_pi_t.exp(), GAME @ log_pi_t.exp()  # w: P(y > pi_t), exactly
        log_z = torch.logsumexp(log_pi_t + eta * w, 0).expand(3) if exact_log_z else None
        total += pi_t
        for _ in range(4):
            theta.requires_grad_()
            loss = (pi_t * sppo_loss(torch.log_softmax(theta, 0), log_pi_t, w, eta, log_z)).sum()
            (gradient,) = torch.autograd.grad(loss, theta)
            theta = theta.detach() - gradient / (2 * pi_t)  # at pi_t the Hessian is 2 (diag(pi_t) - pi_t pi_t^T)
    return total / T


@pytest.mark.parametrize("exact_log_z", [True, False], ids=["exact log Z", "eta / 2"])
def test_the_average_iterate_reaches_nash_on_an_intransitive_game(exact_log_z):
    """Theorem 4.1: with eta ~ 1 / sqrt(T) the average's duality gap is O(1 / sqrt(T)). The last iterate may cycle."""
    assert duality_gap(NASH) == pytest.approx(0, abs=1e-9)  # the game is what we think it is
    short, middle, long = (average_iterate(T, exact_log_z) for T in (30, 300, 6000))
    assert (long - NASH).abs().max() < 0.02
    assert duality_gap(short) > 2 * duality_gap(middle) > 4 * duality_gap(long) > 0


# Pairs ---------------------------------------------------------------------------------------------------------------


def responses(*ids):
    return [[{"ids": list(row), "text": str(row)} for row in ids]]


def pairs_of(prefs, ids=((1,), (2,), (3,)), **args):
    prefs = torch.tensor([prefs])
    prompt = [{"prompt": [], "prompt_ids": [7]}]
    return [[y["ids"][0] for y in row["responses"]] for row in make_pairs(prompt, responses(*ids), prefs, Args(**args))]


def test_pairs_are_the_best_and_the_worst():
    prefs = [[0.5, 0.2, 0.6], [0.8, 0.5, 0.9], [0.4, 0.1, 0.5]]
    assert pairs_of(prefs) == [[2, 3]]
    assert pairs_of(prefs, pairs="all") == [[2, 1, 3]]


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
    assert pairs_of(clear, ids=((1,), (1,), (1,))) == []
    assert pairs_of(clear) == [[1, 3]]


def test_pairs_carry_log_z():
    prefs = torch.tensor([[[0.5, 1.0], [0.0, 0.5]]])
    half, estimate = (
        make_pairs([{"prompt_ids": [7]}], responses([1], [2]), prefs, Args(eta=4.0, log_z=z))
        for z in ("half", "estimate")
    )
    assert half[0]["log_z"] == 2.0
    assert estimate[0]["log_z"] == pytest.approx(math.log((math.exp(3) + math.exp(1)) / 2))


# The step ------------------------------------------------------------------------------------------------------------


def batch_for(policy):
    """Four rows of two responses each with the policy's own log-probs as reference."""
    second = [[*row[::-1], 2] for row in RESPONSES]
    rows = []
    for x, *ys in zip(PROMPTS, RESPONSES, second, strict=True):
        logps = common.score(policy, [x, x], ys, 10_000).tolist()
        chosen = [{"ids": y, "ref_logps": p, "win_rate": w} for y, p, w in zip(ys, logps, (0.8, 0.3), strict=True)]
        rows.append({"prompt_ids": x, "responses": chosen, "log_z": 1.0})
    return rows


def step(policy, batch, **args):
    args = Args(eta=2.0, **args)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.01)
    return train_step(policy, optimizer, get_constant_schedule(optimizer), batch, args)


def test_the_first_step_starts_from_log_ratio_zero_even_with_dropout():
    policy = gpt2(dropout=0.5)
    metrics = step(policy, batch_for(policy), micro_tokens=10_000)
    assert abs(metrics["chosen_log_ratio"]) < 1e-5 and abs(metrics["rejected_log_ratio"]) < 1e-5
    assert metrics["loss"] == pytest.approx(((2 * 0.3) ** 2 + (2 * 0.2) ** 2) / 2, rel=1e-4)  # (eta (w - 1/2))^2


def test_the_step_minimises_eq_47_as_written_from_the_paper():
    """Against an independent float64 loop: one token after another, squares, one mean, its gradient."""
    policy = llama()
    batch = batch_for(policy)
    for row in batch:
        for response in row["responses"]:
            response["ref_logps"] -= 0.7  # as if the policy had moved
    right = copy.deepcopy(policy).double()
    terms = []
    for row in batch:
        for response in row["responses"]:
            log_pi = 0.0
            for n, token in enumerate(response["ids"]):
                before = row["prompt_ids"] + response["ids"][:n]
                log_pi = log_pi + right(torch.tensor([before])).logits[0, -1].softmax(-1)[token].log()
            terms.append((log_pi - response["ref_logps"] - 2.0 * (response["win_rate"] - 0.5)) ** 2)
    loss = sum(terms) / len(terms)
    loss.backward()
    norm = math.sqrt(sum(p.grad.square().sum().item() for p in right.parameters()))
    metrics = step(policy, batch, max_grad_norm=1e9)
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-3)
    for mine, p in zip(policy.parameters(), right.parameters(), strict=True):
        torch.testing.assert_close(mine.double(), p - 0.01 * p.grad, atol=1e-4, rtol=1e-3)


def test_neither_micro_batches_nor_order_change_the_step():
    results = []
    for micro_tokens, order in ((1, 1), (20, 1), (10_000, 1), (10_000, -1)):
        policy = llama()
        metrics = step(policy, batch_for(policy)[::order], micro_tokens=micro_tokens)
        results.append((metrics["loss"], torch.cat([p.detach().flatten() for p in policy.parameters()])))
    for loss, weights in results[1:]:
        assert loss == pytest.approx(results[0][0], rel=1e-5)
        torch.testing.assert_close(weights, results[0][1], atol=1e-5, rtol=1e-4)


def test_hard_targets_replace_the_win_rates():
    policy = llama()
    metrics = step(policy, batch_for(policy), targets="hard")
    assert metrics["loss"] == pytest.approx(1.0, rel=1e-4)  # (2 (1 - 1/2))^2 and (2 (0 - 1/2))^2


def test_a_gradient_that_is_not_finite_stops_before_the_weights_change():
    policy = llama()
    batch = batch_for(policy)
    batch[0]["responses"][0]["win_rate"] = float("nan")
    before = copy.deepcopy(policy.state_dict())
    with pytest.raises(RuntimeError, match="non-finite"):
        step(policy, batch)
    assert all(torch.equal(before[name], value) for name, value in policy.state_dict().items())


def test_recipes_name_arguments_and_models_that_exist():
    for name, recipe in RECIPES.items():
        assert name == "other" or name in common.MODELS
        common.check_args(Args(**recipe))
    paper = Args(**RECIPES["mistral-7b"])
    assert (paper.k, paper.eta, paper.iterations, paper.learning_rate, paper.batch_size) == (5, 1e3, 3, 5e-7, 64)
    assert (paper.temperature, paper.top_p, paper.epochs, paper.warmup_ratio) == (1.0, 1.0, 1, 0.1)
