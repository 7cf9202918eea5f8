"""Sr-DPO and Sr-IPO: losses by hand, the prompt p, pairs, steps as the paper writes them, measures."""

import math

import pytest
import torch
import transformers
from steps import TWO, best_of, check_two_steps, lines, log_pi, run, tensor, turns

import common
import sr_dpo
from sr_dpo import Args, digit_pairs, refine, refinement, sr_dpo_loss, sr_ipo_loss
from test_chat import CASES, chat

FEW = {"limit": 64, "n_eval": 16, "epochs": 1, "batch_size": 16}


def numbers(n=7, count=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, dtype=torch.float64, generator=generator) * 5 - 20 for _ in range(count)]


# Losses --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("logps", "delta", "beta", "lam", "dpo", "ipo"),
    [
        # h(y+) = 1, h(y-) = -2, margin 3
        ((-2, -5, -3, -3), 0.0, 0.5, 0.0, math.log(1 + math.exp(-1.5)), (3 - 1) ** 2),
        ((-2, -5, -3, -3), 1.0, 0.5, 0.5, math.log(1 + math.exp(-1.0)), (3 - 0.5 - 1) ** 2),
        ((-2, -5, -3, -3), -1.0, 0.5, 2.0, math.log(1 + math.exp(-3.5)), (3 + 2 - 1) ** 2),
        ((-4, -4, -4, -4), 0.0, 0.1, 1.0, math.log(2), 25.0),  # the start
        ((-2000, -3, -3, -3), 0.0, 1.0, 1.0, 1997.0, 1997.5**2),  # no overflow
    ],
)
def test_the_losses_by_hand(logps, delta, beta, lam, dpo, ipo):
    terms = [tensor(x) for x in logps]
    assert sr_dpo_loss(*terms, tensor(delta), beta, lam).item() == pytest.approx(dpo)
    assert sr_ipo_loss(*terms, tensor(delta), beta, lam).item() == pytest.approx(ipo)


def test_the_refinement_by_hand():
    # behind p + x: chosen -2 - (-3) = 1, rejected -7 - (-4) = -3; the same turned round; 1 and 4
    by_hand = refinement(tensor(-2, -7, -1), tensor(-7, -2, -1), tensor(-3, -4, -2), tensor(-4, -3, -5), 0.1)
    assert by_hand.tolist() == pytest.approx([0.4, -0.4, -0.3])


def test_lam_0_is_dpo_and_ipo_to_the_bit():
    c, r, ref_c, ref_r = numbers()
    delta, beta = numbers(count=1, seed=1)[0], 0.3
    margin = (c - ref_c) - (r - ref_r)
    terms = c, r, ref_c, ref_r, delta, beta
    assert torch.equal(sr_dpo_loss(*terms, 0.0), -torch.nn.functional.logsigmoid(beta * margin))
    assert torch.equal(sr_ipo_loss(*terms, 0.0), (margin - 1 / (2 * beta)) ** 2)


def test_gradients():
    terms = [x.requires_grad_() for x in numbers()]
    delta = numbers(count=1, seed=1)[0]
    for loss in (sr_dpo_loss, sr_ipo_loss):
        assert torch.autograd.gradcheck(lambda *x, loss=loss: loss(*x, delta, 0.1, 0.5), terms)


@pytest.mark.parametrize("loss", [sr_dpo_loss, sr_ipo_loss])
def test_no_gradient_goes_through_delta(loss):
    """Nor through one that forgot to detach (a small one, at which no sigmoid is 0): Delta counts as a number."""
    c, r, ref_c, ref_r = numbers()
    beta, lam, margin, x = 0.2, 0.7, (c - ref_c) - (r - ref_r), c.clone().requires_grad_()
    refined = refinement(2 * x, r, ref_c, ref_r, beta)
    assert not refined.requires_grad
    for delta in (refined, x / 10):
        (found,) = torch.autograd.grad(loss(x, r, ref_c, ref_r, delta, beta, lam).sum(), x)
        less = lam * delta.detach()
        dpo, ipo = -beta * torch.sigmoid(less - beta * margin), 2 * (margin - less - 1 / (2 * beta))
        torch.testing.assert_close(found, dpo if loss is sr_dpo_loss else ipo)


def test_the_naive_refinement_only_rescales_beta():
    """Eq. 10: Delta without p is beta times the margin, and Sr-DPO is DPO at (1 - lam) beta."""
    c, r, ref_c, ref_r = numbers()
    beta, lam, x = 0.3, 0.4, c.clone().requires_grad_()
    naive = refinement(c, r, ref_c, ref_r, beta)
    losses = (
        sr_dpo_loss(x, r, ref_c, ref_r, naive, beta, lam),
        sr_dpo_loss(x, r, ref_c, ref_r, 0 * c, (1 - lam) * beta, 0),
    )
    torch.testing.assert_close(*losses)
    (one,), (other,) = (torch.autograd.grad(loss.sum(), x) for loss in losses)
    torch.testing.assert_close(one * (1 - lam), other)  # the same, but for a factor


def test_losses_reject_nonsense():
    one, two = torch.ones(1), torch.ones(2)
    for loss in (sr_dpo_loss, sr_ipo_loss):
        for beta, lam in ((0, 1), (-1, 1), (0.1, -0.1)):
            with pytest.raises(ValueError, match="beta must be positive and lam not negative"):
                loss(one, one, one, one, one, beta, lam)
        with pytest.raises(ValueError, match="shapes differ"):
            loss(one, one, one, one, two, 0.1, 0.1)


@pytest.mark.parametrize("name", CASES)
def test_p_stands_in_front_of_the_last_query(name):
    one, prompt = chat(name), turns("First?", "Yes.", "Second?")
    plain, refined = (one.tokenizer.decode(one.prompt_ids(x)) for x in (prompt, refine(prompt, "Best: ")))
    assert refined == plain.replace("Second?", "Best: Second?") and refined != plain
    assert prompt[-1]["content"] == "Second?"  # the prompt itself stays


# Pairs ---------------------------------------------------------------------------------------------------------------


def test_digit_pairs_are_wrong_by_known_amounts():
    for pair in digit_pairs(300, 1):
        right = sorted(pair["prompt"][0]["content"])
        wrong = [sum(a != b for a, b in zip(pair[name], right, strict=True)) for name in ("chosen", "rejected")]
        assert 1 <= wrong[0] < wrong[1] <= len(right)
        assert pair["gap"] == pytest.approx((wrong[1] - wrong[0]) / len(right))


def rows_of(pairs, **settings):
    policy, tokenizer = common.load_policy("tiny")
    return sr_dpo.make_pairs(policy, tokenizer, pairs, Args(**settings)), tokenizer


def pair_of(prompt, chosen, rejected):
    return {"prompt": turns(prompt), "chosen": chosen, "rejected": rejected}


def test_responses_end_with_the_turn_and_truncation_leaves_their_start(workdir):
    rows, tokenizer = rows_of([pair_of("12", "12", "1" * 40)], max_new_tokens=8)
    chosen, rejected = rows[0]["responses"]
    assert tokenizer.decode(chosen["ids"]) == "12</s>" and chosen["finished"]
    assert tokenizer.decode(rejected["ids"]) == "1" * 8 and not rejected["finished"]
    assert tokenizer.decode(rows[0]["prompt_ids"]) == "<s>12="
    assert tokenizer.decode(rows[0]["refined_ids"]) == "<s>100/100: 12="


def test_what_is_left_out_is_counted(workdir, capsys):
    pairs = [
        pair_of("1" * 70, "1", "2"),
        pair_of("1" * 55, "1", "2"),  # fits, but not with p
        pair_of("3", "1" * 20, "1" * 21),  # equal in their first 16 tokens
        pair_of("4", "1", "2"),
    ]
    rows, _ = rows_of(pairs)
    out = capsys.readouterr().out
    assert [row["prompt"][0]["content"] for row in rows] == ["4"]
    assert "--pairs: 1 of 4 skipped: over --max_prompt_tokens 64" in out
    assert "--pairs with p: 1 of 3 skipped: over --max_prompt_tokens 64" in out
    assert "--pairs: 2 of 4 responses are truncated at --max_new_tokens 16" in out
    assert "--pairs: 1 of 2 skipped: their truncated responses are equal" in out


@pytest.mark.parametrize(("loss", "lam"), [("sr_dpo", 0.5), ("sr_ipo", 0.5), ("sr_dpo", 0.0)])
def test_the_steps_are_those_of_the_equations(workdir, tiny, loss, lam):
    """Against one pair at a time, written from eq. 12, 13 and 15, Delta from the policy of each step."""
    two = {name: value for name, value in TWO.items() if name != "iterations"}
    folder, _ = run(sr_dpo, **two, loss=loss, lam=lam, beta=0.5, beta_ipo=0.5, micro_tokens=100)
    deltas = []

    def value(policy, pair):
        h = log_pi(policy, pair) - torch.tensor(pair["ref_logps"])
        with torch.no_grad():
            h_p = log_pi(policy, pair, "refined_ids") - torch.tensor(pair["ref_logps_p"])
        deltas.append((0.5 * (h_p[0] - h_p[1])).item() if lam else 0.0)
        if loss == "sr_dpo":
            return -torch.log(1 / (1 + torch.exp(-(0.5 * (h[0] - h[1]) - lam * deltas[-1]))))
        return (h[0] - h[1] - lam * deltas[-1] - 1) ** 2

    pairs, steps = check_two_steps(folder, tiny, value)
    assert steps[1]["delta"] == pytest.approx(sum(deltas[len(pairs) :]) / len(pairs), rel=1e-2, abs=1e-4)
    assert abs(steps[0]["delta"]) < 1e-4 and (abs(steps[1]["delta"]) > 1e-3) == (lam > 0)


# Runs ----------------------------------------------------------------------------------------------------------------


def test_measures_are_those_of_the_paper(workdir, tiny, monkeypatch):
    """Mean margin and accuracy on held-out pairs, in front of and behind p, and how the margin goes with the gap."""
    measured, measure = [], sr_dpo.measure
    monkeypatch.setattr(sr_dpo, "measure", lambda *x: measured.extend(x[1]) or measure(*x))
    (folder, table), pairs = run(sr_dpo, **FEW), measured
    start, policy = (transformers.AutoModelForCausalLM.from_pretrained(x) for x in (tiny, folder / "iter_1/policy"))
    margins = {}
    with torch.no_grad():
        for name in ("prompt_ids", "refined_ids"):
            h = [log_pi(policy, pair, name) - log_pi(start, pair, name) for pair in pairs]
            margins[name] = [(chosen - rejected).item() for chosen, rejected in h]
    for suffix, values in zip(("", "_p"), margins.values(), strict=True):
        assert table[1]["marginal" + suffix] == pytest.approx(sum(values) / 16, abs=1e-3)
        assert table[1]["accuracy" + suffix] == sum(value > 0 for value in values) / 16
    x, y = torch.tensor([margins["prompt_ids"], [pair["gap"] for pair in pairs]], dtype=torch.float64)
    ranks = torch.stack([(v[:, None] > v).sum(1) + (v[:, None] == v).sum(1) / 2 for v in (x, y)])
    signs = torch.stack([(v[:, None] - v).sign().flatten() for v in (x, y)])  # Kendall's tau-b: their cosine
    right = {"pearson": torch.stack([x, y]).corrcoef(), "spearman": ranks.corrcoef(), "kendall": signs.corrcoef()}
    for name, matrix in right.items():
        assert table[1][name] == pytest.approx(matrix[0, 1].item(), abs=1e-3)


@pytest.mark.parametrize("settings", [{"lam": 0.0}, {"loss": "sr_ipo"}, {"judge": ""}, {"refine_prompt": "Best: "}])
def test_every_option_runs(workdir, settings):
    folder, table = run(sr_dpo, **{**FEW, **settings})
    assert len(table) == 2 and lines(folder / "metrics.jsonl") == table
    assert 0 <= table[-1]["accuracy"] <= 1 and 0 <= table[-1]["accuracy_p"] <= 1
    assert ("wins_vs_start" in table[-1]) == (settings.get("judge") != "")
    outputs = common.json.loads((folder / "iter_1/outputs.json").read_text())
    assert len(outputs) == 16 and {row["generator"] for row in outputs} == {"x"}
    assert (folder / "final").is_symlink() == (best_of(table) == 1)


def test_without_p_delta_is_the_margin_itself(workdir):
    """The naive refinement of eq. 10 and table 4: p is empty, so Delta is beta times the pair's own margin."""
    folder, table = run(sr_dpo, **{**FEW, "refine_prompt": "", "beta": 0.5})
    assert all(pair["refined_ids"] == pair["prompt_ids"] for pair in lines(folder / "iter_1/pairs.jsonl"))
    assert (table[1]["marginal"], table[1]["accuracy"]) == (table[1]["marginal_p"], table[1]["accuracy_p"])
    for step in lines(folder / "iter_1/steps.jsonl"):
        margin = step["chosen_log_ratio"] - step["rejected_log_ratio"]
        assert step["delta"] == pytest.approx(0.5 * margin, abs=1e-4)


def test_pairs_without_scores_or_with_equal_ones_have_no_correlations(workdir):
    rows = [{"prompt": f"{i}", "chosen": "12", "rejected": "21"} for i in range(40)]
    common.write_jsonl(workdir / "none.jsonl", rows)
    common.write_jsonl(workdir / "same.jsonl", [{**row, "score_chosen": 1, "score_rejected": 0} for row in rows])
    for file in ("same", "none"):
        folder, table = run(sr_dpo, file, pairs=f"{file}.jsonl", n_eval=10, epochs=1)
        assert "pearson" not in table[-1] and "NaN" not in (folder / "metrics.jsonl").read_text()
