"""The games of the papers' claims, the claims themselves with few seeds and rounds, verdicts, and the pictures."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch

CLAIMS = Path(__file__).resolve().parent / "claims"
sys.path.insert(0, str(CLAIMS))

import games  # noqa: E402
import tabular  # noqa: E402
import tiny  # noqa: E402
from games import BIASED, CONDORCET, NASH, ORDERED, gap, preference, tensor  # noqa: E402

from sppo import win_rates  # noqa: E402

START = games.random_policies(3, range(1, 5))


# Games ---------------------------------------------------------------------------------------------------------------


def test_games_are_games():
    drawn = [games.random_game(6, seed) for seed in range(5)]
    for P in (BIASED, CONDORCET, ORDERED, *drawn, *(games.rock_paper_scissors(seed)[0] for seed in range(5))):
        torch.testing.assert_close(P + P.T, torch.ones_like(P))
        assert (P > 0).all()


def test_nash_and_only_nash_has_no_gap():
    cycles = [games.rock_paper_scissors(seed) for seed in range(20)]
    for P, nash in [(BIASED, NASH), (CONDORCET, tensor(1, 0, 0)), (ORDERED, tensor(1, 0, 0)), *cycles]:
        assert gap(P, nash).item() == pytest.approx(0, abs=1e-12)
        others = games.random_policies(3, range(50)).exp()
        assert (gap(P, others) > 0).all()
        assert (preference(P, nash, others) >= 0.5 - 1e-12).all()  # a von Neumann winner


def test_preference_and_gap_by_hand():
    assert preference(BIASED, tensor(1, 0, 0), tensor(0, 0, 1)) == pytest.approx(0.9)
    assert preference(BIASED, tensor(0.5, 0.5, 0), tensor(0, 0, 1)) == pytest.approx(0.65)
    assert gap(BIASED, tensor(0, 0, 1)) == pytest.approx(0.4)
    both = torch.stack([BIASED, CONDORCET])  # a game for each policy
    torch.testing.assert_close(gap(both, torch.eye(3)[:2].double()), tensor(0.1, 0.05))


def test_the_highest_mean_preference_is_not_nash():
    assert BIASED.mean(1).argmax() == 0 and NASH.argmax() == 1
    assert CONDORCET.mean(1).argmax() == 1 and gap(CONDORCET, tensor(0, 1, 0)) > 0.04
    assert ORDERED.mean(1).argmax() == 0


# Losses are really minimised -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("eta", [0.1, 1.0, 5.0])
def test_sppo_and_exact_dno_find_the_soft_policy_iteration(eta):
    right = games.soft_policy_iteration(START, BIASED, eta)
    torch.testing.assert_close(games.sppo_step(START, BIASED, 1 / eta), right, atol=1e-6, rtol=0)
    torch.testing.assert_close(games.dno_exact_step(START, BIASED, eta), right, atol=1e-5, rtol=0)
    seen = torch.rand(4, 3, 3, dtype=torch.float64, generator=games.generator(0)) / 9
    torch.testing.assert_close(games.dno_exact_step(START, BIASED, eta, seen), right, atol=1e-5, rtol=0)


def test_sppo_with_half_eta_is_at_a_minimum():
    """Of sum pi_t (h - eta (w - 1/2))^2 where sum pi = 1: pi_t (h - eta (w - 1/2)) is proportional to pi."""
    eta, w = 3.0, games.win_rate(BIASED, START.exp())
    log_pi = games.sppo_step(START, BIASED, eta, "half")
    multiplier = (START.exp() * (log_pi - START - eta * (w - 0.5))) / log_pi.exp()
    torch.testing.assert_close(multiplier, multiplier[:, :1].expand(-1, 3), atol=1e-6, rtol=0)


def test_dpo_finds_its_reward_where_there_is_one():
    """Of Bradley-Terry preferences DPO's minimiser is pi_ref exp(reward / beta) / Z, whatever the pairs."""
    right = torch.log_softmax(START + tensor(1, 0, -1) / 0.5, -1)
    torch.testing.assert_close(games.dpo_step(START, ORDERED, 0.5, START.exp()), right, atol=1e-5, rtol=0)
    uniform = torch.full((4, 3), 1 / 3, dtype=torch.float64)
    torch.testing.assert_close(games.dpo_step(START, ORDERED, 0.5, uniform), right, atol=1e-5, rtol=0)
    torch.testing.assert_close(games.dno_step(START, ORDERED, 0.5), right, atol=1e-5, rtol=0)


def test_draws_of_k_are_all_draws():
    """The least mean squared distance from K samples' targets, against every ordered draw and plain gradient steps."""
    eta, k, start = 2.0, 3, START[:1]
    draws = torch.cartesian_prod(*[torch.arange(3)] * k)
    rates = win_rates(BIASED[draws[:, :, None], draws[:, None, :]])
    seen = start[0][draws].sum(-1).exp()
    theta = start[0].clone()
    for _ in range(2000):
        theta.requires_grad_()
        h = torch.log_softmax(theta, -1)[draws] - start[0][draws]
        (gradient,) = torch.autograd.grad((seen[:, None] * (h - eta * (rates - 0.5)) ** 2).sum() / k, theta)
        theta = theta.detach() - 0.3 * gradient
    found = games.sampled_sppo_step(start, BIASED, eta, "half", k)
    torch.testing.assert_close(found[0], torch.log_softmax(theta, -1), atol=1e-5, rtol=0)


# Claims --------------------------------------------------------------------------------------------------------------

FEW = {  # settings with which a claim is tried in seconds
    "average_iterate": {"seeds": 2, "rounds": (10, 30, 100, 200, 400)},
    "intransitive": {"seeds": 2, "T": 400},
    "monotone": {"seeds": 5, "rounds": 2},
    "log_z": {"seeds": 2, "T": 60},
    "cyclic_judge": {"seeds": 2, "T": 200},
    "soft_policy_iteration": {"seeds": 4},
}


@pytest.mark.parametrize("name", tabular.CLAIMS)
def test_claims_still_hold(name):
    """What holds in full holds for fewer seeds and rounds; what does not has nothing to keep, but must run."""
    recorded = json.loads((CLAIMS / "results" / f"{name}.json").read_text())
    found = tabular.CLAIMS[name](**FEW[name])
    assert list(found) == list(recorded)
    assert found["figures"].keys() <= recorded["figures"].keys() or name == "log_z"  # its names have T in them
    if recorded["verdict"] == "holds":
        assert found["verdict"] == "holds", found["parts"]
    json.dumps(found)


def test_verdicts():
    def verdict(*parts):
        return tabular.result("name", "", "", dict(enumerate(parts)), "", {})["verdict"]

    assert (verdict(True, True), verdict(True, False), verdict(False)) == ("holds", "holds in part", "does not hold")


# Over three seeds A - B is 2, 3, 4: mean 3, standard deviation 1; t of two degrees of freedom is 4.303.
FIGURES = {"A": {"m": [3.0, 5.0, 7.0]}, "B": {"m": [1.0, 2.0, 3.0]}}
HALF = 4.303 / math.sqrt(3)  # 2.48


@pytest.mark.parametrize(
    ("least", "verdict"),
    [(0.5, "holds"), (0.52, "within the spread"), (3.0, "within the spread"), (5.5, "does not hold")],
)
def test_a_difference_is_compared_by_its_interval(least, verdict):
    found = tiny.compare(tiny.Comparison("A above B", "m", ("A",), ("B",), least), FIGURES)
    assert found["difference"] == 3 and found["verdict"] == verdict
    assert (found["low"], found["high"]) == pytest.approx((3 - HALF, 3 + HALF))  # 0.516 and 5.48
    assert (found["text"], found["least"]) == ("A above B", least)


def test_the_difference_is_taken_seed_by_seed():
    """B may spread as it likes where A spreads with it; means over the seeds would be within the spread."""
    figures = {"A": {"m": [1.1, 2.1, 9.2]}, "B": {"m": [1.0, 2.0, 9.0]}}
    found = tiny.compare(tiny.Comparison("", "m", ("A",), ("B",), -0.05), figures)
    assert found["verdict"] == "holds"


def test_variants_are_averaged_and_numbers_stand_for_themselves():
    found = tiny.compare(tiny.Comparison("", "m", ("A", "B"), (0.5,)), FIGURES)  # 2, 3.5, 5 less 0.5
    assert found["difference"] == 3
    assert found["high"] - 3 == pytest.approx(1.5 * HALF)
    other_way = tiny.compare(tiny.Comparison("", "m", (0.5,), ("A", "B")), FIGURES)
    assert (other_way["difference"], other_way["low"]) == pytest.approx((-3, -found["high"]))


def test_no_worse_is_to_the_slack():
    figures = {"A": {tiny.WINS: [0.79, 0.78, 0.8]}, "B": {tiny.WINS: [0.8, 0.79, 0.81]}}  # -0.01 in each seed
    assert tiny.compare(tiny.no_worse("A", "B"), figures)["verdict"] == "holds"
    assert tiny.compare(tiny.better("A", "B"), figures)["verdict"] == "does not hold"


def test_the_worst_comparison_decides():
    def overall(*verdicts):
        return tiny.overall([{"verdict": verdict} for verdict in verdicts])

    holds, spread, fails = tiny.VERDICTS
    assert (holds, spread, fails) == ("holds", "within the spread", "does not hold")
    assert (overall(holds, holds), overall(holds, spread), overall(spread, fails, holds)) == (holds, spread, fails)
    assert overall() == "no claim"


@pytest.mark.parametrize("claimed", [True, False])
def test_a_claim_is_tried_and_recorded(claimed, tmp_path, monkeypatch, capsys):
    made = []

    def run(script, settings, seed):
        made.append((script, settings, seed))
        return tiny.Run(tmp_path, [{"m": 0.0}, {"m": settings.get("bonus", 0.0) + seed / 7}])

    variants = {"A": ("sppo", {"bonus": 2.0}), "B": ("dno", {})}
    comparisons = [tiny.Comparison("A above B", "m", ("A",), ("B",))] if claimed else []
    claim = tiny.Claim("A is better", "a paper", variants, {"m": tiny.of("m")}, comparisons, "As said.")
    monkeypatch.setattr(tiny, "run", run)
    monkeypatch.setattr(tiny, "RESULTS", tmp_path)
    monkeypatch.setitem(tiny.CLAIMS, "fake", claim)
    tiny.try_claim("fake", 3)
    assert made == [(*variant, seed) for variant in variants.values() for seed in (1, 2, 3)]
    found = json.loads((tmp_path / "fake.json").read_text())
    assert found["command"] == "python tests/claims/tiny.py fake --seeds 3" and found["seeds"] == 3
    assert found["variants"] == {"A": "python sppo.py --bonus 2.0", "B": "python dno.py"}
    assert found["figures"] == {"A": {"m": [2.143, 2.286, 2.429]}, "B": {"m": [0.1429, 0.2857, 0.4286]}}
    verdict = "holds" if claimed else "no claim"
    assert found["verdict"] == verdict and f"{verdict}. As said." in capsys.readouterr().out
    assert [one["difference"] for one in found["comparisons"]] == ([2.0] if claimed else [])


def test_every_comparison_is_of_figures_that_there_are():
    for name, claim in tiny.CLAIMS.items():
        for one in claim.comparisons:
            assert one.measure in claim.measures, (name, one)
            assert all(label in claim.variants or isinstance(label, float) for label in one.more + one.less), (
                name,
                one,
            )
        for script, settings in claim.variants.values():
            tiny.SCRIPTS[script].Args(**settings)  # raises at a flag that is none


# Pictures ------------------------------------------------------------------------------------------------------------


def write_benches(folder):
    """Records of the benches, of which Liger was not installed."""
    missing = {"reason": "not installed"}
    logps = {
        "time": {
            "naive log_softmax": {"time / three products": 1.25},
            "ours": {"time / three products": 1.0},
            "Liger, from its GRPO loss": missing,
            "TRL, fused head": {"time / three products": 2.5},
        },
        "memory": {
            "naive log_softmax": {"MiB": 1000.0},
            "ours": {"MiB": 100.0},
            "Liger, from its GRPO loss": missing,
            "TRL, fused head": {"MiB": 800.0},
        },
    }
    speeds = {"ours": 1.0, "transformers generate": 4.0, "transformers generate_batch": 2.0}
    steps = {  # time by ours, time by DPO, MiB
        "ours": (1.0, 0.9, 10.0),
        "DPO of sr_dpo.py": (1.1, 1.0, 8.0),
        "Sr-DPO of sr_dpo.py": (1.4, 1.3, 12.0),
        "TRL, all pairs at once": (4.0, 3.9, 160.0),
        "TRL, a few, by length": (2.5, 2.4, 40.0),
    }
    train = {
        "time": {name: {"time / ours": ours, "time / DPO": dpo} for name, (ours, dpo, _) in steps.items()},
        "memory": {name: {"MiB": mib} for name, (*_, mib) in steps.items()},
    }
    generate = {"spread": {name: {"ours / theirs": ratio} for name, ratio in speeds.items()}}
    for name, data in {"logps": logps, "generate": generate, "train": train}.items():
        (folder / f"bench_{name}.json").write_text(json.dumps(data))


def test_the_bars_are_the_records(tmp_path):
    pytest.importorskip("matplotlib")
    import pictures

    write_benches(tmp_path)
    assert [tuple(row.values()) for row in pictures.bench_rows(tmp_path)] == [
        ("token_logps", "naive log_softmax", 0.8, 0.1),
        ("token_logps", "TRL", 0.4, 0.125),
        ("generate, lengths spread", "transformers' generate", 0.25, None),
        ("generate, lengths spread", "generate_batch", 0.5, None),
        ("an SPPO step", "TRL's DPOTrainer at its best", 0.4, 0.25),
        ("an Sr-DPO step", "a DPO step", 1.3, 1.5),
    ]


def test_pictures(tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    import pictures

    draw = pictures.draw_phase
    monkeypatch.setattr(pictures, "draw_phase", lambda axes: draw(axes, T=20))
    assert pictures.main(tmp_path, tmp_path / "none") == ["phase"]
    assert "gap.svg: not drawn, there is no average_iterate.json" in capsys.readouterr().out
    curve = {"average": [[0.1, 0.2], [0.05, 0.04], [0.02, 0.01]], "last": [[0.1, 0.1]] * 3}
    curves = {"SPPO, eta / 2": curve, "exact DNO": curve, "DPO": {"last": [[0.1, 0.1]] * 3}}
    rows = [{"iterate": i, "exact_match": 0.2 * i} for i in range(3)]
    steps = {name: {"1": [[0.1, -0.1]] * 9, "2": [[0.2, -0.2]] * 8} for name in ("SPPO", "DNO", "DPO")}
    write_benches(tmp_path)
    for name, data in {
        "average_iterate": {"rounds": [10, 30, 100], "curves": curves},
        "default": {"runs": {name: {"1": rows, "2": rows} for name in ("sppo", "dno", "sr_dpo")}},
        "log_ratios": {"steps": steps},
    }.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(data))
    assert pictures.main(tmp_path, tmp_path / "all") == list(pictures.PICTURED)
    first = {path.name: path.read_bytes() for path in (tmp_path / "all").iterdir()}
    pictures.main(tmp_path, tmp_path / "all")
    for path in (tmp_path / "all").iterdir():
        assert path.read_bytes() == first[path.name]  # the same figures, the same bytes
        assert path.stat().st_size < 150_000
