"""What is said of an iterate: win rates, at equal length too, another judge, the KL divergence, the best one."""

import json
import math

import pytest
import torch
from steps import cli, lines, log_pi, run
from transformers import AutoModelForCausalLM

import common
import sppo

FEW = {"limit": 60, "n_eval": 12, "iterations": 1, "k": 3}


def test_the_logistic_fit_by_hand():
    """Expected wins of a judge with a log-odds of 0.4, and 1.5 more at d = 1: five Newton steps find both."""
    lengths, others = torch.tensor([[30, 10, 20, 40, 25], [10, 30, 20, 25, 40]])
    d = (lengths - others) / (lengths + others)
    win_rate, se = common.equal_length_win_rate(torch.sigmoid(0.4 + 1.5 * d), lengths, others)
    assert win_rate == pytest.approx(1 / (1 + math.exp(-0.4)), abs=1e-6) and se < 1e-4  # an exact fit


def test_at_equal_lengths_the_fit_is_the_mean_with_its_standard_error():
    wins, lengths = torch.rand(400, generator=torch.Generator().manual_seed(0)), torch.full((400,), 7)
    win_rate, se = common.equal_length_win_rate(wins, lengths, lengths)
    assert win_rate == pytest.approx(wins.mean().item(), abs=1e-4)
    assert se == pytest.approx(wins.std().item() / 20, rel=1e-2)


def test_a_judge_of_length_alone_gives_one_half_and_the_error_covers_it():
    rng = torch.Generator().manual_seed(0)
    lengths, others = torch.randint(20, 60, (2, 500), generator=rng)
    won = torch.rand(500, generator=rng) < torch.sigmoid(6 * (lengths - others) / (lengths + others))
    win_rate, se = common.equal_length_win_rate(won.double(), lengths + 0, others)
    assert abs(win_rate - 0.5) < 3 * se and 0.02 < se < 0.04
    for wins in (torch.ones(50), torch.zeros(50)):  # the longer one always wins, or nobody ever does
        assert all(map(math.isfinite, common.equal_length_win_rate(wins, lengths[:50], others[:50])))


def test_another_judge_is_asked_and_trains_nothing(workdir, monkeypatch):
    asked = []

    def shortest(prompts, responses):
        asked.extend(responses)
        lengths = torch.tensor([[len(y) for y in texts] for texts in responses]).float()
        return (lengths[:, None, :] - lengths[:, :, None]).sign() / 2 + 0.5

    monkeypatch.setitem(common.JUDGES, "shortest", lambda args: shortest)
    _, alone = run(sppo, "alone", **FEW)
    _, table = run(sppo, "both", eval_judge="shortest", **FEW)
    names = {"wins_vs_start", "se", "wins_at_equal_length", "equal_length_se", "length_ratio", "wins_vs_each"}
    assert table[1].keys() - alone[1].keys() == {f"eval_judge_{name}" for name in names}
    assert table[1]["wins_vs_start"] == alone[1]["wins_vs_start"] != table[1]["eval_judge_wins_vs_start"]
    assert len(asked) == 1 + 12 and all(len(texts) == 2 for texts in asked)  # a trial question, and each duel once


def test_kl_is_called_so_only_where_it_is_one(workdir, tiny):
    folder, table = run(sppo, **FEW)
    answers, policy = (
        lines(folder / "iter_0/answers.jsonl"),
        AutoModelForCausalLM.from_pretrained(folder / "iter_1/policy"),
    )
    with torch.no_grad():
        gaps = [row["logps"][0] - log_pi(policy, row).item() for row in answers]
    assert table[1]["kl"] == pytest.approx(sum(gaps) / 12, abs=1e-3)
    _, table = run(sppo, "cold", temperature=0.7, **FEW)
    assert "kl" not in table[1] and "logp_drop" in table[1]


def test_a_run_that_got_worse_has_no_final_policy(workdir, capsys):
    cli(sppo, *(f"--{name}={value}" for name, value in {**FEW, "learning_rate": 3e-2, "name": "x"}.items()))
    said, (_, row) = capsys.readouterr().out, lines(workdir / "runs/x/metrics.jsonl")
    assert row["wins_vs_start"] < 0.5 and said.splitlines()[-1].startswith("no iterate beats the base model")
    assert "lower --learning_rate" in said and not (workdir / "runs/x/final").is_symlink()
    assert (workdir / "runs/x/iter_1/policy").is_dir() and json.loads((workdir / "runs/x/config.json").read_text())
