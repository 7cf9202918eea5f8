"""What tests share, and training written out in float64, one response at a time: what the scripts' is compared with."""

import json

import pytest
import torch
import transformers

import common


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def cli(script, *flags):
    """The command `python SCRIPT.py FLAGS`, in this process."""
    common.cli(script.main, script.Args, script.RECIPES, script.__doc__, list(flags))


def stopped(capsys, call, *args, **more):
    """The one line of an error for the user: of a command, which exits with code 2, or of a part, which raises it."""
    with pytest.raises((SystemExit, common.UserError)) as end:
        call(*args, **more)
    if isinstance(end.value, common.UserError):
        return " ".join(str(end.value).split())
    err = capsys.readouterr().err
    assert end.value.code == 2 and err.count("\n") == 1 and "Traceback" not in err, err
    return err


def best_of(table):
    """The best iterate's number, None if none wins more than half against the base model."""
    wins = {row["iterate"]: row.get("wins_vs_start", 1) for row in table[1:]}
    best = max(wins, key=wins.get)
    return best if wins[best] > 0.5 else None


def last_line(table, run="runs/x"):
    """What a run prints at its end."""
    return f"Its policy: {run}/final" if best_of(table) else "no iterate beats the base model"


def turns(*texts, system=None):
    """Messages of user and assistant in turn, behind a system turn."""
    first = [{"role": "system", "content": system}] if system else []
    return first + [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]


def run(script, name="x", **settings):
    """script.main with these flags: (folder, its metrics)."""
    table = script.main(script.Args(name=name, **settings))
    return common.Path("runs") / name, table


def logp(policy, prompt_ids, ids):
    """log pi(y|x): the logits of one whole row, log-softmax, a sum over the response's tokens."""
    logits = policy(torch.tensor([prompt_ids + ids])).logits[0, len(prompt_ids) - 1 : -1]
    return torch.log_softmax(logits, -1)[torch.arange(len(ids)), torch.tensor(ids)].sum()


def log_pi(policy, pair, name="prompt_ids"):
    return torch.stack([logp(policy, pair[name], y["ids"]) for y in pair["responses"]])


# All pairs in one batch, two epochs: two steps, whose second sees log-ratios that are not 0.
TWO = {"limit": 24, "n_eval": 4, "iterations": 1, "epochs": 2, "batch_size": 1000}
TWO |= {"warmup_steps": 0.0, "max_grad_norm": 1e5, "learning_rate": 1e-4}


def check_two_steps(folder, start, value):
    """The losses, gradients and policy of a run with TWO are those of RMSprop over all its pairs: its pairs, its steps.

    value(policy, pair) -> the loss of a pair. RMSprop as in its definition: v = 0.99 v + 0.01 g^2, p -= lr g / sqrt(v).
    """
    pairs, steps = lines(folder / "iter_1/pairs.jsonl"), lines(folder / "iter_1/steps.jsonl")
    policy = transformers.AutoModelForCausalLM.from_pretrained(start).double().eval()
    params, lr = list(policy.parameters()), TWO["learning_rate"]
    moments = [torch.zeros_like(p) for p in params]
    for step, rate in zip(steps, (lr, lr / 2), strict=True):
        loss = sum(value(policy, pair) for pair in pairs) / len(pairs)
        grads = torch.autograd.grad(loss, params)
        norm = torch.sqrt(sum((g**2).sum() for g in grads))
        assert (step["loss"], step["grad_norm"]) == pytest.approx((loss.item(), norm.item()), rel=2e-3)
        assert step["learning_rate"] == pytest.approx(rate)
        with torch.no_grad():
            for p, g, v in zip(params, grads, moments, strict=True):
                v.mul_(0.99).add_(0.01 * g**2)
                p -= rate * g / (v.sqrt() + 1e-8)
    saved = transformers.AutoModelForCausalLM.from_pretrained(folder / "iter_1/policy")
    for p, q in zip(saved.parameters(), params, strict=True):
        assert (p.double() - q).norm() < 1e-3 * q.norm()
    return pairs, steps
