import json
import math
import random

import pytest
import torch

import common
import dno
from dno import Args, dno_exact_loss, dno_loss, make_pairs, win_rates, with_replay

pytestmark = pytest.mark.usefixtures("one_thread")


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


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


def test_a_certain_preference_makes_the_exact_loss_contrastive():
    logps = torch.randn(4, 7, dtype=torch.float64)
    sure = dno_exact_loss(logps[0], logps[1], logps[2], logps[3], torch.full((7,), 1e3), torch.zeros(7), 0.2)
    torch.testing.assert_close(sure, dno_loss(*logps, 0.2))


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

# Biased rock, paper, scissors: P(R > S) = 0.9, P(P > R) = 0.6, P(S > P) = 0.6; at Nash 1/6, 2/3, 1/6.
GAME = tensor([0.5, 0.4, 0.9], [0.6, 0.5, 0.4], [0.1, 0.6, 0.5])
NASH = tensor(1 / 6, 2 / 3, 1 / 6)
FIRST, SECOND = [0, 0, 1], [1, 2, 2]  # all pairs of actions


def exact_loss(theta, log_pi_t, r, eta):
    logps = torch.log_softmax(theta, 0)
    return dno_exact_loss(
        logps[FIRST], logps[SECOND], log_pi_t[FIRST], log_pi_t[SECOND], r[FIRST], r[SECOND], eta
    ).sum()


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


def average_iterate(T):
    """T iterations of self-play, the shipped loss minimised by steps that bound its curvature from above."""
    eta, theta, total = math.sqrt(T) / 8, tensor(0.5, 0.0, -0.5), torch.zeros(3, dtype=torch.float64)
    for _ in range(T):
        log_pi_t = torch.log_softmax(theta, 0)
        r = GAME @ log_pi_t.exp()
        total += log_pi_t.exp()
        for _ in range(4):
            theta.requires_grad_()
            (gradient,) = torch.autograd.grad(exact_loss(theta, log_pi_t, r, eta), theta)
            theta = theta.detach() - gradient * 4 / (3 * eta**2)  # the Hessian is at most eta^2 / 4 (3 I - 1 1^T)
    return total / T


def test_the_average_iterate_of_exact_dno_reaches_nash():
    short, middle, long = (average_iterate(T) for T in (30, 300, 3000))
    assert (long - NASH).abs().max() < 0.03

    def gap(policy):
        return (GAME @ policy).max().item() - 0.5

    assert gap(short) > 2 * gap(middle) > 4 * gap(long) > 0


# Pairs ---------------------------------------------------------------------------------------------------------------


def candidates(*rates, gold=None):
    rows = [{"ids": [i], "win_rate": rate, "finished": True, "repeats": False} for i, rate in enumerate(rates)]
    return [rows if gold is None else [*rows, {**rows[0], "ids": [99], "win_rate": gold, "teacher": True}]]


def pairs_of(row, **settings):
    rows, failed = make_pairs([{"prompt_ids": [7]}], row, Args(**settings))
    return {(row["responses"][0]["ids"][0], row["responses"][1]["ids"][0]): row["kind"] for row in rows}, failed


RULES = {"min_win_rate": 0.5, "win_rate_margin": 0.3}


def test_large_margin_pairs_on_a_literal_table():
    pairs, failed = pairs_of(candidates(0.8, 0.6, 0.4, gold=0.75), **RULES)
    assert pairs == {
        (0, 1): "student_student",
        (0, 2): "student_student",
        (1, 2): "student_student",
        (99, 2): "teacher_student",  # by 0.35
    }
    assert failed == {"within half of it": 1, "within --win_rate_margin": 1}  # 0 over gold by 0.05; gold over 1, 0.15
    pairs, _ = pairs_of(candidates(0.9, 0.1, gold=0.5), **RULES)
    assert pairs == {(0, 99): "student_teacher", (0, 1): "student_student", (99, 1): "teacher_student"}


def test_a_positive_must_be_good_itself():
    pairs, failed = pairs_of(candidates(0.45, 0.1, 0.0), **RULES)
    assert pairs == {} and failed == {"below --min_win_rate": 3}


def test_restrictive_spin_and_all():
    row = candidates(0.9, 0.1, gold=0.5)
    assert pairs_of(row, **RULES, pairs="restrictive")[0] == {(99, 1): "teacher_student"}
    spin = Args(pairs="spin", judge="nobody")  # nobody is asked
    dno.rank([{}], row, spin)
    assert pairs_of(row, **RULES, pairs="spin")[0] == {(99, 0): "teacher_student", (99, 1): "teacher_student"}
    row[0][2]["finished"] = False  # a teacher that was cut
    dno.rank([{}], row, spin)
    assert pairs_of(row, **RULES, pairs="spin")[0] == {}
    assert set(pairs_of(candidates(0.3, 0.2, 0.2), **RULES, pairs="all")[0]) == {(0, 1), (0, 2)}
    assert pairs_of(candidates(0.3, 0.2, 0.2), pairs="all")[1] == {"tied": 1}


def with_points(points, gold=None):
    rows = candidates(*[0.5] * len(points), gold=gold and 0.5)
    for y, value in zip(rows[0], [*points, gold], strict=False):
        y["points"] = value
    return rows


def test_pairs_by_points_are_the_papers():
    pairs, failed = pairs_of(with_points([6, 5, 4, 3], gold=6))
    assert pairs == {
        (0, 1): "student_student",  # 5 or 6, and 1 better
        (0, 2): "student_student",
        (0, 3): "student_student",
        (1, 2): "student_student",
        (1, 3): "student_student",
        (99, 2): "teacher_student",  # 2 better
        (99, 3): "teacher_student",
    }
    # 4 is no positive over 3; the teacher is better than 1 by one point only; 6 and 6
    assert failed == {"below --min_score": 1, "within --margin": 1, "tied": 1}
    pairs, failed = pairs_of(with_points([6, 5], gold=4), student_margin=2.0)
    assert pairs == {(0, 99): "student_teacher"} and failed == {"within --student_margin": 2}
    assert pairs_of(with_points([4, 1, 0], gold=4)) == ({}, {"below --min_score": 5, "tied": 1})


def test_a_prompt_that_was_not_judged_makes_no_pair():
    row = with_points([6, 1]) + with_points([None, None, None])
    rows, failed = make_pairs([{"prompt_ids": [1]}, {"prompt_ids": [2]}], row, Args())
    assert [pair["prompt_ids"] for pair in rows] == [[1]] and failed == {"not judged": 3}


def test_defective_responses_get_no_points(monkeypatch):
    row = [{"ids": [i], "text": str(i), "finished": i != 1, "repeats": i == 2} for i in range(4)]
    monkeypatch.setitem(common.JUDGES, "points", lambda: lambda prompts, texts: torch.tensor([[3.0, 6.0, 6.0, 6.0]]))
    dno.rank([{"prompt": [{"role": "user", "content": "?"}]}], [row], Args(judge="points"))
    assert [y["points"] for y in row] == [3, 0, 0, 6]
    assert [y["win_rate"] for y in row] == pytest.approx([2 / 3, 1 / 6, 1 / 6, 1])


def test_the_exact_loss_takes_every_pair_of_different_responses():
    assert set(pairs_of(candidates(0.3, 0.2, 0.2), loss="exact")[0]) == {(0, 1), (0, 2), (1, 2)}
    assert pairs_of(candidates(0.5, gold=0.5), loss="exact")[0] == {(99, 0): "teacher_student"}  # not the student's
    same = [[{"ids": [1], "win_rate": 0.5}, {"ids": [1], "win_rate": 0.5}]]
    assert pairs_of(same, loss="exact") == ({}, {"identical": 1})


@pytest.mark.parametrize(
    ("new", "earlier", "sizes"),
    [
        (550, [1000, 1000], [150, 300]),  # 15 %, 30 % and 55 % of 1,000
        (700, [1000], [300]),
        (700, [20], [20]),
        (700, [], []),
        (0, [1000, 1000], [0, 0]),
    ],
)
def test_replay_proportions(new, earlier, sizes):
    lists = [[(t, i) for i in range(n)] for t, n in enumerate(earlier)]
    rows = with_replay(["new"] * new, lists, 0.3, random.Random(0))
    found = [sum(row != "new" and row[0] == t for row in rows) for t in range(len(earlier))]
    assert rows[:new] == ["new"] * new and len(set(rows)) == len(rows) - max(0, new - 1)
    assert all(abs(a - b) <= 2 for a, b in zip(found, sizes, strict=True))
    assert all(n <= 0.3 / 2 ** (len(earlier) - 1 - t) * len(rows) for t, n in enumerate(found))


# Steps ---------------------------------------------------------------------------------------------------------------


def batch_of(tokenizer, n=6):
    rng, rows = random.Random(3), []
    for i in range(n):
        x = tokenizer(f"<s>{'12' * (1 + i % 3)}=").input_ids
        ys = [[*(rng.randrange(19, 29) for _ in range(rng.randint(1, 9))), 1] for _ in range(2)]
        responses = [{"ids": y, "win_rate": w} for y, w in zip(ys, (0.8, 0.3), strict=True)]
        rows.append({"prompt_ids": x, "responses": responses})
    return rows


def reference(policy, rows):
    for row in rows:
        for y in row["responses"]:
            y["ref_logps"] = common.response_logps(policy, [row["prompt_ids"]], [y["ids"]]).item()
    return rows


@pytest.mark.parametrize("loss", ["contrastive", "exact"])
@pytest.mark.parametrize("shares", [True, False])
def test_neither_micro_batches_nor_shared_prompts_change_a_step(tiny_cache, loss, shares, workdir):
    results = []
    for micro_tokens in (10**6, 1):
        policy, tokenizer = common.load_policy("tiny")
        rows = reference(policy, batch_of(tokenizer))
        policy._shares_prompts = shares
        with torch.no_grad():  # away from the reference, where the loss is log 2 whatever the batch
            for p in policy.parameters():
                p += 0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
        args = Args(loss=loss, micro_tokens=micro_tokens, eta=0.5, sft_alpha=0.1, exact_scale=3.0)
        optimizer = torch.optim.SGD(policy.parameters(), lr=0.1)
        scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
        metrics = dno.train_step(policy, optimizer, scheduler, rows, args)
        results.append((metrics, [p.clone() for p in policy.parameters()]))
    (one, a), (other, b) = results
    assert one == pytest.approx(other, rel=1e-4) and one["loss"] != pytest.approx(math.log(2), rel=1e-3)
    for p, q in zip(a, b, strict=True):
        torch.testing.assert_close(p, q, atol=1e-5, rtol=1e-3)


def test_the_step_is_dpos_with_the_reference_renewed(workdir):
    """DNO-Prct is DPO: one SGD step on the loss as the DPO paper writes it, at eta = beta, from log-softmax alone."""
    policy, tokenizer = common.load_policy("tiny")
    rows, beta, lr = reference(policy, batch_of(tokenizer)), 0.5, 0.05
    with torch.no_grad():
        for p in policy.parameters():
            p += 0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    twin, _ = common.load_policy("tiny")
    twin.load_state_dict(policy.state_dict())

    def log_pi(x, y):
        logits = twin(torch.tensor([x + y])).logits[0, len(x) - 1 : -1]
        return torch.log_softmax(logits, -1)[torch.arange(len(y)), torch.tensor(y)].sum()

    total = 0
    for row in rows:
        x, (w, l) = row["prompt_ids"], row["responses"]  # noqa: E741
        ratio_w, ratio_l = log_pi(x, w["ids"]) - w["ref_logps"], log_pi(x, l["ids"]) - l["ref_logps"]
        total = total + torch.log1p(torch.exp(-(beta * ratio_w - beta * ratio_l))) / len(rows)
    total.backward()
    optimizer = torch.optim.SGD(policy.parameters(), lr=lr)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    args = Args(eta=beta, sft_alpha=0.0, max_grad_norm=1e6)
    assert dno.train_step(policy, optimizer, scheduler, rows, args)["loss"] == pytest.approx(total.item(), rel=1e-5)
    for p, q in zip(policy.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q - lr * q.grad, atol=1e-6, rtol=1e-4)


# Runs ----------------------------------------------------------------------------------------------------------------

FEW = {"limit": 60, "n_eval": 12, "iterations": 2, "epochs": 1, "k": 3}


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(
    "settings",
    [{}, {"loss": "exact", "eta": 0.5}, {"pairs": "restrictive"}, {"pairs": "spin"}, {"pairs": "all"}, {"gold": ""}],
    ids=str,
)
def test_every_variant_runs(workdir, capsys, settings):
    table = dno.main(Args(name="x", **FEW, **settings))
    pairs = [lines(workdir / "runs" / "x" / f"iter_{t}" / "pairs.jsonl") for t in (1, 2)]
    kinds = {pair["kind"] for pair in pairs[0]}
    assert len(table) == 3 and table[2]["replayed"] > 0 and table[1]["replayed"] == 0
    assert (
        table[1]["pairs"]
        == len(pairs[0])
        == sum(table[1][f"{k}"] for k in ("teacher_student", "student_teacher", "student_student"))
    )
    if settings.get("pairs") in ("restrictive", "spin"):
        assert kinds == {"teacher_student"}
    if settings.get("gold") == "":
        assert kinds == {"student_student"} and "no --gold: pairs are of the student's" in capsys.readouterr().out
    policy, _ = common.load_policy(str(workdir / "runs" / "x" / "iter_1" / "policy"))
    for pair in pairs[1][:5] + pairs[1][-5:]:  # new and replayed: the reference is pi_2 for both
        for y in pair["responses"]:
            right = common.response_logps(policy, [pair["prompt_ids"]], [y["ids"]]).item()
            assert y["ref_logps"] == pytest.approx(right, abs=1e-3)


def test_gold_of_a_file_missing_for_some(workdir, capsys):
    prompts = [str(n) for n in range(312, 372)]
    common.write_jsonl("p.jsonl", [{"prompt": x} for x in prompts])
    common.write_jsonl("g.jsonl", [{"instruction": x, "output": "".join(sorted(x))} for x in prompts[:30]])
    dno.main(Args(name="x", prompts="p.jsonl", gold="g.jsonl", **{**FEW, "iterations": 1}))
    rates = [row["win_rate"] for row in lines(workdir / "runs" / "x" / "iter_1" / "preferences.jsonl")]
    missing = sum(len(row) == 3 for row in rates)
    assert 0 < missing < len(rates) == 48 and all(sum(row) == pytest.approx(len(row) / 2) for row in rates)
    assert f"--gold: missing for {missing} of 48 prompts" in capsys.readouterr().out


def test_gold_of_ultrafeedback_is_gpt_4s(tmp_path):
    row = {
        "instruction": "q",
        "completions": [{"model": "gpt-4", "response": "best"}, {"model": "x", "response": "no"}],
    }
    common.write_jsonl(tmp_path / "g.jsonl", [row, {"instruction": "r", "completions": [row["completions"][1]]}])
    (gold,) = common.load_gold(str(tmp_path / "g.jsonl")).values()
    assert gold == {"prompt": [{"role": "user", "content": "q"}], "gold": "best"}


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--eta", "0"], "--eta 0.0: must be between"),
        (["--replay", "1"], "--replay 1.0: must be in [0, 1)"),
        (["--pairs", "spin", "--gold", ""], "--pairs spin: its pairs are won by a teacher, so it takes --gold"),
        (["--margin", "nan"], "--margin nan: must be in [0, 6]"),
        (["--sft_alpha", "-1"], "--sft_alpha -1.0"),
        (["--gold", "none.jsonl"], "--gold none.jsonl: no such file"),
        (["--gold", "bad.jsonl"], "--gold bad.jsonl, line 1: no gold; keys found: prompt"),
        (["--loss", "some"], "--loss"),
        (["--pairs", "extremes"], "--pairs"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(workdir, capsys, flags, words):
    (workdir / "bad.jsonl").write_text('{"prompt": "12"}\n')
    with pytest.raises(SystemExit) as end:
        common.cli(dno.main, Args, dno.RECIPES, dno.__doc__, ["--limit", "40", "--n_eval", "8", *flags])
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.count("\n") == 1 and words in said
    assert [path.name for path in (workdir / "runs").iterdir() if not path.name.startswith("tiny-")] == []


def test_margins_that_nothing_passes_are_named(workdir):
    with pytest.raises(
        common.InputError, match=r"iteration 1: no pair; of all that there are \d+ below --min_win_rate"
    ):
        dno.main(Args(name="x", win_rate_margin=1.0, min_win_rate=1.0, **FEW))


def test_recipes_name_arguments_that_exist():
    assert set(dno.RECIPES) - {"tiny", "other"} <= set(common.MODELS)
    for recipe in dno.RECIPES.values():
        common.check_args(Args(**recipe))


def test_scored_responses_need_neither_judge_nor_teacher(workdir):
    once = {**FEW, "iterations": 1}
    dno.main(Args(name="x", **once))
    rows = lines(workdir / "runs" / "x" / "iter_1" / "responses.jsonl")
    for row in rows:
        row["responses"] = [{**y, "score": float(i)} for i, y in enumerate(row["responses"])]
    common.write_jsonl("scored.jsonl", rows)
    with pytest.raises(common.InputError, match="they have scores, which a teacher's has not; give --gold ''"):
        dno.main(Args(name="y", responses="scored.jsonl", **once))
    dno.main(Args(name="y", responses="scored.jsonl", gold="", **once))
    for pair in lines(workdir / "runs" / "y" / "iter_1" / "pairs.jsonl"):
        chosen, rejected = pair["responses"]
        assert chosen["score"] > rejected["score"] and pair["kind"] == "student_student"
