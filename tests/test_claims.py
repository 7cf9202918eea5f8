"""The game of the claims, their verdicts, and the pictures."""

import json
import math

import games
import pytest
import tiny
import torch
from conftest import ROOT
from games import BIASED, NASH, gap
from steps import tensor

CLAIMS = ROOT / "tests" / "claims"
START = games.random_policies(3, range(1, 5))


def test_nash_and_only_nash_has_no_gap():
    torch.testing.assert_close(BIASED + BIASED.T, torch.ones_like(BIASED))
    assert gap(BIASED, NASH).item() == pytest.approx(0, abs=1e-12)
    assert (gap(BIASED, games.random_policies(3, range(50)).exp()) > 0).all()
    assert gap(BIASED, tensor(0, 0, 1)) == pytest.approx(0.4)
    assert BIASED.mean(1).argmax() == 0 and NASH.argmax() == 1  # what is preferred most often is not Nash


@pytest.mark.parametrize("eta", [0.1, 1.0, 5.0])
def test_sppo_and_exact_dno_find_the_soft_policy_iteration(eta):
    right = torch.log_softmax(START + START.exp() @ BIASED.T / eta, -1)  # pi_t(y) exp(r_t(y) / eta) / Z
    torch.testing.assert_close(games.sppo_step(START, BIASED, 1 / eta), right, atol=1e-6, rtol=0)
    torch.testing.assert_close(games.dno_exact_step(START, BIASED, eta), right, atol=1e-5, rtol=0)


def test_dpo_finds_its_reward_where_there_is_one():
    """Of Bradley-Terry preferences DPO's minimiser is pi_ref exp(reward / beta) / Z, whatever the pairs."""
    reward = tensor(1, 0, -1)
    ordered, right = torch.sigmoid(reward[:, None] - reward), torch.log_softmax(START + reward / 0.5, -1)
    for sampler in (START.exp(), torch.full((4, 3), 1 / 3, dtype=torch.float64)):
        torch.testing.assert_close(games.dpo_step(START, ordered, 0.5, sampler), right, atol=1e-5, rtol=0)


def test_the_average_iterate_reaches_nash_on_an_intransitive_game():
    """Theorem 4.1: with eta ~ 1 / sqrt(T) the average's duality gap is O(1 / sqrt(T)). The last iterate may cycle."""
    recorded = json.loads((CLAIMS / "results/average_iterate.json").read_text())
    found = games.average_iterate(2, (10, 30, 100, 200, 400))
    assert found["verdict"] == recorded["verdict"] == "holds", found["parts"]
    assert found["parts"].keys() == recorded["parts"].keys()
    start = torch.log_softmax(tensor([0.5, 0.0, -0.5]), -1)
    policies = games.play(lambda log_pi: games.sppo_step(log_pi, BIASED, 0.15, "half"), start, 3000)
    assert (games.average(policies) - NASH).abs().max() < 0.02 < 0.1 < (policies[-1].exp() - NASH).abs().max()


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


def test_every_comparison_is_of_figures_that_there_are():
    for name, claim in tiny.CLAIMS.items():
        for one in claim.comparisons:
            assert one.measure in claim.measures, (name, one)
            labels = one.more + one.less
            assert all(label in claim.variants or isinstance(label, float) for label in labels), (name, one)
        for script, settings in claim.variants.values():
            tiny.SCRIPTS[script].Args(**settings)  # raises at a flag that is none


def test_pictures_are_drawn_from_the_records(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    import pictures

    play = pictures.play
    monkeypatch.setattr(pictures, "play", lambda step, start, T: play(step, start, min(T, 20)))
    pictures.main(CLAIMS / "results", tmp_path / "all")
    assert {path.stem for path in (tmp_path / "all").iterdir()} == set(pictures.PICTURED)
    pictures.main(CLAIMS / "results", tmp_path / "again")
    for path in (tmp_path / "all").iterdir():  # the same figures, the same bytes
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()
    pictures.main(tmp_path, tmp_path / "none")
    assert "overview.svg: not drawn, there is no average_iterate.json" in capsys.readouterr().out
