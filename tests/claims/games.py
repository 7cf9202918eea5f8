"""Preference games small enough to be exact, and policies in them that are trained on the scripts' own losses.

    python tests/claims/games.py NAME        NAME is one of CLAIMS, below, or all: half a minute

prints the figures of a claim and a verdict, and writes results/NAME.json beside this file. A claim holds where all of
its parts are true. Claims about samples of K are in samples.py.

A game is P (n, n), P[i, j] = P(y_i > y_j), P + P^T = 1: one prompt, n responses ("actions"). Policies are log_pi
(S, n), normalised log-probs of S runs side by side. All is float64. No response is sampled: expectations over pi_t are
sums. A step of a method minimises the script's loss.
"""

import argparse
import json
import math
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # tests
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # where the scripts are

from steps import tensor

from dno import dno_exact_loss
from measure import RESULTS, write
from sppo import sppo_loss
from sr_dpo import sr_dpo_loss

# Biased rock, paper, scissors: P(R > S) = 0.9, P(P > R) = P(S > P) = 0.6. Rock has the highest mean preference over all
# three; at Nash it is played in one of six.
BIASED = tensor([0.5, 0.4, 0.9], [0.6, 0.5, 0.4], [0.1, 0.6, 0.5])
NASH = tensor(1 / 6, 2 / 3, 1 / 6)


def random_policies(n, seeds):
    """log_pi (S, n), a row per seed, whose logits are drawn from N(0, 1)."""
    logits = [torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) for seed in seeds]
    return torch.log_softmax(torch.stack(logits), -1)


def win_rate(P, pi):
    """P(y > pi) of each action, r_t(y) in DNO's paper. pi (..., n) probabilities -> (..., n)."""
    return (P @ pi[..., None])[..., 0]


def gap(P, pi):
    """The duality gap, max over pi' of P(pi' > pi) - 1/2, 0 exactly at Nash. pi (..., n) probabilities -> (...).

    Theorem 4.1 of SPPO bounds max over pi' of P(pi' > pi) - min over pi' of P(pi > pi'), which is twice this.
    """
    return win_rate(P, pi).amax(-1) - 0.5


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


def in_pairs(x):
    """x (S, n) of y1 and of y2 for all pairs of actions: two (S, n, n)."""
    n = x.shape[-1]
    return x[:, :, None].expand(-1, n, n), x[:, None, :].expand(-1, n, n)


def dno_exact_step(log_pi_t, P, eta, tau=0.0, log_start=0.0):
    """Eq. 8 of arXiv 2404.03715, Algorithm 1, exact DNO. log_pi_t (S, n) -> log_pi_{t+1} (S, n). DNO's eta divides.

    tau > 0: Algorithm 3, option I. The reference is pi_t^(1 - tau / eta) pi_start^(tau / eta), eq. 14, unnormalised.
    """
    (first, second), (r_1, r_2) = in_pairs(log_pi_t), in_pairs(win_rate(P, log_pi_t.exp()))
    ref_1, ref_2 = in_pairs((1 - tau / eta) * log_pi_t + tau / eta * log_start)
    seen = (first + second).exp()  # y1, y2 ~ pi_t

    def loss(log_pi):
        return (seen * dno_exact_loss(*in_pairs(log_pi), ref_1, ref_2, r_1, r_2, eta)).sum((-2, -1))

    return minimise(loss, log_pi_t, eta**2 / 4 * (seen.sum(-1) + seen.sum(-2)))


def dpo_step(log_ref, P, beta, sampler):
    """DPO, sr_dpo.py's loss at lam = 0, over pairs y1, y2 ~ sampler (S, n), of which P draws the better. -> (S, n)."""
    (first, second), (ref_1, ref_2) = in_pairs(sampler), in_pairs(log_ref)
    seen = 2 * first * second * P  # how often y1 is preferred to y2

    def loss(log_pi):
        losses = sr_dpo_loss(*in_pairs(log_pi), ref_1, ref_2, torch.zeros_like(ref_1), beta, lam=0.0)
        return (seen * losses).sum((-2, -1))

    return minimise(loss, log_ref, beta**2 / 2 * sampler)


def play(step, start, rounds):
    """pi_1 = start (S, n), pi_{t+1} = step(pi_t): log pi_1 ... log pi_{rounds + 1}, (rounds + 1, S, n)."""
    policies = [start]
    for _ in range(rounds):
        policies.append(step(policies[-1]))
    return torch.stack(policies)


def average(policies):
    """The mixture of pi_1 ... pi_T, of all but the last of `play`'s (T + 1, S, n) -> probabilities (S, n)."""
    return policies[:-1].exp().mean(0)


# Claims --------------------------------------------------------------------------------------------------------------


def average_iterate(seeds=5, rounds=(10, 30, 100, 300, 1000, 3000)):
    """The average iterate's duality gap is O(1 / sqrt(T)). The last iterate cycles, and its gap does not fall."""
    start = random_policies(3, range(1, seeds + 1))
    curves = {name: {"average": [], "last": []} for name in ("SPPO", "SPPO, eta / 2", "exact DNO", "DPO")}
    bound = []
    for T in rounds:
        eta = math.sqrt(8 * math.log(3) / T)  # of the O(1 / sqrt(T)) bound, nothing is tuned; 1 / eta in DNO's sense
        steps = {
            "SPPO": lambda log_pi, eta=eta: sppo_step(log_pi, BIASED, eta),
            "SPPO, eta / 2": lambda log_pi, eta=eta: sppo_step(log_pi, BIASED, eta, "half"),
            "exact DNO": lambda log_pi, eta=eta: dno_exact_step(log_pi, BIASED, 1 / eta),
        }
        for name, step in steps.items():
            policies = play(step, start, T)
            curves[name]["average"].append(gap(BIASED, average(policies)).tolist())
            curves[name]["last"].append(gap(BIASED, policies[T].exp()).tolist())
        bound.append((-start.amin(-1) / (eta * T) + eta / 8).tolist())  # Hedge's regret over T, from this start
        curves["DPO"]["last"].append(gap(BIASED, dpo_step(start, BIASED, 1 / (eta * T), start.exp()).exp()).tolist())
    averages, lasts = (tensor(*(curves[name][kind] for name in steps)) for kind in ("average", "last"))  # (3, T, seeds)
    late = [i for i, T in enumerate(rounds) if T >= 100]
    x, y = tensor(*rounds).log()[late], averages.log()[:, late]
    x = (x - x.mean())[:, None]
    slopes = (x * y).sum(1) / (x**2).sum()  # of log gap over log T, by least squares: (3, seeds)
    still = lasts[:, -3:].mean() > lasts[:, :3].mean() / 2
    parts = {
        "every average's gap is below log(1 / min pi_1) / (eta T) + eta / 8": averages <= tensor(*bound),
        "the average's gap falls at least like T^-0.4 from T = 100, every start": slopes < -0.4,
        "the last's gap over the three longest runs is at least half of that over the three shortest": still,
        "in the longest runs the last's gap is above the average's": lasts[:, -1] > averages[:, -1],
    }
    figures = {
        name: {
            "exponent of the average's gap from T = 100": slopes[i].tolist(),
            f"average's gap at T = {rounds[-1]}": averages[i, -1].tolist(),
            f"last's gap at T = {rounds[-1]}": lasts[i, -1].tolist(),
        }
        for i, name in enumerate(steps)
    }
    return parts, figures, {"rounds": list(rounds), "curves": curves, "bound": bound}


def regularised(seeds=5, rounds=1000, taus=(0.02, 0.1)):
    """In DNO's regularised game the last iterate settles, where SPPO's cycles. In three rounds it changes little.

    eta is 1 and the start is the reference policy. How far a gap moves: its range over the last quarter of the rounds.
    """
    start = random_policies(3, range(1, seeds + 1))
    plays = [play(lambda log_pi: sppo_step(log_pi, BIASED, 1.0, "half"), start, rounds)]
    for tau in taus:
        plays.append(play(lambda log_pi, tau=tau: dno_exact_step(log_pi, BIASED, 1.0, tau, start), start, rounds))
    gaps = gap(BIASED, torch.stack(plays).exp())  # (SPPO and each tau, rounds + 1, seeds)
    late = gaps[:, -rounds // 4 :]
    moves = late.amax(1) - late.amin(1)
    parts = {
        "SPPO's gap moves by more than 0.05": moves[0] > 0.05,
        "with tau it moves by less than 0.002": moves[1:] < 0.002,
        "the smaller tau settles at the smaller gap, which is below SPPO's last": gaps[1, -1]
        < torch.minimum(gaps[0, -1], gaps[2, -1]),
        "after three rounds no gap differs by more than 0.005 from SPPO's": (gaps[1:, 3] - gaps[0, 3]).abs() < 0.005,
    }
    figures = {}
    for i, tau in enumerate((0.0, *taus)):
        found = {f"gap at T = {T}": gaps[i, T].tolist() for T in (3, 10, rounds)}
        found |= {f"differs from SPPO's at T = {T} by": (gaps[i, T] - gaps[0, T]).abs().max().item() for T in (3, 10)}
        figures[f"tau {tau}" if tau else "SPPO"] = {"tau": tau, **found, "moves by": moves[i].tolist()}
    return parts, figures, {}


CLAIMS = {  # {NAME: (function of no arguments -> (parts, figures, more), source)}
    "average_iterate": (
        average_iterate,
        "arXiv 2405.00675, theorem 4.1; arXiv 2404.03715, Algorithm 1, whose output is the mixture",
    ),
    "regularised": (regularised, "arXiv 2404.03715, appendix A, Algorithm 3, option I, and eq. 14"),
}


def record(name, claims, file, **settings):
    """The record of a claim, whose text is the docstring of its function. parts: {text: whether it is true}."""
    function, source = claims[name]
    parts, figures, more = function(**settings)
    parts = {text: bool(torch.as_tensor(true).all()) for text, true in parts.items()}
    command = f"python tests/claims/{Path(file).name} {name}"
    found = {"claim": " ".join(function.__doc__.split()), "source": source, "command": command}
    found |= {"verdict": "holds" if all(parts.values()) else "does not hold", "parts": parts}
    return {**found, "figures": figures, **more}


def main(claims, file, description):
    """Record the claims that the command line names."""
    torch.set_num_threads(1)  # tensors of a few numbers: a second thread only waits
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=[*claims, "all"], metavar="NAME", help=", ".join(claims))
    wanted = parser.parse_args().name
    for name in claims if wanted == "all" else [wanted]:
        found = record(name, claims, file)
        print(json.dumps({key: found[key] for key in ("claim", "verdict", "parts", "figures")}, indent=1))
        write(name, found, RESULTS)


if __name__ == "__main__":
    main(CLAIMS, __file__, __doc__)
