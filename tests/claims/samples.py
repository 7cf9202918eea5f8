"""What K samples do to SPPO's step, on games: exact expectations over all samples of K, and the scripts' own functions.

    python tests/claims/samples.py NAME        NAME is one of CLAIMS, below, or all: two minutes

Games, policies and records are those of games.py. The numbers in the parts of a claim were chosen after a first look.
"""

import math
from functools import partial
from unittest import mock

import games
import torch
from games import BIASED, average, gap, minimise, play, random_policies, tensor
from torch.nn.functional import one_hot

import dno
import sppo


def random_games(n, seeds):
    """Games (S, n, n), one per seed, whose P above the diagonal is uniform on [0, 1]."""
    drawn = [torch.rand(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) for seed in seeds]
    above = torch.stack(drawn).triu(1)
    return above + (1 - above).mT.tril(-1) + torch.eye(n) / 2


def win_rates_of_two(prefs):
    """sppo.win_rates, but over best and worst alone: prefs (B, K, K) -> (B, K).

    Those two get (1/2 + P(y > the other)) / 2, as for "K = 2" in figure 4 of SPPO.
    """
    score = torch.logit(prefs, eps=1e-6).mean(-1)  # best and worst are make_pairs' own
    order = torch.argsort(score, dim=-1, descending=True, stable=True)
    return prefs.gather(-1, order[:, None, [0, -1]].expand(-1, prefs.shape[1], -1)).mean(-1)


def samples_of(P, k):
    """All samples of k of n actions, and the preferences in them: (n^k, k) and (n^k, k, k)."""
    samples = torch.cartesian_prod(*[torch.arange(len(P))] * k)
    return samples, P[samples[:, :, None], samples[:, None, :]]


def targets_on_samples(P, k, win_rates=sppo.win_rates, **flags):
    """What sppo.py with --k and `flags` trains on, as a function of log_pi_t (S, n), in expectation over samples.

    The function returns how often each response is trained on and its mean target: (S, n) both. P (S, n, n): a game for
    each run. sppo.make_pairs chooses responses and sets targets; `win_rates` replaces sppo.win_rates in it.
    """
    runs = []
    for game in P:
        samples, prefs = samples_of(game, k)
        rows = [{"sample": sample, "responses": [{"ids": y} for y in sample]} for sample in samples.tolist()]
        with mock.patch.object(sppo, "win_rates", win_rates):
            pairs = sppo.make_pairs(rows, prefs, sppo.Args(k=k, **flags))
        sampled = one_hot(torch.tensor([pair["sample"] for pair in pairs]), len(game)).double()
        chosen = torch.tensor([[y["ids"] for y in pair["responses"]] for pair in pairs])
        chosen = one_hot(chosen, len(game)).double()  # (pairs, responses, n)
        targets = chosen * tensor(*(pair["win_rate"] for pair in pairs))[..., None]
        runs.append([x.sum(1) for x in (sampled, chosen, targets)])
    sampled, chosen, targets = map(torch.stack, zip(*runs, strict=True))  # (S, pairs, n)

    def seen(log_pi_t):
        chance = (log_pi_t[:, None] @ sampled.mT).exp()  # (S, 1, pairs)
        weight = (chance @ chosen)[:, 0]
        return weight, (chance @ targets)[:, 0] / weight

    return seen


def step_on_samples(seen, eta):
    """The step log_pi_t -> log_pi_{t+1} (S, n). seen: of targets_on_samples."""

    def step(log_pi_t):
        weight, target = seen(log_pi_t)  # the spread around the mean target only adds a constant to the loss
        near = torch.log_softmax(log_pi_t + eta * target, -1)
        return minimise(lambda x: (weight * sppo.sppo_loss(x, log_pi_t, target, eta)).sum(-1), near, 2 * weight)

    return step


def fixed_point(seen):
    """The policy of three responses that no step moves, as all its mean targets are 1/2: (3,) probabilities."""
    start = torch.zeros(1, 3, dtype=torch.float64).log_softmax(-1)
    return minimise(lambda x: 1e3 * ((seen(x)[1] - 0.5) ** 2).sum(-1), start, torch.ones_like(start))[0].exp()


def equilibria(ways, rounds, eta):
    """Figures of ways[name](P), which return what targets_on_samples does: the fixed point and averages.

    Averages are those of all iterates, of two starts of the biased game and of four random games. Iterates circle
    around the fixed point, and their average need not be the same, as targets are not linear in the policy.
    """
    figures, random = {}, random_games(5, range(1, 5))
    for name, way in ways.items():
        point = fixed_point(way(BIASED[None]))
        found = {"fixed point": point.tolist(), "gap there": gap(BIASED, point).item()}
        for label, P in (("biased game", BIASED.expand(2, 3, 3)), ("random games", random)):
            start = random_policies(len(P[0]), range(1, len(P) + 1))
            pi = average(play(step_on_samples(way(P), eta), start, rounds))
            found[f"gap of the average, {label}"] = gap(P, pi).tolist()
        figures[name] = found
    return figures


def read(figures, name):
    """The figures of all ways by one name, as a tensor."""
    return tensor(*(found[name] for found in figures.values()))


def hard_labels(rounds=2000, eta=0.15):
    """--targets hard plays the majority game, in which P > 1/2 counts as 1. Labels drawn by P play the game itself."""
    ways = {f"argmax, K = {k}": partial(targets_on_samples, k=k, targets="hard") for k in (2, 5)}
    ways["drawn by P, K = 2"] = partial(targets_on_samples, k=2, win_rates=dno.win_rates)  # their mean is P(y > y')
    figures = equilibria(ways, rounds, eta)
    gaps = read(figures, "gap there")
    averages, others = (read(figures, f"gap of the average, {game}") for game in ("biased game", "random games"))
    parts = {
        "argmax of two: the fixed point is 1/3 each": (tensor(*figures["argmax, K = 2"]["fixed point"]) - 1 / 3).abs()
        < 1e-6,
        "labels drawn by P: it is Nash; argmax of five: it is not": gaps[2] < 1e-6 < gaps[1],
        "the average's gap: argmax of two above 0.08, of five above 0.03, drawn by P below 0.01": torch.cat(
            (averages[0] > 0.08, averages[1] > 0.03, averages[2] < 0.01)
        ),
        "in each random game it is larger for argmax of two than for labels drawn by P": others[0] > others[2],
    }
    return parts, figures, {}


def best_and_worst(rounds=2000, eta=0.15):
    """Training on best and worst of five leaves Nash where it is. Estimating P from these two alone moves it."""
    ways = {"P from all five": partial(targets_on_samples, k=5)}
    ways["P from best and worst"] = partial(targets_on_samples, k=5, win_rates=win_rates_of_two)
    figures = equilibria(ways, rounds, eta)
    five, alone = read(figures, "gap there")
    averages, others = (read(figures, f"gap of the average, {game}") for game in ("biased game", "random games"))
    parts = {
        "P from all: the fixed point is Nash": five < 1e-6,
        "P from best and worst: its gap is above 0.03": alone > 0.03,
        "the average's gap is below 0.01 for P from all, and larger for P from best and worst": torch.cat(
            (averages[0] < 0.01, averages[1] > averages[0])
        ),
        "so it is on average over the random games": others[0].mean() < others[1].mean(),
    }
    return parts, figures, {}


def selected_best(ks=(2, 5, 16), n=10000):
    """The win rate of the best of K is overestimated: by (K + 1) / K, and by (K + 1) / (K - 1) if itself is left out.

    Preferences are a strict order over n equally likely responses. Figures: (estimate - 1/2) / (true win rate - 1/2).
    """
    figures, true = {}, (torch.arange(n, dtype=torch.float64) + 0.5) / n  # P(y > pi) of each response
    for k in ks:
        chance = (true + 0.5 / n) ** k - (true - 0.5 / n) ** k  # that y is the best of k
        prefs = torch.ones(1, k, k, dtype=torch.float64).triu(1) + torch.eye(k) / 2  # the first is the best
        estimates = {"itself in": sppo.win_rates(prefs)[0, 0], "itself out": dno.win_rates(prefs)[0, 0]}
        figures[f"K = {k}"] = {name: ((x - 0.5) / (chance @ true - 0.5)).item() for name, x in estimates.items()}
    near = partial(math.isclose, rel_tol=1e-3)
    parts = {
        "itself in: (K + 1) / K": all(near(figures[f"K = {k}"]["itself in"], (k + 1) / k) for k in ks),
        "itself out: (K + 1) / (K - 1)": all(near(figures[f"K = {k}"]["itself out"], (k + 1) / (k - 1)) for k in ks),
    }
    return parts, figures, {}


def k_and_eta(ks=(2, 5), rounds=10, eta=1.0):
    """K scales SPPO's step by (K - 1) / K, so that an ablation of K at equal eta compares step sizes.

    Of K estimates of a response's P one is its own 1/2. This is for responses that are not selected (--pairing all).
    """
    start = random_policies(3, range(1, 4))

    def step(log_pi_t, k, eta):
        (samples, prefs), pi_t = samples_of(BIASED, k), log_pi_t.exp()
        chance, here = pi_t[:, samples].prod(-1), one_hot(samples, 3).double()  # (S, samples), (samples, k, 3)
        target = (chance @ (here * sppo.win_rates(prefs)[..., None]).sum(1)) / (chance @ here.sum(1))
        return minimise(lambda x: (pi_t * sppo.sppo_loss(x, log_pi_t, target, eta)).sum(-1), log_pi_t, 2 * pi_t)

    def moved(step):  # KL from the start, (S,)
        last = play(step, start, rounds)[-1]
        return (last.exp() * (last - start)).sum(-1)

    all_of_them = moved(partial(games.sppo_step, P=BIASED, eta=eta, log_z="half"))
    equal = torch.stack([moved(partial(step, k=k, eta=eta)) for k in ks])
    scaled = torch.stack([moved(partial(step, k=k, eta=eta * k / (k - 1))) for k in ks])
    parts = {
        "at eta K / (K - 1) every K moves as far as exact win rates do": (scaled - all_of_them).abs() < 1e-4,
        "at equal eta the larger K moves farther": equal[0] < equal[-1],
    }
    figures = {"KL, exact win rates": all_of_them.tolist()}
    for name, found in (("equal eta", equal), ("eta K / (K - 1)", scaled)):
        figures |= {f"KL, K = {k}, {name}": x.tolist() for k, x in zip(ks, found, strict=True)}
    return parts, figures, {}


CLAIMS = {
    "hard_labels": (hard_labels, "ours, of SPPO's eq. 4.12, arXiv 2405.00675, and of TRL's sppo_hard"),
    "best_and_worst": (best_and_worst, "ours, of SPPO's experiments, arXiv 2405.00675, section 5 and figure 4"),
    "selected_best": (selected_best, "ours, of line 5 of SPPO's Algorithm 1 and of DNO's Algorithm 2"),
    "k_and_eta": (k_and_eta, "ours, of line 5 of SPPO's Algorithm 1, arXiv 2405.00675, and of its figure 4"),
}

if __name__ == "__main__":
    games.main(CLAIMS, __file__, __doc__)
