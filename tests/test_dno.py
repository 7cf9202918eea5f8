"""DNO: its losses by hand and on a game with a known equilibrium, pairs, replay, its steps as the paper writes them."""

import math

import pytest
import torch
import transformers
from steps import TWO, check_two_steps, lines, log_pi, run, stopped, tensor

import dno
from dno import Args, dno_exact_loss, dno_loss, make_pairs, win_rates

# Losses --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("logps", "eta", "loss"),
    [
        ((-2, -3, -2, -3), 0.1, math.log(2)),  # the policy is the reference
        ((-2, -3, -3, -2), 0.5, math.log(1 + math.exp(-1))),  # h = 1 and -1
        ((-5, -1, -3, -2), 2.0, math.log(1 + math.exp(6))),  # h = -2 and 1
        ((-2000, -3, -2, -3), 1.0, 1998.0),  # no overflow
    ],
)
def test_the_contrastive_loss_by_hand(logps, eta, loss):
    assert dno_loss(*(tensor(x) for x in logps), eta).item() == pytest.approx(loss)


def test_the_exact_loss_by_hand():
    h_1, h_2, r_1, r_2, eta = 0.7, -0.4, 0.9, 0.2, 0.3
    z, z_hat = 1 / (1 + math.exp(-(r_1 - r_2))), 1 / (1 + math.exp(-eta * (h_1 - h_2)))
    right = -(z * math.log(z_hat) + (1 - z) * math.log(1 - z_hat))  # eq. 12
    loss = dno_exact_loss(tensor(h_1 - 3), tensor(h_2 - 5), tensor(-3), tensor(-5), tensor(r_1), tensor(r_2), eta)
    assert loss.item() == pytest.approx(right)
    swapped = dno_exact_loss(tensor(h_2 - 5), tensor(h_1 - 3), tensor(-5), tensor(-3), tensor(r_2), tensor(r_1), eta)
    assert swapped.item() == pytest.approx(right)


def test_gradients():
    logps = [torch.randn(5, dtype=torch.float64, requires_grad=True) for _ in range(4)]
    r = torch.rand(2, 5, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *x: dno_loss(*x, 0.3), logps)
    assert torch.autograd.gradcheck(lambda *x: dno_exact_loss(*x, *r, 0.3), logps)


def test_losses_reject_nonsense():
    one, two = torch.ones(1), torch.ones(2)
    for eta in (0, -1):
        with pytest.raises(ValueError, match="eta must be positive"):
            dno_loss(one, one, one, one, eta)
    with pytest.raises(ValueError, match="shapes differ"):
        dno_loss(one, one, two, one, 0.1)
    with pytest.raises(ValueError, match="shapes differ"):
        dno_exact_loss(one, one, one, two, one, one, 0.1)


def test_win_rates_leave_the_response_itself_out():
    prefs = torch.tensor([[[0.5, 1.0, 0.5], [0.0, 0.5, 0.2], [0.5, 0.8, 0.5]]])
    torch.testing.assert_close(win_rates(prefs), torch.tensor([[0.75, 0.1, 0.65]]))


# The game ------------------------------------------------------------------------------------------------------------

# Biased rock, paper, scissors: P(R > S) = 0.9, P(P > R) = 0.6, P(S > P) = 0.6.
GAME = tensor([0.5, 0.4, 0.9], [0.6, 0.5, 0.4], [0.1, 0.6, 0.5])
FIRST, SECOND = [0, 0, 1], [1, 2, 2]  # all pairs of actions


def exact_loss(theta, log_pi_t, r, eta):
    logps = torch.log_softmax(theta, 0)
    return dno_exact_loss(*(x[some] for x in (logps, log_pi_t, r) for some in (FIRST, SECOND)), eta).sum()


def soft_policy_iteration(log_pi, r, eta):
    return torch.log_softmax(log_pi + r / eta, 0)  # eq. 9


@pytest.mark.parametrize("eta", [0.1, 1.0, 5.0])
def test_the_exact_loss_is_least_at_the_soft_policy_iteration_target(eta):
    torch.manual_seed(0)
    for _ in range(5):
        log_pi_t = torch.log_softmax(torch.randn(3, dtype=torch.float64), 0)
        r = GAME @ log_pi_t.exp()
        target = soft_policy_iteration(log_pi_t, r, eta).requires_grad_()
        (gradient,) = torch.autograd.grad(exact_loss(target, log_pi_t, r, eta), target)
        assert gradient.abs().max() < 1e-12
        least = exact_loss(target, log_pi_t, r, eta)
        for _ in range(20):
            assert exact_loss(target + 0.3 * torch.randn(3, dtype=torch.float64), log_pi_t, r, eta) > least


@pytest.mark.parametrize("eta", [0.05, 0.5, 2.0])
def test_monotone_improvement(eta):
    """Section 3.1: P(pi_{t+1} > pi_t) >= 1/2 + eta KL(pi_{t+1} || pi_t) for the exact target."""
    torch.manual_seed(1)
    for _ in range(50):
        log_pi_t = torch.log_softmax(2 * torch.randn(3, dtype=torch.float64), 0)
        new = soft_policy_iteration(log_pi_t, GAME @ log_pi_t.exp(), eta)
        kl = (new.exp() * (new - log_pi_t)).sum()
        assert new.exp() @ GAME @ log_pi_t.exp() >= 0.5 + eta * kl - 1e-12


# Pairs ---------------------------------------------------------------------------------------------------------------


def row_of(n, gold=True):
    """A row of n responses of the student, ids 0 to n - 1, and the teacher's, 99."""
    ys = [{"ids": [i], "text": str(i), "finished": True} for i in range(n)]
    return {"prompt": [], "responses": [*ys, {**ys[0], "ids": [99], "teacher": True}] if gold else ys}


def pairs_of(rates, points=None, gold=True, **settings):
    """{(chosen, rejected): kind} of candidates with these win rates, the teacher's last, or these points."""
    ranked = {"win_rate": rates, "points": points} if points else {"win_rate": rates}
    pairs = make_pairs([row_of(len(rates) - gold, gold)], [ranked], Args(**settings))
    return {(pair["responses"][0]["ids"][0], pair["responses"][1]["ids"][0]): pair["kind"] for pair in pairs}


def test_large_margin_pairs_on_a_literal_table():
    assert pairs_of([0.8, 0.6, 0.4, 0.75]) == {
        (0, 1): "student_student",
        (0, 2): "student_student",
        (1, 2): "student_student",  # by 0.2, more than half of 0.3
        (99, 2): "teacher_student",  # by 0.35; not 99 over 1, by 0.15, nor 0 over 99, by 0.05
    }
    found = pairs_of([0.9, 0.1, 0.5])
    assert found == {(0, 99): "student_teacher", (0, 1): "student_student", (99, 1): "teacher_student"}
    assert pairs_of([0.45, 0.1, 0.0], gold=False) == {}  # a positive must be good itself
    assert pairs_of([0.8, 0.6, 0.4, 0.75], min_score=0.7, margin=0.5) == {(0, 2): "student_student"}


def test_restrictive_spin_and_all():
    assert pairs_of([0.9, 0.1, 0.5], variant="restrictive") == {(99, 1): "teacher_student"}
    spin, row = Args(variant="spin"), row_of(2)
    ranked = dno.rank_responses(None, [row], spin)  # nobody is asked
    assert pairs_of(ranked[0]["win_rate"], variant="spin") == {(99, 0): "teacher_student", (99, 1): "teacher_student"}
    row["responses"][2]["finished"] = False  # a teacher that was cut
    assert dno.rank_responses(None, [row], spin)[0]["win_rate"] == [0, 0, 0]
    assert pairs_of([0, 0, 0], variant="spin") == {}
    assert set(pairs_of([0.3, 0.2, 0.2], gold=False, variant="all")) == {(0, 1), (0, 2)}  # 1 and 2 tie


def test_pairs_by_points_are_the_papers():
    half = [0.5] * 5
    assert pairs_of(half, points=[6, 5, 4, 3, 6]) == {
        (0, 1): "student_student",  # 5 or 6, and 1 better
        (0, 2): "student_student",
        (0, 3): "student_student",
        (1, 2): "student_student",
        (1, 3): "student_student",
        (99, 2): "teacher_student",  # 2 better; not over 1
        (99, 3): "teacher_student",
    }
    assert pairs_of(half[:3], points=[6, 5, 4], margin=4.0) == {(0, 99): "student_teacher"}
    assert pairs_of(half[:4], points=[4, 1, 0, 4]) == {}
    assert pairs_of(half[:3], points=[6, 1, math.nan]) == {}  # not judged


def test_truncated_responses_get_no_points():
    class Judge:
        def __call__(self, prompts, responses):
            return torch.full((1, 3, 3), 0.5)

        def points(self, prompts, responses):
            return torch.tensor([[3.0, 6.0, 6.0]])

    row = row_of(3, gold=False)
    row["responses"][1]["finished"] = False
    (ranked,) = dno.rank_responses(Judge(), [row], Args())
    assert ranked == {"win_rate": pytest.approx([3 / 4, 0, 3 / 4]), "points": [3, 0, 6]}


def test_a_response_that_repeats_itself_is_a_negative_whatever_the_judge_says():
    row = row_of(2, gold=False)
    row["responses"][0]["ids"] = [7, 8, 9] * 20
    (ranked,) = dno.rank_responses(lambda *_: torch.tensor([[[0.5, 1.0], [0.0, 0.5]]]), [row], Args())
    assert ranked == {"win_rate": [0, 1]}
    assert row["responses"][0]["finished"], "the row keeps what was sampled"


def test_tau_mixes_the_log_probs_of_the_base_model_into_the_reference(workdir, tiny):
    """Eq. 14: log pi_t^(1 - tau/eta) pi_ref^(tau/eta), written out for tau / eta = 1/4."""
    folder, _ = run(dno, **FEW, eta=2.0, tau=0.5)
    before, base = (transformers.AutoModelForCausalLM.from_pretrained(x) for x in (folder / "iter_1/policy", tiny))
    with torch.no_grad():
        for pair in lines(folder / "iter_2/pairs.jsonl")[:5]:
            right = 0.75 * log_pi(before, pair) + 0.25 * log_pi(base, pair)
            torch.testing.assert_close(torch.tensor(pair["ref_logps"]), right, atol=1e-3, rtol=0)


def test_the_exact_loss_takes_every_pair_of_different_responses():
    assert set(pairs_of([0.3, 0.2, 0.2], gold=False, variant="exact")) == {(0, 1), (0, 2), (1, 2)}
    assert pairs_of([0.5, 0.5], variant="exact") == {(99, 0): "teacher_student"}  # not the student's
    same = row_of(2, gold=False)
    same["responses"][1]["ids"] = [0]
    assert make_pairs([same], [{"win_rate": [0.5, 0.5]}], Args(variant="exact")) == []


@pytest.mark.parametrize("variant", ["dno", "exact"])
def test_the_steps_are_those_of_the_equations(workdir, tiny, variant):
    """DNO-Prct is DPO with the reference renewed: the loss as the DPO paper writes it, at eta = beta; exact: eq. 12."""
    folder, _ = run(dno, **{**TWO, "limit": 16}, k=2, eta=0.5, sft_alpha=0.25, variant=variant, micro_tokens=100)

    def value(policy, pair):
        logps = log_pi(policy, pair)
        h = logps - torch.tensor(pair["ref_logps"])
        p = 1 / (1 + torch.exp(-0.5 * (h[0] - h[1])))
        if variant == "dno":
            return -torch.log(p) - 0.25 * logps[0]
        z = 1 / (1 + math.exp(pair["win_rate"][1] - pair["win_rate"][0]))
        return -z * torch.log(p) - (1 - z) * torch.log(1 - p)

    check_two_steps(folder, tiny, value)


# Runs ----------------------------------------------------------------------------------------------------------------

FEW = {"limit": 60, "n_eval": 12, "iterations": 2, "k": 3, "batch_size": 10_000}  # one step an iteration


@pytest.mark.parametrize("variant", ["dno", "exact", "all", "restrictive", "spin", "no teacher"])
def test_every_variant_runs(workdir, variant):
    settings = {"gold": ""} if variant == "no teacher" else {"variant": variant}
    kinds = {"teacher_student"} if variant in ("restrictive", "spin") else {"student_student"}
    kinds |= {"teacher_student"} if variant in ("dno", "exact", "all") else set()  # no student beats this teacher
    folder, table = run(dno, **FEW, **settings)
    pairs = [lines(folder / f"iter_{t}" / "pairs.jsonl") for t in (1, 2)]
    assert len(table) == 3 and table[2]["replayed"] > 0 and table[1]["replayed"] == 0
    assert {pair["kind"] for pair in pairs[0]} == kinds
    assert table[1]["pairs"] == len(pairs[0]) == sum(table[1][kind] for kind in kinds)
    assert table[2]["pairs"] == len(pairs[1]) + table[2]["replayed"]
    policy = transformers.AutoModelForCausalLM.from_pretrained(folder / "iter_1/policy")
    with torch.no_grad():
        for pair in pairs[1][:5]:  # the reference is pi_2
            torch.testing.assert_close(torch.tensor(pair["ref_logps"]), log_pi(policy, pair), atol=1e-3, rtol=0)
    (step,) = lines(folder / "iter_2/steps.jsonl")  # of the replayed pairs as well, whose file says pi_1
    assert abs(step["chosen_log_ratio"]) < 1e-4 and abs(step["rejected_log_ratio"]) < 1e-4


def test_margins_that_nothing_passes_end_the_run_in_one_line(workdir, capsys):
    assert "--margin" in stopped(capsys, run, dno, margin=1.0, min_score=1.0, **FEW)
