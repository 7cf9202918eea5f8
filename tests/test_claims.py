"""The game of the claims, their verdicts, and the pictures."""

import json
import math
import re

import games
import pytest
import real_text
import samples
import tiny
import torch
from conftest import ROOT
from games import BIASED, NASH, gap
from steps import tensor

import dno
import sppo

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
    start = torch.log_softmax(tensor([0.5, 0.0, -0.5]), -1)
    policies = games.play(lambda log_pi: games.sppo_step(log_pi, BIASED, 0.15, "half"), start, 3000)
    assert (games.average(policies) - NASH).abs().max() < 0.02 < 0.1 < (policies[-1].exp() - NASH).abs().max()


@pytest.mark.parametrize(
    ("script", "name", "settings"),
    [
        (games, "average_iterate", {"seeds": 2, "rounds": (10, 30, 100, 200, 400)}),
        (games, "regularised", {"seeds": 2, "rounds": 300}),
        (samples, "selected_best", {"n": 4000}),
        (samples, "k_and_eta", {"rounds": 2}),
    ],
)
def test_a_claim_on_a_game_holds_as_recorded(script, name, settings):
    recorded = json.loads((CLAIMS / f"results/{name}.json").read_text())
    found = games.record(name, script.CLAIMS, script.__file__, **settings)
    assert all(found["parts"].values()), found["parts"]
    assert all(recorded[key] == found[key] for key in ("claim", "source", "command", "verdict", "parts"))


def test_the_fixed_points_are_as_recorded():
    """With P from all K, Nash is one for other K, too, and whichever responses are trained on."""
    seen, P = samples.targets_on_samples, BIASED[None]
    for k, pairing in ((2, "extremes"), (3, "extremes"), (3, "all"), (5, "all")):
        assert (seen(P, k, pairing=pairing)(NASH.log()[None])[1] - 0.5).abs().max() < 1e-9
    ways = {
        "hard_labels": {"argmax, K = 2": seen(P, 2, targets="hard"), "argmax, K = 5": seen(P, 5, targets="hard")},
        "best_and_worst": {"P from best and worst": seen(P, 5, samples.win_rates_of_two)},
    }
    for name, found in ways.items():
        recorded = json.loads((CLAIMS / f"results/{name}.json").read_text())
        assert recorded["verdict"] == "holds" and recorded["source"] == samples.CLAIMS[name][1]
        for way, targets in found.items():
            assert samples.fixed_point(targets).tolist() == pytest.approx(
                recorded["figures"][way]["fixed point"], abs=1e-4
            )


def test_a_pair_estimated_from_itself_is_figure_4s():
    """(1/2 + P(y_w > y_l)) / 2 for the best, (1/2 + P(y_l > y_w)) / 2 for the worst; at K = 2 it changes nothing."""
    prefs = torch.tensor([[[0.5, 0.2, 0.3], [0.8, 0.5, 0.9], [0.7, 0.1, 0.5]]])  # best 1, worst 0
    assert samples.win_rates_of_two(prefs)[0, [1, 0]].tolist() == pytest.approx([0.65, 0.35])
    torch.testing.assert_close(samples.win_rates_of_two(prefs[:, :2, :2]), sppo.win_rates(prefs[:, :2, :2]))


def test_a_step_on_samples_of_two_by_hand():
    """Labels drawn by P: y meets y' != y with chance pi(y') / (1 - pi(y)), and its mean target is P(y > y')."""
    pi, eta = START.exp(), 0.1
    step = samples.step_on_samples(samples.targets_on_samples(BIASED.expand(4, 3, 3), 2, dno.win_rates), eta)
    target = (games.win_rate(BIASED, pi) - pi / 2) / (1 - pi)
    weight = 2 * pi * (1 - pi)
    right = games.minimise(
        lambda log_pi: (weight * (log_pi - START - eta * (target - 0.5)) ** 2).sum(-1), START, 2 * weight
    )
    torch.testing.assert_close(step(START), right, atol=1e-6, rtol=0)


def test_what_readmes_say_of_records():
    """Each iterate beats the one before: 18 of 18 on digits. A step of Sr-DPO takes 26 % longer than one of DPO."""
    runs = json.loads((CLAIMS / "results/default.json").read_text())["runs"]
    wins = [row["wins_vs_each"][-1] > 0.5 for key in ("sppo", "dno") for rows in runs[key].values() for row in rows[1:]]
    assert (sum(wins), len(wins)) == (18, 18)
    steps = json.loads((CLAIMS / "results/bench_train.json").read_text())["table"]
    assert steps["Sr-DPO of sr_dpo.py"]["time / DPO"] == pytest.approx(1.26, abs=0.005)


def test_the_rules_of_the_real_task_by_hand():
    """Shares of: one sentence, the instruction or both; unseen prompts share no topic with those of training."""
    judge = real_text.Rules()
    commas, word = "What is rain? Do not use commas.", 'What is rain? Use the word "water".'
    assert judge.shares(commas, "Rain is water.") == [1, 1] == judge.shares(word, "Rain is Water!")
    assert judge.shares(commas, "Rain, snow, fog. And more.") == [0, 1 / 3] and judge.shares(word, "Waters") == [0, 0]
    assert judge.shares(commas + ' Use the word "water".', '"A, b."') == [1, 1 / 2, 0]
    assert judge.shares(commas, ".") == [0, 0]
    prefs = judge([[{"role": "user", "content": word}]], [["It is water.", "It is wet.", "Wet"]])  # s = 1, 1/2, 0
    right = torch.sigmoid(6 * torch.tensor([[[0, 0.5, 1], [-0.5, 0, 0.5], [-1, -0.5, 0]]]))
    torch.testing.assert_close(prefs, right)


def test_unseen_prompts_are_on_other_topics():
    train, unseen = real_text.all_prompts()
    texts = [[re.sub("[?.]", " ", prompt[-1]["content"]) for prompt in prompts] for prompts in (train, unseen)]
    topics = [{t for t in real_text.TOPICS if any(f" {t} " in text for text in some)} for some in texts]
    assert len(train) == 360 and len(unseen) == 96 and len(topics[0]) == 64 and not topics[0] & topics[1] and topics[1]
    both = [prompt for prompt in unseen if all(text in prompt[-1]["content"] for text in ("commas", "Use the word"))]
    assert both == unseen[64:] and not any(text in str(train) for text in ("commas. Use", '". Do not'))


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
