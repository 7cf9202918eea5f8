"""The games that the papers' claims are tried on, the claims themselves with few seeds and rounds, and the pictures."""

import json
import sys
from pathlib import Path

import pytest
import torch

CLAIMS = Path(__file__).resolve().parent / "claims"
sys.path.insert(0, str(CLAIMS))

import games  # noqa: E402
import tabular  # noqa: E402
from games import BIASED, CONDORCET, NASH, ORDERED, gap, preference, tensor  # noqa: E402

from common import pairwise_prefs  # noqa: E402
from sppo import win_rates  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
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
    found = games.sampled_sppo_step(start, torch.logit(BIASED), eta, "half", pairwise_prefs, k)
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


# Pictures ------------------------------------------------------------------------------------------------------------


def test_pictures(tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    import pictures

    draw = pictures.draw_phase
    monkeypatch.setattr(pictures, "draw_phase", lambda axes: draw(axes, T=20))
    assert pictures.main(tmp_path, tmp_path / "none") == ["phase"]
    assert "gap.svg: not drawn, there is no average_iterate.json" in capsys.readouterr().out
    curve = {"average": [[0.1, 0.2], [0.05, 0.04], [0.02, 0.01]], "last": [[0.1, 0.1]] * 3}
    curves = {"SPPO, eta / 2": curve, "exact DNO": curve, "DPO": {"last": [[0.1, 0.1]] * 3}}
    rows = [{"iteration": i, "exact_match": 0.2 * i, "greedy_exact_match": 0.9} for i in range(3)]
    steps = {name: {"1": [[0.1, -0.1]] * 9, "2": [[0.2, -0.2]] * 8} for name in ("SPPO", "DNO", "DPO")}
    bench = {"what": "this", "against": "that", "time": 0.5, "memory": None}
    for name, data in {
        "average_iterate": {"rounds": [10, 30, 100], "curves": curves},
        "default": {"runs": {name: {"1": rows, "2": rows} for name in ("sppo", "dno", "sr_dpo")}},
        "log_ratios": {"steps": steps},
        "benches": {"rows": [bench, bench | {"time": 1.3, "memory": 0.9}]},
    }.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(data))
    assert pictures.main(tmp_path, tmp_path / "all") == list(pictures.PICTURED)
    first = {path.name: path.read_bytes() for path in (tmp_path / "all").iterdir()}
    pictures.main(tmp_path, tmp_path / "all")
    for path in (tmp_path / "all").iterdir():
        assert path.read_bytes() == first[path.name]  # the same figures, the same bytes
        assert path.stat().st_size < 150_000
