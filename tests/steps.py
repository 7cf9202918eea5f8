"""What tests share, and training written out in float64, one response at a time: what the scripts' is compared with."""

import json

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


def two_steps(folder, pairs, value, lr):
    """Two steps of RMSprop over all pairs, the rate falling from lr to lr / 2: [(loss, gradient norm)], policy.

    value(policy, pair) -> the loss of a pair. RMSprop as in its definition: v = 0.99 v + 0.01 g^2, p -= lr g / sqrt(v).
    """
    policy = transformers.AutoModelForCausalLM.from_pretrained(folder).double().eval()
    params = list(policy.parameters())
    moments, found = [torch.zeros_like(p) for p in params], []
    for rate in (lr, lr / 2):
        loss = sum(value(policy, pair) for pair in pairs) / len(pairs)
        grads = torch.autograd.grad(loss, params)
        found.append((loss.item(), torch.sqrt(sum((g**2).sum() for g in grads)).item()))
        with torch.no_grad():
            for p, g, v in zip(params, grads, moments, strict=True):
                v.mul_(0.99).add_(0.01 * g**2)
                p -= rate * g / (v.sqrt() + 1e-8)
    return found, policy


def distance(folder, policy):
    """How far a saved policy is from `policy`, relative to how far that is from 0: the largest over the parameters."""
    saved = transformers.AutoModelForCausalLM.from_pretrained(folder)
    pairs = zip(saved.parameters(), policy.parameters(), strict=True)
    return max(((p.double() - q).norm() / q.norm()).item() for p, q in pairs)


# All pairs in one batch, two epochs: two steps, whose second sees log-ratios that are not 0.
TWO = {"limit": 24, "n_eval": 4, "iterations": 1, "epochs": 2, "batch_size": 1000}
TWO |= {"warmup_ratio": 0.0, "max_grad_norm": 1e5, "learning_rate": 1e-4}
