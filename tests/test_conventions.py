"""How other papers and codes write the same losses: each is written here anew, token by token, and converted."""

import math

import pytest
import torch

import dno
import sppo
import sr_dpo

RNG = torch.Generator().manual_seed(7)
# log-probs of the tokens of a chosen and a rejected response, EOS last, by the policy and by its reference
TOKENS = {
    (who, which): -3 * torch.rand(n, generator=RNG, dtype=torch.float64)
    for which, n in (("chosen", 5), ("rejected", 9))
    for who in ("policy", "reference")
}
SUMS = {key: x.sum() for key, x in TOKENS.items()}
MEANS = {key: x.mean() for key, x in TOKENS.items()}
A, B = (float(SUMS["policy", y] - SUMS["reference", y]) for y in ("chosen", "rejected"))  # log-ratios


def of_pair(loss, logps, *more):
    """A loss of this project on that pair, as a number."""
    keys = ("policy", "chosen"), ("policy", "rejected"), ("reference", "chosen"), ("reference", "rejected")
    return loss(*(logps[key][None] for key in keys), *more).item()


def sppo_rows(win_rates, eta):
    """sppo_loss of the chosen and the rejected response."""
    logps, refs = ([SUMS[who, y] for y in ("chosen", "rejected")] for who in ("policy", "reference"))
    return sppo.sppo_loss(torch.stack(logps), torch.stack(refs), torch.tensor(win_rates), eta).tolist()


def log_sigmoid(x):
    return -math.log1p(math.exp(-x))


def test_the_official_sppo_loss_is_the_mean_of_both_and_trls_sppo_hard_is_their_sum():
    beta, win, lose = 1e-2, 0.8, 0.1
    theirs = ((A - (win - 0.5) / beta) ** 2 + (B - (lose - 0.5) / beta) ** 2) / 2
    assert sum(sppo_rows([win, lose], eta=1 / beta)) / 2 == pytest.approx(theirs)
    single = ((A - (win - 0.5) / beta) ** 2 + (B + (win - 0.5) / beta) ** 2) / 2  # of P(chosen > rejected) alone
    assert sum(sppo_rows([win, 1 - win], eta=1 / beta)) / 2 == pytest.approx(single)
    trls = (A - 0.5 / beta) ** 2 + (B + 0.5 / beta) ** 2
    assert 2 * sum(sppo_rows([1.0, 0.0], eta=1 / beta)) / 2 == pytest.approx(trls)


@pytest.mark.parametrize("beta", [0.05, 0.1, 2.0])
def test_trls_dpo_is_dnos_loss_at_eta_beta_and_sr_dpos_at_lambda_0(beta):
    theirs = -log_sigmoid(beta * (A - B))
    assert of_pair(dno.dno_loss, SUMS, beta) == pytest.approx(theirs)
    assert of_pair(sr_dpo.sr_dpo_loss, SUMS, torch.ones(1), beta, 0.0) == pytest.approx(theirs)


@pytest.mark.parametrize("smoothing", [0.1, 0.3])
def test_mitchells_label_smoothing_is_the_exact_loss_with_a_fixed_preference(smoothing):
    beta = 0.1
    theirs = -(1 - smoothing) * log_sigmoid(beta * (A - B)) - smoothing * log_sigmoid(beta * (B - A))
    r_1 = torch.tensor([math.log((1 - smoothing) / smoothing)], dtype=torch.float64)
    assert of_pair(dno.dno_exact_loss, SUMS, r_1, torch.zeros(1), beta) == pytest.approx(theirs)


def test_trls_ipo_takes_means_over_tokens_where_the_paper_takes_sums():
    beta = 0.1
    a, b = (float(MEANS["policy", y] - MEANS["reference", y]) for y in ("chosen", "rejected"))
    theirs = (a - b - 1 / (2 * beta)) ** 2
    assert of_pair(sr_dpo.sr_ipo_loss, MEANS, torch.zeros(1), beta, 0.0) == pytest.approx(theirs)
    papers = (A - B - 1 / (2 * beta)) ** 2
    assert of_pair(sr_dpo.sr_ipo_loss, SUMS, torch.zeros(1), beta, 0.0) == pytest.approx(papers)
    assert abs(papers - theirs) > 1


def test_win_rates_with_and_without_the_response_itself():
    k = 5
    upper = torch.rand(3, k, k, generator=RNG).triu(1)
    prefs = upper + (1 - upper.mT).tril(-1) + torch.eye(k) / 2
    torch.testing.assert_close(sppo.win_rates(prefs), ((k - 1) * dno.win_rates(prefs) + 0.5) / k)


def test_the_official_preference_of_two_is_twice_as_sharp():
    logits = torch.randn(4, 2, 2, generator=RNG) * (1 - torch.eye(2))
    prefs = torch.sigmoid((logits - logits.mT) / 2)
    half = torch.sigmoid(torch.logit(sppo.official_prefs(prefs)) / 2)
    torch.testing.assert_close(half, prefs)
