import json
import math
from types import SimpleNamespace

import pytest
import torch
from transformers import PreTrainedTokenizerFast

import common
import sr_dpo
from common import correlations
from sr_dpo import Args, refine, refinement, sr_dpo_loss, sr_ipo_loss

pytestmark = pytest.mark.usefixtures("one_thread")

FEW = {"limit": 64, "n_eval": 16, "epochs": 1, "batch_size": 16}


def numbers(n=7, count=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, dtype=torch.float64, generator=generator) * 5 - 20 for _ in range(count)]


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# Losses --------------------------------------------------------------------------------------------------------------


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


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
    # behind p + x: chosen -2 - (-3) = 1, rejected -7 - (-4) = -3
    assert refinement(tensor(-2), tensor(-7), tensor(-3), tensor(-4), 0.1).item() == pytest.approx(0.4)


def test_lam_0_is_dpo_and_ipo_to_the_bit():
    c, r, ref_c, ref_r = numbers()
    delta, beta = numbers(count=1, seed=1)[0], 0.3
    margin = (c - ref_c) - (r - ref_r)
    assert torch.equal(
        sr_dpo_loss(c, r, ref_c, ref_r, delta, beta, 0.0), -torch.nn.functional.logsigmoid(beta * margin)
    )
    assert torch.equal(sr_ipo_loss(c, r, ref_c, ref_r, delta, beta, 0.0), (margin - 1 / (2 * beta)) ** 2)


def test_gradients():
    terms = [x.requires_grad_() for x in numbers()]
    delta = numbers(count=1, seed=1)[0]
    for loss in (sr_dpo_loss, sr_ipo_loss):
        assert torch.autograd.gradcheck(lambda *x, loss=loss: loss(*x, delta, 0.1, 0.5), terms)


@pytest.mark.parametrize("loss", [sr_dpo_loss, sr_ipo_loss])
def test_no_gradient_goes_through_delta(loss):
    """Delta that depends on the policy has the gradient of a Delta that does not; and that of the formula."""
    c, r, ref_c, ref_r = numbers()
    beta, lam = 0.2, 0.7
    gradients = []
    for live in (True, False):
        x = c.clone().requires_grad_()
        delta = refinement(2 * x if live else 2 * c, r, ref_c, ref_r, beta)
        assert not delta.requires_grad
        loss(x, r, ref_c, ref_r, delta, beta, lam).sum().backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)
    x = c.clone().requires_grad_()
    loss(x, r, ref_c, ref_r, 2 * x, beta, lam).sum().backward()  # one that forgot to detach
    margin = (c - ref_c) - (r - ref_r)
    by_hand = {
        sr_dpo_loss: -beta * torch.sigmoid(-(beta * margin - lam * 2 * c)),
        sr_ipo_loss: 2 * (margin - lam * 2 * c - 1 / (2 * beta)),
    }
    torch.testing.assert_close(x.grad, by_hand[loss])


def test_the_naive_refinement_only_rescales_beta():
    """Eq. 10: Delta without p is beta times the margin, and Sr-DPO is DPO at (1 - lam) beta."""
    c, r, ref_c, ref_r = numbers()
    beta, lam = 0.3, 0.4
    zero = torch.zeros_like(c)
    naive = refinement(c, r, ref_c, ref_r, beta)
    torch.testing.assert_close(
        sr_dpo_loss(c, r, ref_c, ref_r, naive, beta, lam), sr_dpo_loss(c, r, ref_c, ref_r, zero, (1 - lam) * beta, 0.0)
    )
    gradients = []
    for delta, b, weight in ((naive, beta, lam), (zero, (1 - lam) * beta, 0.0)):
        x = c.clone().requires_grad_()
        sr_dpo_loss(x, r, ref_c, ref_r, delta, b, weight).sum().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(gradients[0] * (1 - lam), gradients[1])  # the same, but for a factor


def test_the_refinement_is_antisymmetric_additive_and_shifts_the_loss():
    a, b, c, ref_a, ref_b, ref_c = numbers(count=6)
    ab, ba = refinement(a, b, ref_a, ref_b, 0.1), refinement(b, a, ref_b, ref_a, 0.1)
    torch.testing.assert_close(ab, -ba)
    torch.testing.assert_close(ab + refinement(b, c, ref_b, ref_c, 0.1), refinement(a, c, ref_a, ref_c, 0.1))
    assert refinement(a, a, ref_a, ref_a, 0.1).abs().max() == 0
    small, large = (sr_dpo_loss(a, b, ref_a, ref_b, delta, 0.1, 1.0) for delta in (ab, ab + 1))
    assert (large > small).all()  # a pair that lies farther apart behind p has to do so in front as well


def test_losses_reject_nonsense():
    one, two = torch.ones(1), torch.ones(2)
    for loss in (sr_dpo_loss, sr_ipo_loss):
        for beta, lam in ((0, 1), (-1, 1), (0.1, -0.1)):
            with pytest.raises(ValueError, match="beta must be positive and lam not negative"):
                loss(one, one, one, one, one, beta, lam)
        with pytest.raises(ValueError, match="shapes differ"):
            loss(one, one, one, one, two, 0.1, 0.1)


# Correlations --------------------------------------------------------------------------------------------------------


def test_correlations_against_loops():
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 6, (40,), generator=generator).double()  # ties
    y = x + 3 * torch.rand(40, generator=generator).round()

    def pearson(a, b):
        a, b = a - sum(a) / len(a), b - sum(b) / len(b)
        return float(sum(a * b) / math.sqrt(sum(a * a) * sum(b * b)))

    def ranks(v):
        v = v.tolist()
        return tensor(*[sum(w < u for w in v) + (sum(w == u for w in v) + 1) / 2 for u in v])

    agree = tied_x = tied_y = disagree = 0
    for i in range(40):
        for j in range(i):
            a, b = (x[i] - x[j]).item(), (y[i] - y[j]).item()
            agree, disagree = agree + (a * b > 0), disagree + (a * b < 0)
            tied_x, tied_y = tied_x + (a == 0), tied_y + (b == 0)
    pairs = 40 * 39 / 2
    tau_b = (agree - disagree) / math.sqrt((pairs - tied_x) * (pairs - tied_y))
    found = correlations(x, y)
    assert found["pearson"] == pytest.approx(pearson(x, y))
    assert found["spearman"] == pytest.approx(pearson(ranks(x), ranks(y)))
    assert found["kendall"] == pytest.approx(tau_b)


def test_correlations_of_a_monotone_curve():
    x = torch.linspace(-2, 2, 30)
    found = correlations(x, x**5)
    assert found["spearman"] == pytest.approx(1) and found["kendall"] == pytest.approx(1) and found["pearson"] < 0.9


# p + x ---------------------------------------------------------------------------------------------------------------

TEMPLATES = {
    "chatml": "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "mistral": "<s>{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% elif m['role'] == 'assistant' %} {{ m['content'] }}</s>{% else %}{{ raise_exception('no system') }}{% endif %}"
    "{% endfor %}",
    "llama-3": "<s>{% for m in messages %}<|start|>{{ m['role'] }}<|end|>\n\n{{ m['content'] | trim }}<|eot|>"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant<|end|>\n\n{% endif %}",
    "gemma": "<s>{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "<turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n{{ m['content'] | trim }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<turn>model\n{% endif %}",
    "zephyr": "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
    "none": None,
}


@pytest.mark.parametrize("family", TEMPLATES)
@pytest.mark.parametrize("system", [False, True])
def test_p_stands_in_front_of_the_last_query(family, system):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=common.tiny_tokenizer()._tokenizer, eos_token="</s>")
    tokenizer.chat_template = TEMPLATES[family]
    turns = [("user", "First?"), ("assistant", "Yes."), ("user", "Second?")]
    prompt = [{"role": r, "content": c} for r, c in ([("system", "Be brief.")] if system else []) + turns]
    plain, refined = common.render(tokenizer, prompt), common.render(tokenizer, refine(prompt, "Best: "))
    assert refined == plain.replace("Second?", "Best: Second?") and refined != plain
    assert prompt[-1]["content"] == "Second?"  # the prompt itself stays


def test_p_in_front_of_a_prompt_of_one_turn():
    assert refine([{"role": "user", "content": "x"}], "p ") == [{"role": "user", "content": "p x"}]


def test_p_is_text_even_where_it_spells_a_control_token(workdir):
    _, tokenizer = common.load_policy("tiny-p")
    row = common.encode_prompts(tokenizer, [refine([{"role": "user", "content": "12"}], "</s>")], 64)[0]
    assert tokenizer.eos_token_id not in row["prompt_ids"]


# Pairs ---------------------------------------------------------------------------------------------------------------


def test_digit_pairs_are_wrong_by_known_amounts():
    for pair in common.digit_pairs(300, 1):
        right = sorted(pair["prompt"][0]["content"])
        wrong = [sum(a != b for a, b in zip(pair[name], right, strict=True)) for name in ("chosen", "rejected")]
        assert 1 <= wrong[0] < wrong[1] <= len(right)
        assert pair["gap"] == pytest.approx((wrong[1] - wrong[0]) / len(right))


def test_scores_become_a_gap():
    row = {"prompt": "a", "chosen": "b", "rejected": "c", "score_chosen": 8.5, "score_rejected": 6}
    assert common.read_pair(row)["gap"] == 2.5
    assert "gap" not in common.read_pair({**row, "score_chosen": None})
    assert "gap" not in common.read_pair({**row, "score_chosen": float("nan")})


def rows_of(pairs, **settings):
    policy, tokenizer = common.load_policy("tiny-p")
    return sr_dpo.make_pairs(policy, tokenizer, pairs, Args(**settings)), tokenizer


def pair_of(prompt, chosen, rejected):
    return {"prompt": [{"role": "user", "content": prompt}], "chosen": chosen, "rejected": rejected}


def test_responses_end_with_the_turn_and_truncation_leaves_their_start(workdir):
    rows, tokenizer = rows_of([pair_of("12", "12", "1" * 40)], max_new_tokens=8)
    chosen, rejected = rows[0]["responses"]
    assert tokenizer.decode(chosen["ids"]) == "12</s>" and chosen["finished"]
    assert tokenizer.decode(rejected["ids"]) == "1" * 8 and not rejected["finished"]
    assert (
        tokenizer.decode(rows[0]["prompt_ids"]) == "<s>12="
        and tokenizer.decode(rows[0]["refined_ids"]) == "<s>100/100: 12="
    )


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
    assert "--pairs: 1 of 4 left out: over --max_prompt_tokens 64" in out
    assert "--pairs with --refine_prompt: 1 of 3 left out: over --max_prompt_tokens 64" in out
    assert "--pairs: 2 of 4 responses cut by --max_new_tokens 16" in out
    assert "--pairs: 1 of 2 left out: equal within --max_new_tokens" in out


def test_pairs_of_one_prompt_stay_on_one_side(workdir, capsys):
    pairs = [pair_of(f"{i}", f"{j}", "9999") for i in range(100, 140) for j in range(3)]
    rows, _ = rows_of(pairs)
    parts, held_out = common.split_pairs(rows, Args(n_eval=8), [])
    texts = [{common.prompt_key(row["prompt"]) for row in part} for part in (parts[0], held_out)]
    assert len(held_out) == 8 and len(parts[0]) == 3 * 32 and not texts[0] & texts[1]
    assert "--pairs: 16 left out: further pairs of held-out prompts" in capsys.readouterr().out


# Train ---------------------------------------------------------------------------------------------------------------


def references(policy, rows, args):
    for name, prompt_ids in sr_dpo.REFERENCES:
        common.attach_ref_logps(policy, rows, args, name, prompt_ids)


def batch_of(n=12, **settings):
    policy, tokenizer = common.load_policy("tiny-p")
    args = Args(**settings)
    rows = sr_dpo.make_pairs(policy, tokenizer, common.digit_pairs(n, 3), args)
    references(policy, rows, args)
    with torch.no_grad():  # so that the policy is not the reference
        for p in policy.parameters():
            p += 0.01 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    return policy, rows, args


def steps_of(policy, rows, args):
    nothing = SimpleNamespace(step=lambda: None, zero_grad=lambda: None)
    figures = sr_dpo.train_step(policy, nothing, nothing, rows, args)
    return figures, torch.cat([p.grad.flatten() for p in policy.parameters()])


@pytest.mark.parametrize("loss", ["sr_dpo", "sr_ipo"])
@pytest.mark.parametrize("lam", [0.0, 0.5])
def test_a_step_is_that_of_the_equations(workdir, loss, lam):
    """Against one pair at a time, written from eq. 12, 13 and 15; micro-batches and shared prompts change nothing."""
    policy, rows, args = batch_of(loss=loss, lam=lam, max_grad_norm=1e6)
    figures, gradient = steps_of(policy, rows, args)
    policy.zero_grad()
    beta, total, deltas = args.beta if loss == "sr_dpo" else args.beta_ipo, 0.0, []

    def logp(ids, y):
        logits = policy(torch.tensor([ids + y])).logits[0, len(ids) - 1 : -1].log_softmax(-1)
        return logits[torch.arange(len(y)), y].sum()

    for row in rows:
        ys = row["responses"]
        h = [logp(row["prompt_ids"], y["ids"]) - y["ref_logps"] for y in ys]
        with torch.no_grad():
            h_p = [logp(row["refined_ids"], y["ids"]) - y["ref_logps_p"] for y in ys]
        delta = beta * (h_p[0] - h_p[1]) if lam else torch.tensor(0.0)
        deltas.append(delta.item())
        if loss == "sr_dpo":
            value = -torch.nn.functional.logsigmoid(beta * (h[0] - h[1]) - lam * delta)
        else:
            value = (h[0] - h[1] - lam * delta - 1 / (2 * beta)) ** 2
        (value / len(rows)).backward()
        total += value.item() / len(rows)
    right = torch.cat([p.grad.flatten() for p in policy.parameters()])
    assert figures["loss"] == pytest.approx(total, rel=1e-4)
    assert figures["delta"] == pytest.approx(sum(deltas) / len(rows), rel=1e-3, abs=1e-5)
    torch.testing.assert_close(gradient, right, rtol=1e-3, atol=1e-4 * right.abs().max().item())
    for shares in (False, True):
        policy.zero_grad()
        policy._shares_prompts = shares
        small = Args(**{**vars(args), "micro_tokens": 60})
        torch.testing.assert_close(
            steps_of(policy, rows, small)[1], gradient, rtol=1e-3, atol=1e-4 * gradient.abs().max().item()
        )


def test_the_first_step_is_at_the_reference(workdir):
    policy, tokenizer = common.load_policy("tiny-p")
    args = Args()
    rows = sr_dpo.make_pairs(policy, tokenizer, common.digit_pairs(12, 3), args)
    references(policy, rows, args)
    figures, _ = steps_of(policy, rows, args)
    assert figures["loss"] == pytest.approx(math.log(2), abs=1e-4)
    for name in ("chosen_log_ratio", "rejected_log_ratio", "delta"):
        assert figures[name] == pytest.approx(0, abs=1e-4)


# Runs ----------------------------------------------------------------------------------------------------------------


def test_the_reference_is_scored_once_and_is_the_start(workdir, monkeypatch):
    scored = []
    score = common.score
    for module in (common, sr_dpo):
        monkeypatch.setattr(module, "score", lambda *a: scored.append(a[-1]) or score(*a))
    sr_dpo.main(Args(name="x", **{**FEW, "epochs": 3}))
    assert scored[:4] == ["reference"] * 4  # held-out and training pairs, x and p + x
    assert scored[4:] == ["KL"] * 2 + ["measuring"] * 2
    pairs = lines(workdir / "runs" / "x" / "iter_1" / "pairs.jsonl")
    policy, _ = common.load_policy("tiny-p")
    for name, ids in (("ref_logps", "prompt_ids"), ("ref_logps_p", "refined_ids")):
        ys = [(pair[ids], y) for pair in pairs for y in pair["responses"]]
        with torch.no_grad():
            right = common.response_logps(policy, [x for x, _ in ys], [y["ids"] for _, y in ys])
        torch.testing.assert_close(torch.tensor([y[name] for _, y in ys]), right, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "settings",
    [
        {"lam": 0.0},
        {"loss": "sr_ipo"},
        {"judge": ""},
        {"refine_prompt": "Best: "},
        {"online": True, "iterations": 2, "k": 2},
        {"best_of": 2, "eval_prompts": "mine.jsonl"},
        {"checkpointing": "on"},
    ],
)
def test_every_option_runs(workdir, settings):
    common.write_jsonl("mine.jsonl", [{"prompt": "98"}])
    table = sr_dpo.main(Args(name="x", **{**FEW, **settings}))
    run = workdir / "runs" / "x"
    assert len(table) == 1 + settings.get("iterations", 1) and lines(run / "metrics.jsonl") == table
    assert 0 <= table[-1]["accuracy"] <= 1 and 0 <= table[-1]["accuracy_p"] <= 1
    assert ("win_rate_vs_start" in table[-1]) == (settings.get("judge") != "")
    assert json.loads((run / "outputs.json").read_text())
    common.load_policy(str(run / "final"))
    if "loss" not in settings and settings.get("lam", 1):
        assert all(step["delta"] for step in lines(run / "iter_1" / "steps.jsonl")[1:])


def test_online_pairs_are_the_judges_best_and_worst_of_the_policys_own(workdir):
    sr_dpo.main(Args(name="x", online=True, k=4, **FEW))
    pairs = lines(workdir / "runs" / "x" / "iter_1" / "pairs.jsonl")
    judge = common.DigitsJudge()
    for pair in pairs:
        best, worst = judge.quality([pair["prompt"]], [[y["text"] for y in pair["responses"]]])[0].tolist()
        assert best > worst and all(y["ids"][-1] == 1 or not y["finished"] for y in pair["responses"])


def test_the_default_job_in_small_learns(workdir, capsys):
    table = sr_dpo.main(Args(name="x", limit=640, n_eval=128))
    assert table[1]["accuracy"] > 0.8 and table[1]["exact_match"] > table[0]["exact_match"] + 0.1
    assert table[1]["pearson"] > 0.3 and table[1]["marginal"] > 0
    out = capsys.readouterr().out
    assert "iterate  loss" in out and "lies in runs/x/final" in out


def test_an_iteration_without_pairs_ends_the_run_well(workdir, monkeypatch, capsys):
    draw = sr_dpo.online_pairs
    monkeypatch.setattr(sr_dpo, "online_pairs", lambda *x: draw(*x) if x[3] == 1 else [])  # x[3]: the iteration
    table = sr_dpo.main(Args(name="x", online=True, **{**FEW, "iterations": 3}))
    assert len(table) == 2 and (workdir / "runs/x/final/config.json").exists()
    assert "no response is preferred to another in iteration 2" in capsys.readouterr().out
    monkeypatch.setattr(sr_dpo, "online_pairs", lambda *x: [])
    with pytest.raises(common.InputError, match="in iteration 1; try a higher --k"):
        sr_dpo.main(Args(name="y", online=True, **FEW))


def test_compare_prints_the_four_methods(workdir, capsys):
    tables = sr_dpo.main(Args(name="x", compare=2, **FEW))
    assert set(tables) == {"DPO", "Sr-DPO", "IPO", "Sr-IPO"} and {len(rows) for rows in tables.values()} == {2}
    out = capsys.readouterr().out
    table = out[out.index("   DPO") :]
    marginal = next(line for line in table.splitlines() if line.startswith("marginal"))
    both = [row["marginal"] for row in tables["DPO"]]
    assert common.number(sum(both) / 2) in marginal and marginal.count("±") == 4
    config = json.loads((workdir / "runs" / "x-ipo-s2" / "config.json").read_text())
    assert (config["loss"], config["lam"], config["seed"]) == ("sr_ipo", 0.0, 2)


def test_pairs_without_scores_have_no_correlations_in_any_column(workdir, capsys):
    rows = [
        {"prompt": f"{i}", "chosen": "12", "rejected": "21", "score_chosen": i, "score_rejected": 0} for i in range(40)
    ]
    del rows[7]["score_chosen"]
    common.write_jsonl("mine.jsonl", rows)
    tables = sr_dpo.main(Args(name="x", pairs="mine.jsonl", compare=2, n_eval=10, epochs=1))  # one seed holds row 7 out
    assert len(tables["DPO"]) == 2
    assert "marginal" in capsys.readouterr().out
    common.write_jsonl("same.jsonl", [{**row, "score_chosen": 1} for row in rows])  # all gaps are alike
    table = sr_dpo.main(Args(name="y", pairs="same.jsonl", n_eval=10, epochs=1))
    assert "pearson" not in table[-1] and "NaN" not in (workdir / "runs" / "y" / "metrics.jsonl").read_text()


def test_a_comparison_asks_for_all_its_folders_first(workdir):
    (workdir / "runs" / "x-sr-ipo-s1").mkdir()
    with pytest.raises(common.InputError, match="x-sr-ipo-s1 is taken"):
        sr_dpo.main(Args(name="x", compare=1, **FEW))
    assert not (workdir / "runs" / "x-dpo-s1").exists()


def test_hh_rlhf_shapes_run_without_a_judge(workdir):
    turns = "\n\nHuman: {}\n\nAssistant: yes\n\nHuman: {}\n\nAssistant:"
    rows = [{"chosen": turns.format(i, i) + " good", "rejected": turns.format(i, i) + f" bad {i}"} for i in range(12)]
    common.write_jsonl("hh.jsonl", rows)
    sr_dpo.main(Args(name="x", pairs="hh.jsonl", judge="", n_eval=3, epochs=1))
    pair = lines(workdir / "runs" / "x" / "iter_1" / "pairs.jsonl")[0]
    assert [m["role"] for m in pair["prompt"]] == ["user", "assistant", "user"]
    assert [y["text"].split()[0] for y in pair["responses"]] == ["good", "bad"]


@pytest.mark.parametrize(
    ("rows", "flags", "words"),
    [
        ([], ["--lam", "-1"], "--lam -1.0: must be between 0 and a million"),
        ([], ["--beta", "0"], "--beta 0.0: must be between"),
        ([], ["--beta_ipo", "nan"], "--beta_ipo nan: must be between"),
        ([], ["--loss", "kto"], "invalid choice: 'kto'"),
        ([], ["--iterations", "2"], "--iterations: there is one, unless --online"),
        ([], ["--online", "--judge", ""], "--online, --best_of: they take a --judge"),
        ([], ["--compare", "1", "--lam", "0"], "--compare: wants a --lam above 0"),
        ([], ["--refine_prompt", " "], "--refine_prompt: give a name of REFINE_PROMPTS, or a text"),
        ([], ["--refine_prompt", "a\udcff"], "--refine_prompt: give a name of REFINE_PROMPTS, or a text"),
        ([], ["--pairs", "nothing.jsonl"], "--pairs nothing.jsonl"),
        ([{"prompt": "1", "chosen": "2", "rejected": "2"}], [], "no row of use (1 with two equal responses)"),
        ([{"prompt": "1", "chosen": "2", "rejected": " "}], [], "no row of use (1 with an empty response)"),
        ([{"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: c\n\nAssistant: d"}], [], "common prompt"),
        ([{"prompt": "1"}], [], "no pair; keys found: prompt"),
        ([{"prompt": "1" * 99, "chosen": "2", "rejected": "3"}], [], "none is left: over --max_prompt_tokens 64"),
        ([{"prompt": "1" * 60, "chosen": "2", "rejected": "3"}], [], "--pairs with --refine_prompt: none is left"),
        ([{"prompt": "1", "chosen": "2" * 30, "rejected": "2" * 31}], [], "none is left; see --max_new_tokens"),
        ([{"prompt": "1", "chosen": "2", "rejected": "3"}], [], "too few for 1 iterations and a held-out part"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(workdir, capsys, rows, flags, words):
    if rows:
        common.write_jsonl("mine.jsonl", rows)
        flags = ["--pairs", "mine.jsonl", *flags]
    with pytest.raises(SystemExit) as stopped:
        common.cli(sr_dpo.main, Args, sr_dpo.RECIPES, sr_dpo.__doc__, ["--name", "x", *flags])
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and err.count("\n") == 1 and words in err, err
    assert not (workdir / "runs" / "x").exists()


def test_dry_run_prints_memory_and_hours(workdir, capsys):
    assert sr_dpo.main(Args(dry_run=True, **FEW)) == []
    out = capsys.readouterr().out
    assert "training" in out and "hours" in out and "judging" in out
    assert not list(workdir.glob("runs/sr_dpo*"))


def test_recipes_name_arguments_that_exist():
    for model, recipe in sr_dpo.RECIPES.items():
        assert set(recipe) <= set(vars(Args())) and (model in common.MODELS or model == "other")
    assert sr_dpo.RECIPES["pythia-2.8b"]["pairs"].startswith("Anthropic/hh-rlhf")
