"""The papers' claims about games, tried where they can be computed exactly: on the tabular games of games.py.

    python tests/claims/tabular.py            all of CLAIMS, below, in a minute of one core
    python tests/claims/tabular.py NAME       one

Each claim is taken apart into statements that are true or false of the measured figures, by rules fixed in its
function; it holds if all are true, holds in part if some are, and does not hold if none is. Figures are lists, a number
per seed: a seed draws the start, and the game where it says so. They are printed and written to results/NAME.json.

"average" is the uniform mixture of pi_1 ... pi_T, "last" is pi_{T+1}; gap is the duality gap,
max over pi' of P(pi' > pi) - 1/2. Where nothing else is said the step is eta = sqrt(8 log n / T) in SPPO's sense and
1 / eta in DNO's, the one that the O(1 / sqrt(T)) bound is proved with, and nothing is tuned.
"""

import json
import sys
from pathlib import Path
from statistics import mean, stdev

import torch
from games import (  # before sppo: it says where the scripts are
    BIASED,
    CONDORCET,
    NASH,
    ORDERED,
    average,
    dno_exact_step,
    dno_step,
    dpo_step,
    gap,
    kl,
    nash_of_cycle,
    play,
    preference,
    random_game,
    random_policies,
    rock_paper_scissors,
    sampled_sppo_step,
    sppo_step,
    tensor,
    theory_eta,
)

from sppo import official_prefs

RESULTS = Path(__file__).resolve().parent / "results"
SPPO, DNO = "arXiv 2405.00675", "arXiv 2404.03715"


def average_iterate(seeds=5, rounds=(10, 30, 100, 300, 1000, 3000)):
    """Runs of T rounds, each T with its own step size, on the biased game."""
    start = random_policies(3, range(1, seeds + 1))
    curves = {name: {"average": [], "last": []} for name in ("SPPO", "SPPO, eta / 2", "exact DNO")}
    bound, dpo = [], []
    for T in rounds:
        eta = theory_eta(T, 3)
        steps = {
            "SPPO": lambda log_pi, eta=eta: sppo_step(log_pi, BIASED, eta),
            "SPPO, eta / 2": lambda log_pi, eta=eta: sppo_step(log_pi, BIASED, eta, "half"),
            "exact DNO": lambda log_pi, eta=eta: dno_exact_step(log_pi, BIASED, 1 / eta),
        }
        for name, step in steps.items():
            policies = play(step, start, T)
            curves[name]["average"].append(gap(BIASED, average(policies)))
            curves[name]["last"].append(gap(BIASED, policies[T].exp()))
        bound.append(-start.amin(-1) / (eta * T) + eta / 8)  # Hedge's regret over T, from this start
        dpo.append(gap(BIASED, dpo_step(start, BIASED, 1 / (eta * T), start.exp()).exp()))
    figures = {}
    for name, curve in curves.items():
        figures[name] = {
            "exponent of the average's gap": exponent(rounds, curve["average"]),
            "the same from T = 100": exponent(rounds, curve["average"], 100),
            "exponent of the last's gap": exponent(rounds, curve["last"]),
            f"average's gap at T = {rounds[-1]}": curve["average"][-1],
            f"last's gap at T = {rounds[-1]}": curve["last"][-1],
        }
    below = all((curve["average"][i] <= bound[i]).all() for curve in curves.values() for i in range(len(rounds)))
    slopes = torch.stack([figure["the same from T = 100"] for figure in figures.values()])
    lasts = torch.stack([torch.stack(curve["last"]) for curve in curves.values()])  # (methods, T, seeds)
    late, early = (lasts[:, i].mean().item() for i in (slice(-3, None), slice(3)))  # a phase of the cycle says little
    averages = torch.stack([curve["average"][-1] for curve in curves.values()])
    return result(
        "average_iterate",
        "The average iterate's duality gap is O(1 / sqrt(T)); the last iterate cycles, and its gap does not fall.",
        f"{SPPO}, theorem 4.1; {DNO}, Algorithm 1, whose output is the mixture of its iterates",
        {
            "every average's gap is below log(1 / min pi_1) / (eta T) + eta / 8": bool(below),
            "the average's gap falls at least like T^-0.4 from T = 100, every start": bool((slopes < -0.4).all()),
            "the last's gap, mean over the three longest runs, is at least half of that over the three shortest": late
            > early / 2,
            "in the longest runs the last's gap is above the average's": bool((lasts[:, -1] > averages).all()),
        },
        "SPPO with the exact log Z and exact DNO are one algorithm, and eta / 2 for log Z hardly differs at steps this "
        "small. Over all T the fall is slower, as the shortest runs have not yet left their start behind.",
        figures,
        rounds=list(rounds),
        curves=curves | {"DPO": {"last": dpo}},
        bound=bound,
    )


def exponent(rounds, gaps, least=0):
    """The slope of log gap over log T >= log least by least squares: gaps, a (S,) for each T -> (S,)."""
    kept = [i for i, T in enumerate(rounds) if least <= T]
    x, y = torch.log(tensor(*rounds))[kept], torch.stack(gaps).log()[kept]
    x = x - x.mean()
    return (x[:, None] * y).sum(0) / (x**2).sum()


def intransitive(seeds=5, T=2000):
    """Four kinds of games, `seeds` starts of each; the pairs of DPO are drawn from the start."""
    first = tensor(1, 0, 0)
    games = {
        "biased": [(BIASED, NASH)] * seeds,
        "cycles drawn by seed": [rock_paper_scissors(seed) for seed in range(1, seeds + 1)],
        "A beats each": [(CONDORCET, first)] * seeds,
        "ordered": [(ORDERED, first)] * seeds,
    }
    P, nash = (torch.stack(rows) for rows in zip(*[game for row in games.values() for game in row], strict=True))
    start = random_policies(3, range(1, seeds + 1), scale=0.5).repeat(len(games), 1)
    eta = theory_eta(T, 3)
    found = {
        "start": start.exp(),
        "DPO": dpo_step(start, P, 0.1, start.exp()).exp(),
        "SPPO, average": average(play(lambda log_pi: sppo_step(log_pi, P, eta), start, T)),
        "exact DNO, average": average(play(lambda log_pi: dno_exact_step(log_pi, P, 1 / eta), start, T)),
        "contrastive DNO, average": average(play(lambda log_pi: dno_step(log_pi, P, 1 / eta), start, T)),
    }
    figures = {}
    for variant, pi in found.items():
        gaps, far = gap(P, pi).chunk(len(games)), (pi - nash).abs().amax(-1).chunk(len(games))
        figures[variant] = {f"gap, {game}": row for game, row in zip(games, gaps, strict=True)}
        figures[variant] |= {f"distance from Nash, {game}": row for game, row in zip(games, far, strict=True)}
    averages = ("SPPO, average", "exact DNO, average")

    def worst(game):
        return torch.stack([figures[variant][f"gap, {game}"] for variant in averages]).amax(0)

    parts = {
        f"{game}: DPO's gap is over twice that of SPPO's and of exact DNO's average, every seed": bool(
            (figures["DPO"][f"gap, {game}"] > 2 * worst(game)).all()
        )
        for game in games
        if game != "ordered"
    }
    ordered = bool((figures["DPO"]["gap, ordered"] < worst("ordered")).all())
    parts["ordered, a control: there DPO's gap is the smaller one, every seed"] = ordered
    return result(
        "intransitive",
        "Where no reward explains the preferences, DPO on given pairs ends at a response that others beat; the average "
        "of SPPO's or DNO's self-play approaches Nash.",
        f"{SPPO}, sections 1 and 3; {DNO}, section 2.2",
        parts,
        "DPO with beta = 0.1 plays the response that is preferred most often over the sampled ones, nearly alone: rock "
        "in the biased game, B where A beats each narrowly and B crushes C. Contrastive DNO fits a reward as well, but "
        "to pairs of its newest iterate, and gets to Nash; with the same eta its steps are about four times as long, "
        "hence the smaller gaps.",
        figures,
    )


def monotone(seeds=50, rounds=3, n=5, etas=(0.05, 0.5, 2.0)):
    """A few rounds in a random game of n actions per seed; eta is DNO's."""
    P = torch.stack([random_game(n, seed) for seed in range(1, seeds + 1)])
    start = random_policies(n, range(1, seeds + 1))
    figures, off, worse = {}, 0.0, []
    for eta in etas:
        steps = {
            "exact DNO": lambda log_pi, eta=eta: dno_exact_step(log_pi, P, eta),
            "SPPO, eta / 2": lambda log_pi, eta=eta: sppo_step(log_pi, P, 1 / eta, "half"),
            "contrastive DNO": lambda log_pi, eta=eta: dno_step(log_pi, P, eta),
        }
        for name, step in steps.items():
            policies = play(step, start, rounds)
            new, old = policies[1:], policies[:-1]
            wins = preference(P, new.exp(), old.exp()) - 0.5
            figures[f"{name}, eta {eta}"] = {
                "smallest slack": (wins - eta * kl(new, old)).amin(0),
                "smallest gain": wins.amin(0),
                "mean gain": wins.mean(0),
            }
            if name == "exact DNO":
                off = max(off, (wins - eta * kl(new, old) - eta * kl(old, new)).abs().max().item())
                worse.append((gap(P, new.exp()) > gap(P, old.exp())).double().mean().item())

    def slack(name):
        return min(figures[f"{name}, eta {eta}"]["smallest slack"].min().item() for eta in etas)

    contrastive = slack("contrastive DNO")
    return result(
        "monotone",
        "Every round wins against the one before: P(pi_{t+1} > pi_t) >= 1/2 + eta KL(pi_{t+1} || pi_t).",
        f"{DNO}, section 3.1",
        {
            "exact DNO: the slack is never below -1e-7": slack("exact DNO") > -1e-7,
            "exact DNO: the slack is eta KL(pi_t || pi_{t+1}), to 1e-6": off < 1e-6,
            "SPPO with eta / 2 for log Z keeps the bound, eta = 1 / eta_SPPO": slack("SPPO, eta / 2") > -1e-7,
        },
        f"To win against the last iterate is not to be hard to beat: the duality gap rises in {mean(worse):.0%} of "
        "exact DNO's rounds. Contrastive DNO, for which nothing is claimed, wins against the last iterate, too, but "
        f"goes too far for the bound: its smallest slack is {contrastive:.2g}.",
        figures,
    )


def cyclic_judge(seeds=5, T=2000, k=5):
    """SPPO on draws of K from pi_t that the judge sees together; pairwise: P as it is."""
    certain = BIASED + (0.98 - 0.9) * tensor([0, 0, 1], [0, 0, 0], [-1, 0, 0])  # rock beats scissors nearly always
    games = {
        "cycles drawn by seed": [rock_paper_scissors(seed) for seed in range(1, seeds + 1)],
        "0.98, 0.6, 0.6": [(certain, nash_of_cycle(certain))] * seeds,
    }
    P, nash = (torch.stack(rows) for rows in zip(*[game for row in games.values() for game in row], strict=True))
    start, eta = random_policies(3, range(1, seeds + 1)).repeat(len(games), 1), theory_eta(T, 3)
    scored = official_prefs(P)  # of the three actions, once and for all
    steps = {
        "pairwise": lambda log_pi: sampled_sppo_step(log_pi, P, eta, "half", k),
        "official": lambda log_pi: sampled_sppo_step(log_pi, P, eta, "half", k, official_prefs),
        "official, scored once": lambda log_pi: sppo_step(log_pi, scored, eta, "half"),
    }
    figures = {}
    for name, step in steps.items():
        policies = play(step, start, T)
        pi, last = average(policies), policies[-1].exp()
        measures = {
            "average's gap": gap(P, pi),
            "average's distance from Nash": (pi - nash).abs().amax(-1),
            "last's gap": gap(P, last),
            "last's most played action": last.amax(-1),
            "a step from Nash, nats / eta": (step(nash.log()) - nash.log()).abs().amax(-1) / eta,
        }
        figures[name] = {
            f"{measure}, {game}": row
            for measure, values in measures.items()
            for game, row in zip(games, values.chunk(len(games)), strict=True)
        }

    def of(name, measure):
        return torch.cat([figures[name][f"{measure}, {game}"] for game in games])

    pairwise, official, once = (of(name, "average's gap") for name in steps)
    moved, twice = "a step from Nash, nats / eta", "is over twice that of pairwise, every run"
    return result(
        "cyclic_judge",
        "Scores per response, as in the official code, lose a judge's cycles: SPPO on them collapses or ends "
        "elsewhere, while preferences of pairs lead to Nash.",
        f"{SPPO}, Algorithm 1, against its code, uclaml/SPPO; departure c of sppo.py",
        {
            "pairwise: a step from Nash stays there, to 1e-4 nats per eta": bool((of("pairwise", moved) < 1e-4).all()),
            "official: a step from Nash leaves it, by over 0.01 nats per eta": bool(
                (of("official", moved) > 0.01).all()
            ),
            f"official: the average's gap {twice}": bool((official > 2 * pairwise).all()),
            f"official, scored once: the average's gap {twice}": bool((once > 2 * pairwise).all()),
            "official, scored once: the last plays one action with over 0.99, every run": bool(
                (of("official, scored once", "last's most played action") > 0.99).all()
            ),
        },
        "The official scores are transitive within a draw, but made anew from each draw of the newest policy, so that "
        f"they turn with it: there is no collapse. Nash is not at rest under them, but after {T} rounds the average's "
        f"gap, {official.mean():.2g}, is no larger than that of pairwise preferences, {pairwise.mean():.2g}, whose "
        "shorter steps are still on their way. Where responses are scored once and then reused, the cycle is lost.",
        figures,
    )


# Results -------------------------------------------------------------------------------------------------------------


def result(name, claim, source, parts, reading, figures, **more):
    """A claim with its figures, as it is written: verdict from `parts`, {statement: whether it is true}."""
    true = sum(parts.values())
    verdict = "holds" if true == len(parts) else "holds in part" if true else "does not hold"
    record = {"claim": claim, "source": source, "command": f"python tests/claims/tabular.py {name}"}
    record |= {"verdict": verdict, "reading": reading, "parts": parts, "figures": figures, **more}
    return rounded(record)


def rounded(x):
    """Tensors as lists, and floats with four digits that count."""
    if isinstance(x, dict):
        return {key: rounded(value) for key, value in x.items()}
    if isinstance(x, torch.Tensor):
        x = x.tolist()
    if isinstance(x, list | tuple):
        return [rounded(value) for value in x]
    return float(f"{x:.4g}") if isinstance(x, float) else x


def show(record):
    print(f"\n{record['claim']}\n({record['source']}; {record['command']})\n")
    for variant, measures in record["figures"].items():
        for measure, values in measures.items():
            spread = f" ± {stdev(values):.2g}" if len(values) > 1 else ""
            few = f"{mean(values):.3g}{spread}, {min(values):.3g} to {max(values):.3g}"
            print(f"  {variant:32} {measure:48} {few}")
    print()
    for part, true in record["parts"].items():
        print(f"  {'yes' if true else 'NO ':3}  {part}")
    print(f"\n  {record['verdict'].upper()}. {record['reading']}")


CLAIMS = {
    "average_iterate": average_iterate,
    "intransitive": intransitive,
    "monotone": monotone,
    "cyclic_judge": cyclic_judge,
}


def main(names):
    torch.set_num_threads(1)  # tensors of a few numbers: a second thread only waits
    for name in names or CLAIMS:
        if name not in CLAIMS:
            sys.exit(f"no claim {name!r}: {', '.join(CLAIMS)}")
        record = CLAIMS[name]()
        show(record)
        RESULTS.mkdir(exist_ok=True)
        text = json.dumps(record, indent=1, ensure_ascii=False)
        (RESULTS / f"{name}.json").write_text(text + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
