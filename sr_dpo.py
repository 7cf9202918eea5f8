"""Sr-DPO and Sr-IPO, self-refined DPO and IPO: the policy, prompted with p, estimates the quality gap of each pair.

Yu et al. 2024, arXiv 2405.21040. DPO and IPO learn from offline pairs (x, y+, y-) and a fixed reference; they treat all
pairs alike. Here lam * Delta is subtracted from a pair's margin (from beta times it, in Sr-DPO), so that a pair with
Delta > 0 has to move farther. Delta (eq. 12) is beta times the margin over the reference that the policy gives the pair
when the query x is prefixed with p, an instruction to answer as well as possible. Sr-DPO is eq. 13 and Algorithm 1,
Sr-IPO eq. 15 and Algorithm 2; lam = 0 is DPO and IPO exactly. At lam of 1 and more, targets may run away from the
policy.

    python sr_dpo.py                     the built-in task, a minute on one CPU core: 0.11 -> 0.64 right
    python sr_dpo.py --lam 0             DPO on the same pairs; --loss sr_ipo --lam 0 is IPO
    python sr_dpo.py --model DIR --pairs FILE.jsonl    your model and data

Where this file departs from the paper, or fills what it leaves open:
 1. p goes in front of the query inside the last user turn, so that chat templates stay whole. Its wording is ours:
    REFINE_PROMPTS; --refine_prompt takes any of them or your own.
 2. Log-probs are sums over tokens, EOS included, as the formulas say. TRL's IPO takes the mean over tokens instead.
 3. A response over --max_new_tokens is truncated and has no EOS; which response is chosen stays as in the data.
 4. On CUDA weights are bf16 with an exact float32 master; gradients are bf16, and so is RMSprop's moment, rounded
    stochastically.
"""

import random
import time
from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn.functional import logsigmoid
from torch.nn.utils import clip_grad_norm_

from common import (
    Checkpoint,
    Refused,
    add_logps,
    cli,
    digit_prompts,
    encode_rows,
    estimate_hours,
    evaluate,
    finish_iterate,
    finish_run,
    flag,
    load_judge,
    load_policy,
    load_rows,
    make_optimizer,
    micro_batches,
    pair_logps,
    progress,
    read_answer,
    read_prompt,
    require,
    split_rows,
    start_run,
)

REFINE_PROMPTS = {  # p by name; --refine_prompt also takes your own text
    "usefulness": "Answer the query below so that its usefulness, on a scale from 1 to 100, would be rated 100, and so "
    "that the answer does no harm.\n\nQuery: ",
    "expert": "Answer the query below as an expert would: correctly, completely and to the point.\n\nQuery: ",
    "short": "The best possible answer, 100 of 100, to this query: ",
    "tiny": "100/100: ",  # what `tiny` knows
}


@dataclass
class Args:
    """The defaults are those of the built-in digits task; RECIPES below has the paper's, and ours for small models."""

    # model and data
    model: str = flag("tiny", "Policy to train: a short name from the list above, a folder, or a hub id.")
    recipe: str = flag("auto", "Defaults of the other flags, in RECIPES; auto: the number of parameters decides.")
    pairs: str = flag("digits", "'digits' (built in), a file, or a folder or hub dataset ID[:split].")
    limit: int = flag(2304, "Use only the first N pairs; 0 means all (5,632 for digits).")
    max_prompt_tokens: int = flag(64, "Pairs whose p + prompt is longer are skipped and counted.", low=1)
    # judge and evaluation
    judge: str = flag("digits", "As in sppo.py; '' for none.")
    judge_url: str = flag("", "--judge llm: an OpenAI-compatible server, e.g. http://localhost:8000/v1.", free=True)
    judge_model: str = flag("", "--judge llm: the model's name there; the key is OPENAI_API_KEY.")
    eval_judge: str = flag("", "Another judge; its win rates are printed, but nothing is trained on them.")
    n_eval: int = flag(512, "Held-out pairs for evaluation, at most a quarter of all.", low=2)
    # algorithm
    loss: Literal["sr_dpo", "sr_ipo"] = flag("sr_dpo", "Eq. 13, or eq. 15.")
    beta: float = flag(1.0, "Regularisation of --loss sr_dpo: the higher, the closer to the reference.", low=1e-6)
    beta_ipo: float = flag(0.05, "The same of --loss sr_ipo, which aims at a margin of 1 / (2 beta_ipo).", low=1e-6)
    lam: float = flag(0.3, "Weight of the refinement; 0: DPO or IPO, on the same pairs.")
    refine_prompt: str = flag("tiny", "p: usefulness, expert, short, tiny, or your own text; '' for no p (table 4).")
    # sampling
    temperature: float = flag(1.0, "Sampling temperature, for training and evaluation.", low=0.01, high=100)
    top_p: float = flag(1.0, "Nucleus sampling threshold, for training and evaluation.", low=1e-6, high=1)
    max_new_tokens: int = flag(16, "A response is truncated at this length.", low=1)
    # optimiser
    learning_rate: float = flag(5e-5, "Peak learning rate of RMSprop.", low=1e-12, high=1)
    warmup_steps: float = flag(0.1, "Linear warmup, in steps or, below 1, as a share of the schedule; then decay to 0.")
    epochs: int = flag(3, "Passes over the pairs.", low=1)
    batch_size: int = flag(64, "Pairs per optimiser step; the last of an epoch may have fewer.", low=1)
    max_grad_norm: float = flag(1.0, "Gradients are clipped to this norm.", low=1e-6)
    # memory and run
    slots: int = flag(256, "Most responses decoded at once; fewer if memory is short.", low=1, free=True)
    micro_tokens: int = flag(16384, "Padded tokens per micro-batch; lower it to save memory.", low=1, free=True)
    checkpointing: bool = flag(False, "Recompute layers in backward: slower, less memory.", free=True)
    checkpoint_minutes: float = flag(30.0, "Minutes between checkpoints during training.", free=True)
    name: str = flag("", "Name of the folder runs/NAME. Default: script, model, seed and time.")
    resume: str = flag("", "Resume the run in this folder, with its flags.", free=True)
    dry_run: bool = flag(False, "Load all, print memory, disk, steps and hours to expect, then exit.", free=True)
    track: Literal["", "wandb", "trackio"] = flag("", "Log metrics there.", free=True)
    seed: int = flag(1, "Seed for splits, sampling and shuffling.")
    device: Literal["cpu", "cuda"] = flag("cuda" if torch.cuda.is_available() else "cpu", "Where to run.", free=True)


PAPER = {  # arXiv 2405.21040; the batch is the default; lam is chosen among 0.1, 0.3, 0.5 and 1 there, epochs are ours
    "judge": "",
    "beta": 0.1,
    "beta_ipo": 0.1,
    "limit": 0,
    "max_prompt_tokens": 512,
    "refine_prompt": "usefulness",
    "max_new_tokens": 512,
    "checkpointing": True,
    "learning_rate": 5e-7,
    "epochs": 1,
}
HH = {**PAPER, "pairs": "Anthropic/hh-rlhf:train"}  # the paper's start is supervised on its chosen answers first
ULTRA = {**PAPER, "pairs": "HuggingFaceH4/ultrafeedback_binarized:train_prefs"}
# Tried at 135 M on few pairs (tests/README.md): a rate of 1e-5 overshoots.
SMALL = {"max_prompt_tokens": 160, "max_new_tokens": 64, "checkpointing": False, "micro_tokens": 2048}
SMALL = {**ULTRA, **SMALL, "learning_rate": 3e-6, "warmup_steps": 0.2, "batch_size": 8}
RECIPES = {"digits": {}, "small": SMALL, "paper": ULTRA, "pythia-2.8b": HH}


# The maths -----------------------------------------------------------------------------------------------------------


def refinement(chosen_logps_p, rejected_logps_p, ref_chosen_logps_p, ref_rejected_logps_p, beta):
    """Delta, eq. 12 of arXiv 2405.21040: beta times the pair's margin when the policy is prompted with p + x.

    All (B,): log pi(y|p + x) of the policy and of the reference, nats, summed over the response's tokens. Returns (B,),
    without gradient, antisymmetric in the two responses.

    >>> one = torch.ones(1)
    >>> refinement(-2 * one, -5 * one, -3 * one, -4 * one, beta=0.1)  # 0.1 (1 - (-1))
    tensor([0.2000])
    """
    chosen, rejected = chosen_logps_p - ref_chosen_logps_p, rejected_logps_p - ref_rejected_logps_p
    return (beta * (chosen - rejected)).detach()  # eq. 12, under stop-gradient


def _margin(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, delta, beta, lam):
    """h(y+) - h(y-), h = log pi - log pi_ref; checks the arguments of both losses."""
    if beta <= 0 or lam < 0:
        raise ValueError(f"beta must be positive and lam not negative, got {beta} and {lam}")
    shapes = [tuple(x.shape) for x in (chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, delta)]
    if len(set(shapes)) > 1:
        raise ValueError(f"shapes differ: {shapes}")
    return (chosen_logps - ref_chosen_logps) - (rejected_logps - ref_rejected_logps)


def sr_dpo_loss(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, delta, beta, lam):
    """-log sigmoid(beta (h(y+) - h(y-)) - lam Delta), eq. 13 of arXiv 2405.21040; DPO's loss at lam = 0.

    chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps (B,): log pi(y|x) of policy and reference, nats,
    summed over the response's tokens. delta (B,): of `refinement`; no gradient goes through it. beta > 0, lam >= 0.
    Returns (B,), nats; log 2 at the start. Raises ValueError for other beta or lam, or where the shapes differ.

    >>> one = torch.ones(1)
    >>> sr_dpo_loss(-2 * one, -5 * one, -3 * one, -4 * one, one, beta=0.5, lam=1.0)  # 0.5 * 2 - 1 = 0: log 2
    tensor([0.6931])
    """
    margin = _margin(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, delta, beta, lam)
    return -logsigmoid(beta * margin - lam * delta.detach())  # eq. 13


def sr_ipo_loss(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, delta, beta, lam):
    """(h(y+) - h(y-) - lam Delta - 1 / (2 beta))^2, eq. 15 of arXiv 2405.21040; IPO's loss at lam = 0.

    Arguments and errors as of sr_dpo_loss. Returns (B,), nats squared; 1 / (4 beta^2) at the start.

    >>> one = torch.ones(1)
    >>> sr_ipo_loss(-2 * one, -5 * one, -3 * one, -4 * one, one, beta=0.5, lam=2.0)  # (2 - 2 - 1)^2
    tensor([1.])
    """
    margin = _margin(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, delta, beta, lam)
    return (margin - lam * delta.detach() - 1 / (2 * beta)) ** 2  # eq. 15


# Pairs ---------------------------------------------------------------------------------------------------------------


def read_pair(row):
    """{"prompt", "chosen", "rejected"} as messages and texts, and "gap" where both have a score."""
    prompt = read_prompt(row)
    pair = {"prompt": prompt, **{name: read_answer(row[name], prompt) for name in ("chosen", "rejected")}}
    if not pair["chosen"].strip() or not pair["rejected"].strip() or pair["chosen"] == pair["rejected"]:
        raise Refused("with an empty answer, or two equal ones")
    if "score_chosen" in row and "score_rejected" in row:
        pair["gap"] = row["score_chosen"] - row["score_rejected"]
    return pair


def digit_pairs(n, seed):
    """Pairs to digit_prompts whose answers are both partly wrong: 1 to n-1 digits in the chosen, more in the rejected.

    "gap" is the difference between their shares of right digits.
    """
    rng, pairs = random.Random(f"digit pairs {seed}"), []
    for prompt in digit_prompts(n, seed):
        right = sorted(prompt[0]["content"])
        wrong = sorted(rng.sample(range(1, len(right) + 1), 2))
        answers = []
        for count in wrong:
            answer = list(right)
            for i in rng.sample(range(len(right)), count):
                answer[i] = rng.choice([d for d in "0123456789" if d != right[i]])
            answers.append("".join(answer))
        gap = (wrong[1] - wrong[0]) / len(right)
        pairs.append({"prompt": prompt, "chosen": answers[0], "rejected": answers[1], "gap": gap})
    return pairs


def refine(prompt, p):
    """p + x: the messages of `prompt` with the text p in front of the last one, the query."""
    return [*prompt[:-1], {**prompt[-1], "content": p + prompt[-1]["content"]}]


def make_pairs(policy, tokenizer, pairs, args):
    """Rows with "prompt_ids" of x, "refined_ids" of p + x and "responses" [y+, y-], of read_pair's rows.

    A response over --max_new_tokens keeps its start. Pairs that are too long, or equal once truncated, are skipped.
    """
    p = REFINE_PROMPTS.get(args.refine_prompt, args.refine_prompt)
    print(f"p: {p!r}")
    rows = encode_rows(policy, tokenizer, pairs, args, "--pairs", ["chosen", "rejected"])
    rows = encode_rows(policy, tokenizer, rows, args, "--pairs with p", change=lambda prompt: refine(prompt, p))
    for row in rows:
        row["responses"] = [row.pop("chosen"), row.pop("rejected")]
    cut = sum(not y["finished"] for row in rows for y in row["responses"])
    kept = [row for row in rows if row["responses"][0]["ids"] != row["responses"][1]["ids"]]
    if cut:
        print(f"--pairs: {cut} of {2 * len(rows)} responses are truncated at --max_new_tokens {args.max_new_tokens}")
    if len(kept) < len(rows):
        print(f"--pairs: {len(rows) - len(kept)} of {len(rows)} skipped: their truncated responses are equal")
    require(kept, f"--pairs {args.pairs}: none is left; raise --max_new_tokens")
    return kept


def add_both(policy, pairs, name, args):
    """The pairs with the log-probs of their responses given x, as `name`, and given p + x, as `name`_p."""
    pairs = add_logps(policy, pairs, name, args.micro_tokens)
    return add_logps(policy, pairs, f"{name}_p", args.micro_tokens, "refined_ids")


def measure(policy, pairs, args):
    """The paper's measures on held-out pairs, relative to the base model.

    These are the mean margin ("marginal") and the accuracy, both also given p + x ("_p"), and the correlation of the
    margin with "gap", the difference of the responses' scores, where the data has scores.
    """
    import pandas  # takes half a second

    pairs = add_both(policy, pairs, "logps", args)
    table, figures = pandas.DataFrame({"gap": [pair.get("gap") for pair in pairs]}, dtype=float), {}
    for p in ("", "_p"):
        logps, ref_logps = (torch.tensor([pair[name + p] for pair in pairs]) for name in ("logps", "ref_logps"))
        log_ratio = logps - ref_logps  # (B, 2)
        table["margin" + p] = (log_ratio[:, 0] - log_ratio[:, 1]).tolist()
        figures |= {"marginal" + p: table["margin" + p].mean(), "accuracy" + p: (table["margin" + p] > 0).mean()}
    if table["gap"].notna().all() and table["gap"].nunique() > 1:
        figures |= {way: table.corr(way).loc["margin", "gap"] for way in ("pearson", "spearman", "kendall")}
    return {name: float(value) for name, value in figures.items()}


# Main ----------------------------------------------------------------------------------------------------------------


def main(args):
    """Run Sr-DPO or Sr-IPO. Returns the metrics of every iterate, the base model's first; None for a dry run."""
    run, history, log = start_run(args, main)  # runs/NAME; the metrics of each finished iterate; --track's log
    judges = load_judge(args) if args.judge else None, load_judge(args, "eval_judge") if args.eval_judge else None
    newest = run / f"iter_{len(history) - 1}" / "policy" if len(history) > 1 else args.model
    policy, tokenizer = load_policy(newest, args.device, args.checkpointing)
    source, n = args.pairs, args.limit
    pairs = digit_pairs(n or 5632, args.seed) if source == "digits" else load_rows("--pairs", source, read_pair, n)
    (pairs,), held_out = split_rows(make_pairs(policy, tokenizer, pairs, args), args)
    scored = [dict(pair) for pair in held_out]
    if args.dry_run:
        return estimate_hours(policy, judges[0], [pairs], held_out, args)
    if not history:
        finish_iterate(run, history, log, evaluate(policy, tokenizer, judges, held_out, run, 0, args))

    for t in range(len(history), 2):  # one iteration, as the pairs are given; none if --resume finds it done
        folder, seed, began = run / f"iter_{t}", f"{args.seed} iteration {t}", time.time()
        # log pi_ref of x and p + x, before the first update and any checkpoint: the policy is still pi_ref
        both = add_both(policy, pairs + scored, "ref_logps", args)
        pairs, scored = both[: len(pairs)], both[len(pairs) :]

        # Alg. 1 or 2: eq. 13 or 15, with Delta from the policy of each step
        loss_of, beta = (sr_dpo_loss, args.beta) if args.loss == "sr_dpo" else (sr_ipo_loss, args.beta_ipo)
        rng, size = random.Random(seed), args.batch_size
        epochs = [rng.sample(pairs, len(pairs)) for _ in range(args.epochs)]  # shuffled anew in each epoch
        batches = [(n, order[i : i + size]) for n, order in enumerate(epochs, 1) for i in range(0, len(order), size)]
        optimizer, scheduler = make_optimizer(policy, args.learning_rate, args.warmup_steps, len(batches))  # RMSprop
        checkpoint = Checkpoint(folder / "checkpoint.pt", policy, optimizer, scheduler, args.checkpoint_minutes)
        steps = checkpoint.load()  # [], or the steps done before a kill, with policy and optimizer as they were then
        before = history[-1]["step"]  # steps of earlier iterations
        for epoch, batch in progress(batches[len(steps) :], desc="training"):
            losses, log_ratios, deltas = [], [], []
            for micro in micro_batches(policy, batch, args.micro_tokens):  # cut to fit memory
                ref_logps = torch.tensor([pair["ref_logps"] for pair in micro], device=policy.device)  # (pairs, 2)
                ref_logps_p = torch.tensor([pair["ref_logps_p"] for pair in micro], device=policy.device)
                delta = torch.zeros(len(micro), device=policy.device)
                if args.lam:
                    with torch.no_grad():
                        logps_p = pair_logps(policy, micro, "refined_ids")
                    delta = refinement(*logps_p.T, *ref_logps_p.T, beta)  # eq. 12
                logps = pair_logps(policy, micro)
                loss = loss_of(*logps.T, *ref_logps.T, delta, beta, args.lam)  # eq. 13 or 15
                (loss.sum() / len(batch)).backward()  # the mean over the whole batch, whatever the micro-batches
                losses.append(loss.detach())
                log_ratios.append((logps - ref_logps).detach())
                deltas.append(delta)
            losses, log_ratios, deltas = torch.cat(losses), torch.cat(log_ratios), torch.cat(deltas)
            grad_norm = clip_grad_norm_(policy.parameters(), args.max_grad_norm, error_if_nonfinite=True)
            row = {"step": before + len(steps) + 1, "epoch": epoch, "learning_rate": scheduler.get_last_lr()[0]}
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            log_ratio = log_ratios.mean(0)  # (responses,), the best first
            row |= {"loss": losses.mean().item(), "grad_norm": grad_norm.item()}
            row |= {"chosen_log_ratio": log_ratio[0].item(), "rejected_log_ratio": log_ratio[-1].item()}
            row |= {"delta": deltas.mean().item()}
            steps.append(row)
            log("train", row)
            checkpoint.save(steps)
        checkpoint.save(steps, now=True)  # a kill during evaluation costs no training
        del optimizer, scheduler, checkpoint  # frees their memory for sampling

        metrics = evaluate(policy, tokenizer, judges, held_out, run, t, args) | measure(policy, scored, args)
        names, late = ("loss", "chosen_log_ratio", "rejected_log_ratio", "delta"), steps[-max(1, len(steps) // 4) :]
        metrics |= {name: sum(row[name] for row in late) / len(late) for name in names}  # of the last quarter
        metrics |= {"pairs": len(pairs), "seconds": time.time() - began}
        finish_iterate(run, history, log, metrics, policy, tokenizer, steps, pairs)

    finish_run(run, history)  # final: the trained policy, unless the judge prefers the base model
    return history


if __name__ == "__main__":
    cli(main, Args, RECIPES, __doc__)
