"""The games of the papers' claims, the claims themselves with few seeds and rounds, verdicts, and the pictures."""

import functools
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

CLAIMS = Path(__file__).resolve().parent / "claims"
sys.path.insert(0, str(CLAIMS))

import games  # noqa: E402
import tabular  # noqa: E402
import tiny  # noqa: E402
from games import BIASED, CONDORCET, NASH, ORDERED, gap, preference, tensor  # noqa: E402

import common  # noqa: E402
from sppo import win_rates  # noqa: E402

close = functools.partial(torch.testing.assert_close, atol=1e-5, rtol=0)
START = games.random_policies(3, range(1, 5))


# Games ---------------------------------------------------------------------------------------------------------------


def test_games_are_games():
    drawn = [game for seed in range(5) for game in (games.random_game(6, seed), games.rock_paper_scissors(seed)[0])]
    for P in (BIASED, CONDORCET, ORDERED, *drawn):
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
    assert [P.mean(1).argmax() for P in (BIASED, CONDORCET, ORDERED)] == [0, 1, 0]
    assert NASH.argmax() == 1 and gap(CONDORCET, tensor(0, 1, 0)) > 0.04


# Losses are really minimised -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("eta", [0.1, 1.0, 5.0])
def test_sppo_and_exact_dno_find_the_soft_policy_iteration(eta):
    right = games.soft_policy_iteration(START, BIASED, eta)
    close(games.sppo_step(START, BIASED, 1 / eta), right, atol=1e-6)
    for seen in (None, torch.rand(4, 3, 3, dtype=torch.float64, generator=games.generator(0)) / 9):
        close(games.dno_exact_step(START, BIASED, eta, seen), right)


def test_sppo_with_half_eta_is_at_a_minimum():
    """Of sum pi_t (h - eta (w - 1/2))^2 where sum pi = 1: pi_t (h - eta (w - 1/2)) is proportional to pi."""
    eta, w = 3.0, games.win_rate(BIASED, START.exp())
    log_pi = games.sppo_step(START, BIASED, eta, "half")
    multiplier = (START.exp() * (log_pi - START - eta * (w - 0.5))) / log_pi.exp()
    torch.testing.assert_close(multiplier, multiplier[:, :1].expand(-1, 3), atol=1e-6, rtol=0)


def test_dpo_finds_its_reward_where_there_is_one():
    """Of Bradley-Terry preferences DPO's minimiser is pi_ref exp(reward / beta) / Z, whatever the pairs."""
    right = torch.log_softmax(START + tensor(1, 0, -1) / 0.5, -1)
    for sampler in (START.exp(), torch.full((4, 3), 1 / 3, dtype=torch.float64)):
        close(games.dpo_step(START, ORDERED, 0.5, sampler), right)
    close(games.dno_step(START, ORDERED, 0.5), right)


def test_draws_of_k_are_all_draws():
    """The least mean squared distance from K samples' targets, against every ordered draw and plain gradient steps."""
    eta, k, start = 2.0, 3, START[:1]
    draws = torch.cartesian_prod(*[torch.arange(3)] * k)
    rates = win_rates(BIASED[draws[:, :, None], draws[:, None, :]])
    seen, theta = start[0][draws].sum(-1).exp(), start[0].clone()
    for _ in range(2000):
        theta.requires_grad_()
        h = torch.log_softmax(theta, -1)[draws] - start[0][draws]
        (gradient,) = torch.autograd.grad((seen[:, None] * (h - eta * (rates - 0.5)) ** 2).sum() / k, theta)
        theta = theta.detach() - 0.3 * gradient
    found = games.sampled_sppo_step(start, BIASED, eta, "half", k)
    close(found[0], torch.log_softmax(theta, -1))


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


# Over three seeds A - B is 2, 3, 4: mean 3, standard deviation 1; t of two degrees of freedom is 4.303. The numbers
# stand for themselves; (A + B) / 2 - 0.5 is 1.5, 3, 4.5. C is below A by 0.01 in each seed, wherever A goes.
FIGURES = {"A": {"m": [3.0, 5.0, 7.0]}, "B": {"m": [1.0, 2.0, 3.0]}, "C": {"m": [2.99, 4.99, 6.99]}}
HALF = 4.303 / math.sqrt(3)  # 2.48


@pytest.mark.parametrize(
    ("more", "less", "least", "difference", "half", "verdict"),
    [
        (("A",), ("B",), 0.5, 3, HALF, "holds"),  # from 0.516 to 5.48
        (("A",), ("B",), 0.52, 3, HALF, "within the spread"),
        (("A",), ("B",), 5.4, 3, HALF, "within the spread"),
        (("A",), ("B",), 5.5, 3, HALF, "does not hold"),
        (("A", "B"), (0.5,), 0.0, 3, 1.5 * HALF, "within the spread"),
        ((0.5,), ("A", "B"), 0.0, -3, 1.5 * HALF, "within the spread"),
        (("C",), ("A",), -tiny.SLACK, -0.01, 0, "holds"),  # "no worse"
        (("C",), ("A",), 0.0, -0.01, 0, "does not hold"),
    ],
)
def test_a_difference_is_taken_seed_by_seed_and_compared_by_its_interval(more, less, least, difference, half, verdict):
    found = tiny.compare(tiny.Comparison("words", "m", more, less, least), FIGURES)
    expected = {"difference": difference, "low": difference - half, "high": difference + half}
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    assert (found["text"], found["least"], found["verdict"]) == ("words", least, verdict)


def test_the_worst_comparison_decides():
    holds, spread, fails = "holds", "within the spread", "does not hold"
    cases = {(holds,): holds, (holds, spread): spread, (spread, fails, holds): fails, (): "no claim"}
    for verdicts, worst in cases.items():
        assert tiny.overall([{"verdict": verdict} for verdict in verdicts]) == worst


def test_a_claim_is_run_once_and_recorded(tmp_path, monkeypatch, capsys):
    made, variants = [], {"A": ("sppo", {"bonus": 2.0, "gold": ""}), "B": ("sppo", {"bonus": 0.0})}

    def main(args):
        made.append((args.bonus, args.seed))
        (Path("runs") / args.name / "final").mkdir(parents=True)
        common.write_json(Path("runs") / args.name / "config.json", vars(args))
        common.write_jsonl(Path("runs") / args.name / "metrics.jsonl", [{"m": 0.0}, {"m": args.bonus + args.seed / 7}])

    comparisons = [tiny.Comparison("A above B", "m", ("A",), ("B",))]
    claim = tiny.Claim("A is better", "a paper", variants, {"m": tiny.of("m")}, comparisons, "As said.")
    monkeypatch.setattr(tiny, "SCRIPTS", {"sppo": SimpleNamespace(Args=SimpleNamespace, main=main)})
    monkeypatch.setattr(tiny, "RESULTS", tmp_path)
    monkeypatch.setitem(tiny.CLAIMS, "fake", claim)
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        tiny.try_claim("fake", 3)
    assert made == [(bonus, seed) for bonus in (2.0, 0.0) for seed in (1, 2, 3)]
    found = json.loads((tmp_path / "fake.json").read_text())
    assert found["command"] == "python tests/claims/tiny.py fake --seeds 3" and found["seeds"] == 3
    assert found["variants"] == {"A": "python sppo.py --bonus 2.0 --gold ''", "B": "python sppo.py --bonus 0.0"}
    assert found["figures"] == {"A": {"m": [2.143, 2.286, 2.429]}, "B": {"m": [0.1429, 0.2857, 0.4286]}}
    assert found["verdict"] == "holds" and "holds. As said." in capsys.readouterr().out
    (tmp_path / "runs" / "claims-sppo-bonus-0.0-s2" / "final").rmdir()
    with pytest.raises(SystemExit, match="did not finish"):
        tiny.try_claim("fake", 3)


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


def test_pictures_are_drawn_from_the_records(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    import pictures

    play = pictures.play
    monkeypatch.setattr(pictures, "play", lambda step, start, T: play(step, start, min(T, 20)))
    pictures.main(CLAIMS / "results", tmp_path / "all")
    assert {path.stem for path in (tmp_path / "all").iterdir()} == set(pictures.PICTURED)
    pictures.main(tmp_path, tmp_path / "none")
    assert [path.name for path in (tmp_path / "none").iterdir()] == ["phase.svg"]  # which needs no record
    both = [(tmp_path / folder / "phase.svg").read_bytes() for folder in ("all", "none")]
    assert both[0] == both[1]  # the same figures, the same bytes
    assert "gap.svg: not drawn, there is no average_iterate.json" in capsys.readouterr().out


def test_the_bars_are_ratios_of_the_records(tmp_path):
    pytest.importorskip("matplotlib")
    import pictures

    values = {"ours": 1, "naive log_softmax": 5, "Liger, from its GRPO loss": None, "TRL, fused head": 4}
    values |= {"transformers generate": 4, "transformers generate_batch": 2, "TRL, a few, by length": 2.5}
    values |= {"TRL, all pairs at once": 8, "DPO of sr_dpo.py": 4, "Sr-DPO of sr_dpo.py": 5}
    figures = "time / three products", "time / ours", "time / DPO", "ours / theirs", "MiB"
    table = {name: dict.fromkeys(figures, x) if x else {"reason": "not installed"} for name, x in values.items()}
    for name in ("logps", "generate", "train"):
        (tmp_path / f"bench_{name}.json").write_text(json.dumps(dict.fromkeys(("time", "memory", "spread"), table)))
    assert [(row["against"], row["time"], row["memory"]) for row in pictures.bench_rows(tmp_path)] == [
        ("naive log_softmax", 0.2, 0.2),
        ("TRL", 0.25, 0.25),
        ("transformers' generate", 0.25, None),
        ("generate_batch", 0.5, None),
        ("TRL's DPOTrainer at its best", 0.4, 0.4),
        ("a DPO step", 1.25, 1.25),
    ]
