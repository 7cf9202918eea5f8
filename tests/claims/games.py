"""Preference games small enough to be exact, and policies in them that are trained on the scripts' own losses.

A game is P (n, n), P[i, j] = P(y_i > y_j), P + P^T = 1: one prompt, n responses ("actions"). Policies are log_pi
(S, n), normalised log-probs of S runs side by side, all of one game or, P (S, n, n), each of its own. All is float64.
No response is sampled: expectations over pi_t are sums. A step of a method makes the script's loss as small as it gets.
"""

import itertools
import math
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # where the scripts are

from dno import dno_exact_loss, dno_loss
from sppo import log_partition, sppo_loss, win_rates
from sr_dpo import sr_dpo_loss


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


# Games ---------------------------------------------------------------------------------------------------------------

# Biased rock, paper, scissors: P(R > S) = 0.9, P(P > R) = P(S > P) = 0.6. Rock has the highest mean preference over all
# three; at Nash it is played in one of six.
BIASED = tensor([0.5, 0.4, 0.9], [0.6, 0.5, 0.4], [0.1, 0.6, 0.5])
NASH = tensor(1 / 6, 2 / 3, 1 / 6)

# A beats everything, narrowly, and so is Nash alone; B has the highest mean preference, as it crushes C.
CONDORCET = tensor([0.5, 0.55, 0.55], [0.45, 0.5, 0.95], [0.45, 0.05, 0.5])

# Bradley-Terry: P = sigmoid(reward - reward'), rewards 1, 0 and -1. The first is Nash and has the highest mean.
ORDERED = torch.sigmoid(tensor(1, 0, -1)[:, None] - tensor(1, 0, -1)[None])


def rock_paper_scissors(seed):
    """A cycle of three with margins P - 1/2 drawn from 0.05 to 0.45: P (3, 3) and its Nash policy (3,)."""
    rock, paper, scissors = (0.05 + 0.4 * torch.rand(3, generator=generator(seed), dtype=torch.float64)).tolist()
    P = 0.5 + tensor([0, -paper, rock], [paper, 0, -scissors], [-rock, scissors, 0])  # each's margin over its prey
    return P, nash_of_cycle(P)


def nash_of_cycle(P):
    """The Nash policy of a rock-paper-scissors P (3, 3): an action's weight is the margin of the pair it is not in."""
    weight = tensor(P[2, 1], P[0, 2], P[1, 0]) - 0.5
    return weight / weight.sum()


def random_game(n, seed):
    """P (n, n), every pair's logit drawn from N(0, 1.5^2): mostly intransitive."""
    logits = 1.5 * torch.randn(n, n, generator=generator(seed), dtype=torch.float64)
    return torch.sigmoid(logits.triu(1) - logits.triu(1).T)


def random_policies(n, seeds, scale=1.0):
    """log_pi (S, n), a row per seed, whose logits are drawn from N(0, scale^2)."""
    logits = [scale * torch.randn(n, generator=generator(seed), dtype=torch.float64) for seed in seeds]
    return torch.log_softmax(torch.stack(logits), -1)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def win_rate(P, pi):
    """P(y > pi) of each action, r_t(y) in DNO's paper. pi (..., n) probabilities -> (..., n)."""
    return (P @ pi[..., None])[..., 0]


def preference(P, pi, other):
    """P(pi > other), the mean of P(y > y') over y ~ pi, y' ~ other. Both (..., n) probabilities -> (...)."""
    return (pi * win_rate(P, other)).sum(-1)


def gap(P, pi):
    """The duality gap, max over pi' of P(pi' > pi) - 1/2, 0 exactly at Nash. pi (..., n) probabilities -> (...)."""
    return win_rate(P, pi).amax(-1) - 0.5


def kl(log_pi, log_other):
    """KL(pi || other), nats. (..., n) -> (...)."""
    return (log_pi.exp() * (log_pi - log_other)).sum(-1)


# Training ------------------------------------------------------------------------------------------------------------


def minimise(loss, start, curvature):
    """The policies log_pi (S, n) at which loss(log_pi) -> (S,) is least, by LBFGS from `start` (S, n).

    curvature (S, n): about the second derivative by each logit, which sets the scale of the steps.
    """
    scale = curvature.rsqrt()
    moved = torch.zeros_like(start, requires_grad=True)
    tight = {"max_iter": 500, "tolerance_grad": 1e-8, "tolerance_change": 1e-14, "line_search_fn": "strong_wolfe"}
    optimizer = torch.optim.LBFGS([moved], **tight)

    def closure():
        optimizer.zero_grad()
        total = loss(torch.log_softmax(start + scale * moved, -1)).sum()
        total.backward()
        return total

    optimizer.step(closure)
    return torch.log_softmax(start + scale * moved.detach(), -1)


def sppo_step(log_pi_t, P, eta, log_z="exact"):
    """Eq. 4.4 and 4.7 of arXiv 2405.00675 over all y ~ pi_t, of SPPO. log_pi_t (S, n) -> log_pi_{t+1} (S, n).

    log_z: "exact", of eq. 4.4, or "half", eta / 2 instead. SPPO's eta multiplies the preference.
    """
    pi_t = log_pi_t.exp()
    rates = win_rate(P, pi_t)
    log_z = torch.logsumexp(log_pi_t + eta * rates, -1, keepdim=True).expand_as(pi_t) if log_z == "exact" else None

    def loss(log_pi):
        return (pi_t * sppo_loss(log_pi, log_pi_t, rates, eta, log_z)).sum(-1)

    return minimise(loss, log_pi_t, 2 * pi_t)


def sampled_sppo_step(log_pi_t, P, eta, log_z, k=5, change=lambda prefs: prefs):
    """The same with win rates and log Z of K samples, over all draws of K from pi_t: what sppo.py sees of many prompts.

    P (S, n, n) or (n, n); change: prefs (B, K, K) of the samples -> those to learn from, as by sppo.official_prefs.
    log_z: "half", or "estimate", eq. 4.5. log_pi_t (S, n) -> log_pi_{t+1} (S, n).
    """
    draws = torch.tensor(list(itertools.combinations_with_replacement(range(log_pi_t.shape[-1]), k)))  # (D, K)
    orders = [math.factorial(k) / math.prod(math.factorial(row.count(y)) for y in set(row)) for row in draws.tolist()]
    seen = tensor(*orders) * log_pi_t[:, draws].sum(-1).exp()  # (S, D), how often a draw comes up in any order
    shown = P[..., draws[:, :, None], draws[:, None, :]].expand(*seen.shape, k, k)
    rates = win_rates(change(shown.flatten(0, 1)))  # (S * D, K), P^(y_k > pi_t) in each draw
    log_z = log_partition(rates, eta) if log_z == "estimate" else torch.full(rates.shape[:1], eta / 2)
    shape = (*seen.shape, k)
    rates, log_z, ref_logps = rates.view(shape), log_z.view(*seen.shape, 1).expand(shape), log_pi_t[:, draws]

    def loss(log_pi):
        return (seen * sppo_loss(log_pi[:, draws], ref_logps, rates, eta, log_z).mean(-1)).sum(-1)

    return minimise(loss, log_pi_t, 2 * log_pi_t.exp())


def in_pairs(x):
    """x (S, n) of y1 and of y2 for all pairs of actions: two (S, n, n)."""
    n = x.shape[-1]
    return x[:, :, None].expand(-1, n, n), x[:, None, :].expand(-1, n, n)


def dno_exact_step(log_pi_t, P, eta, seen=None):
    """Eq. 8 of arXiv 2404.03715, Algorithm 1, exact DNO. log_pi_t (S, n) -> log_pi_{t+1} (S, n). DNO's eta divides.

    seen (S, n, n): how often each pair is met, with a sum of 1; by default y1, y2 ~ pi_t.
    """
    (ref_1, ref_2), (r_1, r_2) = in_pairs(log_pi_t), in_pairs(win_rate(P, log_pi_t.exp()))
    seen = (ref_1 + ref_2).exp() if seen is None else seen

    def loss(log_pi):
        return (seen * dno_exact_loss(*in_pairs(log_pi), ref_1, ref_2, r_1, r_2, eta)).sum((-2, -1))

    return minimise(loss, log_pi_t, eta**2 / 4 * (seen.sum(-1) + seen.sum(-2)))


def dno_step(log_pi_t, P, eta):
    """Algorithm 2's contrastive loss over pairs y1, y2 ~ pi_t, of which P draws the better one. -> (S, n)."""
    return contrastive_step(log_pi_t, P, log_pi_t.exp(), dno_loss, eta)


def dpo_step(log_ref, P, beta, sampler):
    """DPO, sr_dpo.py's loss at lam = 0, over pairs y1, y2 ~ sampler (S, n), of which P draws the better. -> (S, n)."""

    def dpo_loss(*logps):
        *logps, beta = logps
        return sr_dpo_loss(*logps, torch.zeros_like(logps[0]), beta, lam=0.0)

    return contrastive_step(log_ref, P, sampler, dpo_loss, beta)


def contrastive_step(log_ref, P, sampler, pair_loss, eta):
    first, second = in_pairs(sampler)
    seen, (ref_1, ref_2) = 2 * first * second * P, in_pairs(log_ref)  # how often y1 is preferred to y2

    def loss(log_pi):
        return (seen * pair_loss(*in_pairs(log_pi), ref_1, ref_2, eta)).sum((-2, -1))

    return minimise(loss, log_ref, eta**2 / 2 * sampler)


def soft_policy_iteration(log_pi_t, P, eta):
    """pi_t(y) exp(r_t(y) / eta) / Z, eq. 9 of arXiv 2404.03715: what sppo_step, at 1 / eta, and dno_exact_step find."""
    return torch.log_softmax(log_pi_t + win_rate(P, log_pi_t.exp()) / eta, -1)


def play(step, start, rounds):
    """pi_1 = start (S, n), pi_{t+1} = step(pi_t): log pi_1 ... log pi_{rounds + 1}, (rounds + 1, S, n)."""
    policies = [start]
    for _ in range(rounds):
        policies.append(step(policies[-1]))
    return torch.stack(policies)


def theory_eta(rounds, n):
    """The step size of the O(1 / sqrt(T)) bound, sqrt(8 log n / T): Hedge with gains from 0 to 1."""
    return math.sqrt(8 * math.log(n) / rounds)


def average(policies):
    """The mixture of pi_1 ... pi_T, of all but the last of `play`'s (T + 1, S, n) -> probabilities (S, n)."""
    return policies[:-1].exp().mean(0)
