"""DNO, Direct Nash Optimization: contrastive learning on pairs of the policy's own samples and a teacher's answers.

Rosset et al. 2024, arXiv 2404.03715. Algorithm 2 (DNO-Prct), the default: in each iteration the policy pi_t answers
every prompt K times, a judge ranks these answers and a teacher's, and DPO's loss with pi_t as reference is minimised on
the pairs with a large margin. --variant exact puts Algorithm 1's loss in its place: cross-entropy with the soft
target sigmoid(r_t(y1) - r_t(y2)) (eq. 8; eq. 12 is the same), minimal where pi_{t+1} is proportional to
pi_t exp(r_t / eta), eq. 9.

    python dno.py                       the built-in task, two minutes on one CPU core: 0.11 -> 0.91 right
    python dno.py --model DIR --prompts FILE.jsonl --gold FILE.jsonl --judge DIR    your model, data and judge

Where this file departs from the paper, or fills what it leaves open:
 1. A truncated response loses to any finished one, whatever the judge says. So does a sample with many repeated
    n-grams, as in section 5.1; the threshold, in `repeats`, is ours.
 2. --judge llm grades all candidates side by side, as in section 5.1, but in random order and by a RUBRIC of ours; the
    paper's prompt is its figure 3. Other judges, like PairRM in RECIPES, give preferences: scores are then win rates,
    and the values of --min_score and --margin for them are ours.
 3. The learning rate is 5e-7 for real models. The paper prints 5e-5, a hundred times the usual rate of full DPO
    fine-tuning at 7B. The optimiser is sppo.py's RMSprop.
 4. --sft_alpha adds -alpha log pi(y+|x), summed over tokens; the paper names alpha = 0.005 and does not define it.
 5. Replay: the 30 % of iteration t - 1, 15 % of t - 2, ... are shares of all pairs that iteration t trains on. Their
    reference is pi_t; their preferences stay those of their own iteration.
 6. --variant exact keeps Algorithm 2's estimate of r_t(y), the mean preference over the other candidates, and its
    teacher, replay and best iterate. Algorithm 1 has the mean over pi_t's answers, no teacher, no replay, and the
    mixture of all iterates: --gold '' --replay 0 comes closest to it.
 7. The paper has a GPT-4-Turbo answer to every prompt (section 5.1). openbmb/UltraFeedback has one of GPT-4 to about a
    quarter of its prompts, and only these are used; the run prints how many. Lengths of 512 + 1024 tokens are ours.
 8. On CUDA weights are bf16 with an exact float32 master; gradients are bf16, and so is RMSprop's moment, rounded
    stochastically.
--tau is appendix A's regularised game, Algorithm 3, option I; in three iterations it changes little. Option II, which
also samples from the smoothed policy, is not here. A line away are INPO (squared loss on this reference), COMAL (pi_ref
moves), online IPO (squared, pi_ref alone) and REBEL (squared, pi_t alone).
eta multiplies the log-ratio here (DPO's beta), so at the optimum it divides the preference; SPPO's eta is its inverse.
"""

import itertools
import math
import random
import time
from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch.nn.functional import logsigmoid
from torch.nn.utils import clip_grad_norm_

from common import (
    Checkpoint,
    add_logps,
    cli,
    estimate_hours,
    evaluate,
    finish_iterate,
    finish_run,
    flag,
    load_judge,
    load_policy,
    make_optimizer,
    micro_batches,
    pair_logps,
    preferences,
    progress,
    read_jsonl,
    read_or_make,
    report_pairs,
    require,
    sample_responses,
    split_prompts,
    start_run,
    truncated_lose,
)


@dataclass
class Args:
    """The defaults are those of the built-in digits task; RECIPES below has the paper's, and ours for small models."""

    # model and data
    model: str = flag("tiny", "Policy to train: a short name from the list above, a folder, or a hub id.")
    recipe: str = flag("auto", "Defaults of the other flags, in RECIPES; auto: the number of parameters decides.")
    prompts: str = flag("digits", "'digits' (built in), a file, or a folder or hub dataset ID[:split].")
    gold: str = flag("digits", "The teacher's responses: 'digits', a file or ID[:split]; '' for none.")
    limit: int = flag(2304, "Use only the first N prompts; 0 means all (5,632 for digits).")
    max_prompt_tokens: int = flag(64, "Longer prompts are skipped and counted.", low=1)
    # judge and evaluation
    judge: str = flag("digits", "'digits', 'pairrm' or its folder or hub id, 'llm', or a key of JUDGES.")
    judge_url: str = flag("", "--judge llm: an OpenAI-compatible server, e.g. http://localhost:8000/v1.", free=True)
    judge_model: str = flag("", "--judge llm: the model's name there; the key is OPENAI_API_KEY.")
    eval_judge: str = flag("", "Another judge; its win rates are printed, but nothing is trained on them.")
    n_eval: int = flag(1024, "Held-out prompts for evaluation, at most a quarter of all.", low=2)
    # algorithm
    iterations: int = flag(3, "Rounds of sampling, judging and training, each on its own prompts.", low=1)
    k: int = flag(5, "Responses sampled per prompt.", low=2, high=128)
    variant: Literal["dno", "restrictive", "spin", "all", "exact"] = flag(
        "dno", "dno: large margins; restrictive: the teacher's; spin: the teacher's, unjudged; all; exact: eq. 8."
    )
    eta: float = flag(2.0, "DPO's beta: the higher, the closer to pi_t.", low=1e-6)
    tau: float = flag(0.0, "Regularises towards the base model, appendix A: at most --eta; 0: the plain game.")
    min_score: float = flag(0.0, "Minimum score of y+. 0: 5 points with --judge llm, else a win rate of 0.5.")
    margin: float = flag(0.0, "Minimum lead over y-, halved if y+ is the student's. 0: 2 points, or a win rate of 0.3.")
    replay: float = flag(0.3, "Maximum share of pairs from iteration t-1; half of it from t-2, ...", high=0.99)
    sft_alpha: float = flag(1.0, "Weight of -log pi(y+|x), added to the contrastive loss.")
    # sampling
    temperature: float = flag(1.0, "Sampling temperature, for training and evaluation.", low=0.01, high=100)
    top_p: float = flag(1.0, "Nucleus sampling threshold, for training and evaluation.", low=1e-6, high=1)
    max_new_tokens: int = flag(16, "A response is truncated at this length.", low=1)
    # optimiser
    learning_rate: float = flag(1.5e-4, "Peak learning rate of RMSprop.", low=1e-12, high=1)
    warmup_steps: float = flag(0.1, "Linear warmup, in steps or, below 1, as a share of the schedule; then decay to 0.")
    epochs: int = flag(1, "Passes over the pairs.", low=1)
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

    def __post_init__(self):
        taught = self.gold or self.variant not in ("restrictive", "spin")
        require(taught, f"--variant {self.variant}: its pairs are won by a teacher; give --gold")
        require(self.tau <= self.eta, f"--tau {self.tau}: must be at most --eta {self.eta}")


# arXiv 2404.03715, section 5.1; K, iterations, epochs and batch size: the defaults. Its judge is GPT-4-Turbo (--judge
# llm), its base model Orca-2.5. It lowers the rate in later iterations but does not say by how much.
PAPER = {
    "prompts": "openbmb/UltraFeedback",
    "gold": "openbmb/UltraFeedback",
    "judge": "pairrm",
    "limit": 0,
    "eta": 0.1,
    "sft_alpha": 0.005,
    "max_prompt_tokens": 512,
    "temperature": 0.7,
    "top_p": 0.95,
    "max_new_tokens": 1024,
    "checkpointing": True,
    "learning_rate": 5e-7,
}
# Tried at 135 M (tests/README.md): at a rate of 1e-5 it forgets what it is not rewarded for.
SMALL = {"max_prompt_tokens": 128, "max_new_tokens": 80, "top_p": 1.0, "checkpointing": False, "micro_tokens": 2048}
SMALL = {**PAPER, **SMALL, "learning_rate": 3e-6, "warmup_steps": 0.2, "batch_size": 8}
RECIPES = {"digits": {}, "small": SMALL, "paper": PAPER}


# The maths -----------------------------------------------------------------------------------------------------------


def dno_loss(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, eta):
    """The contrastive loss -log sigmoid(eta h(y+) - eta h(y-)) of Algorithm 2, line 7 of arXiv 2404.03715.

    chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps (B,): log pi(y|x) of the policy and of pi_t,
    nats, summed over the response's tokens. eta > 0 (DPO's beta). Returns (B,), nats; log 2 at the start.
    Raises ValueError when eta is not positive or the shapes differ.

    >>> one = torch.ones(1)
    >>> dno_loss(-2 * one, -3 * one, -3 * one, -2 * one, eta=0.5)  # eta (1 - (-1)) = 1: log(1 + e^-1)
    tensor([0.3133])
    """
    if eta <= 0:
        raise ValueError(f"eta must be positive, got {eta}")
    shapes = [tuple(x.shape) for x in (chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)]
    if len(set(shapes)) > 1:
        raise ValueError(f"shapes differ: {shapes}")
    chosen, rejected = chosen_logps - ref_chosen_logps, rejected_logps - ref_rejected_logps  # h(y+), h(y-)
    return -logsigmoid(eta * chosen - eta * rejected)  # Alg. 2, line 7


def dno_exact_loss(logps_1, logps_2, ref_logps_1, ref_logps_2, r_1, r_2, eta):
    """Cross-entropy of sigmoid(eta h(y1) - eta h(y2)) with the target sigmoid(r_t(y1) - r_t(y2)), eq. 8.

    Source: arXiv 2404.03715. logps_1, logps_2, ref_logps_1, ref_logps_2 (B,): as in dno_loss, in either order.
    r_1, r_2 (B,): r_t(y1) and r_t(y2), mean preferences in [0, 1], or c times these. eta > 0. Returns (B,), nats; least
    where h(y1) - h(y2) = (r_1 - r_2) / eta, eq. 9. Raises ValueError as dno_loss.

    >>> one = torch.ones(1)
    >>> dno_exact_loss(-2 * one, -3 * one, -3 * one, -2 * one, math.log(3) * one, 0 * one, eta=0.5)
    tensor([0.5633])
    """
    first = dno_loss(logps_1, logps_2, ref_logps_1, ref_logps_2, eta)  # as if y1 had won
    second = dno_loss(logps_2, logps_1, ref_logps_2, ref_logps_1, eta)
    return torch.sigmoid(r_1 - r_2) * first + torch.sigmoid(r_2 - r_1) * second  # eq. 8


def win_rates(prefs):
    """r_t(y), by which Algorithm 2, line 5, ranks: the mean preference over the other candidates, y itself left out.

    Source: arXiv 2404.03715. prefs (B, K, K), prefs[b, i, j] = P(y_i > y_j). Returns (B, K) in [0, 1].

    >>> win_rates(torch.tensor([[[0.5, 0.9, 0.7], [0.1, 0.5, 0.5], [0.3, 0.5, 0.5]]]))
    tensor([[0.8000, 0.3000, 0.4000]])
    """
    return (prefs.sum(-1) - prefs.diagonal(dim1=-2, dim2=-1)) / (prefs.shape[-1] - 1)


# Pairs ---------------------------------------------------------------------------------------------------------------


def repeats(ids, n=4):
    """Whether a response repeats itself: more than half of its n-grams of tokens occur in it before.

    >>> repeats([1, 2, 3] * 20), repeats(range(60))
    (True, False)
    """
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return len(grams) >= 20 and len(set(grams)) < len(grams) / 2


def rank_responses(judge, rows, args):
    """Algorithm 2, line 5: {"win_rate": K floats} of each row, over the others, and "points" if the judge gives them.

    A truncated response, or one that repeats itself, loses to all others and gets 0 points. With --variant spin the
    teacher wins and the judge is not asked.
    """
    rows = [
        {**row, "responses": [{**y, "finished": y["finished"] and not repeats(y["ids"])} for y in row["responses"]]}
        for row in rows
    ]
    if args.variant == "spin":
        return [{"win_rate": [float("teacher" in y and y["finished"]) for y in row["responses"]]} for row in rows]
    prefs = truncated_lose(preferences(judge, rows), rows)
    ranked = [{"win_rate": wins} for wins in win_rates(prefs).tolist()]
    if hasattr(judge, "points"):
        texts = [[y["text"] for y in row["responses"]] for row in rows]
        finished = torch.tensor([[y["finished"] for y in row["responses"]] for row in rows])
        points = judge.points([row["prompt"] for row in rows], texts) * finished  # (B, K), NaN where the judge failed
        ranked = [{**row, "points": scores} for row, scores in zip(ranked, points.tolist(), strict=True)]
    return ranked


def make_pairs(rows, ranked, args):
    """Algorithm 2, line 6: rows with "responses" [y+, y-], their "win_rate", and "kind", such as "teacher_student".

    ranked: what rank_responses returned for `rows`. y+ must be better than y-. With --variant dno it scores at least
    min_score and leads y- by margin, or by half of that if y+ is the student's; restrictive also wants y+ to be the
    teacher's, spin only that. exact takes any two different responses, as its soft targets tell how they compare.
    """
    least, margin = (5.0, 2.0) if "points" in ranked[0] else (0.5, 0.3)
    least, margin, pairs = args.min_score or least, args.margin or margin, []
    for row, scores in zip(rows, ranked, strict=True):
        points = scores.get("points", scores["win_rate"])
        # Best first, the teacher's before the student's. Rows where the judge failed have no pair.
        order = sorted(range(len(points)), key=lambda i: (-points[i], "teacher" not in row["responses"][i]))
        for i, j in itertools.combinations(order if not any(map(math.isnan, points)) else (), 2):
            better, worse, lead = row["responses"][i], row["responses"][j], points[i] - points[j]
            by_teacher = "teacher" in better
            large = points[i] >= least and lead >= (margin if by_teacher else margin / 2)
            wanted = {"dno": large, "restrictive": large and by_teacher, "spin": by_teacher}.get(args.variant, True)
            if better["ids"] != worse["ids"] and wanted and (lead > 0 or args.variant == "exact"):
                kind = "_".join("teacher" if "teacher" in y else "student" for y in (better, worse))
                win_rate = [scores["win_rate"][i], scores["win_rate"][j]]
                pairs.append({**row, "responses": [better, worse], "win_rate": win_rate, "kind": kind})
    return pairs


def with_replay(pairs, earlier, share, rng):
    """`pairs` and some of earlier iterations: of the last one at most `share` of all pairs, replayed ones included.

    Of the one before it share / 2, then share / 4, ... earlier: a list of pairs per iteration; drawn by rng.
    """
    shares = [share / 2**i for i in reversed(range(len(earlier)))]
    before, sizes = None, [0] * len(earlier)
    while sizes != before:
        before, n = sizes, len(pairs) + sum(sizes)
        sizes = [min(len(rows), int(s * n)) for s, rows in zip(shares, earlier, strict=True)]
    return pairs + [row for rows, size in zip(earlier, sizes, strict=True) for row in rng.sample(rows, size)]


def smooth_reference(pairs, args):
    """The pairs with "ref_logps" of pi_t^(1 - tau/eta) pi_ref^(tau/eta), eq. 14, pi_ref being the base model."""
    base, _ = load_policy(args.model, args.device)
    share, pairs = args.tau / args.eta, add_logps(base, pairs, "base_logps", args.micro_tokens)
    mixed = [torch.tensor(p["ref_logps"]).lerp(torch.tensor(p["base_logps"]), share).tolist() for p in pairs]  # eq. 14
    return [{**pair, "ref_logps": ref_logps} for pair, ref_logps in zip(pairs, mixed, strict=True)]


# Main ----------------------------------------------------------------------------------------------------------------


def main(args):
    """Run DNO. Returns the metrics of every iterate, the base model's first; None for a dry run."""
    run, history, log = start_run(args, main)  # runs/NAME; the metrics of each finished iterate; --track's log
    judge = load_judge(args)
    judges = judge, load_judge(args, "eval_judge") if args.eval_judge else None
    newest = run / f"iter_{len(history) - 1}" / "policy" if len(history) > 1 else args.model
    policy, tokenizer = load_policy(newest, args.device, args.checkpointing)
    # A row has "prompt" (messages) and "prompt_ids"; parts[t - 1] are the training rows of iteration t.
    parts, held_out = split_prompts(policy, tokenizer, args)
    if args.dry_run:
        return estimate_hours(policy, judge, parts, held_out, args)
    if not history:
        finish_iterate(run, history, log, evaluate(policy, tokenizer, judges, held_out, run, 0, args))

    for t in range(len(history), args.iterations + 1):  # Alg. 2, line 2
        folder, seed, began = run / f"iter_{t}", f"{args.seed} iteration {t}", time.time()
        # Alg. 2, line 4: K responses {"text", "ids", "finished"} to each prompt, from pi_t; rows in the file are kept.
        respond = partial(sample_responses, policy, tokenizer, k=args.k, seed=seed, args=args)
        rows = read_or_make(folder / "responses.jsonl", parts[t - 1], respond)
        if args.gold:  # Alg. 2, line 3: the teacher's response
            rows = [{**row, "responses": [*row["responses"], row["gold"]]} for row in rows]
        # Alg. 2, line 5: rank all K + 1
        rank = partial(rank_responses, judge, args=args)
        ranked = read_or_make(folder / "preferences.jsonl", rows, rank, chunk=128)
        # Alg. 2, line 6: pairs with a large margin
        pairs = make_pairs(rows, ranked, args)
        report_pairs(t, rows, pairs, began)
        if not pairs:
            break
        new, earlier = len(pairs), [read_jsonl(run / f"iter_{i}" / "pairs.jsonl") for i in range(1, t)]
        pairs = with_replay(pairs, earlier, args.replay, random.Random(f"{args.seed} replay {t}"))
        # log pi_t(y|x), before the first update and before a checkpoint is loaded: the policy is still pi_t
        pairs = add_logps(policy, pairs, "ref_logps", args.micro_tokens)
        pairs = smooth_reference(pairs, args) if args.tau else pairs  # Alg. 3, option I

        # Alg. 2, line 7
        rng, size = random.Random(seed), args.batch_size
        epochs = [rng.sample(pairs, len(pairs)) for _ in range(args.epochs)]  # shuffled anew in each epoch
        batches = [(n, order[i : i + size]) for n, order in enumerate(epochs, 1) for i in range(0, len(order), size)]
        optimizer, scheduler = make_optimizer(policy, args.learning_rate, args.warmup_steps, len(batches))  # RMSprop
        checkpoint = Checkpoint(folder / "checkpoint.pt", policy, optimizer, scheduler, args.checkpoint_minutes)
        steps = checkpoint.load()  # [], or the steps done before a kill, with policy and optimizer as they were then
        before = history[-1]["step"]  # steps of earlier iterations
        for epoch, batch in progress(batches[len(steps) :], desc="training"):
            losses, log_ratios = [], []
            for micro in micro_batches(policy, batch, args.micro_tokens):  # cut to fit memory
                logps = pair_logps(policy, micro)  # (pairs, 2), as the two below
                ref_logps = torch.tensor([pair["ref_logps"] for pair in micro], device=policy.device)
                win_rate = torch.tensor([pair["win_rate"] for pair in micro], device=policy.device)
                if args.variant == "exact":
                    loss = dno_exact_loss(*logps.T, *ref_logps.T, *win_rate.T, args.eta)  # eq. 8
                else:
                    loss = dno_loss(*logps.T, *ref_logps.T, args.eta)  # Alg. 2, line 7
                    loss = loss - args.sft_alpha * logps[:, 0]  # departure 4
                (loss.sum() / len(batch)).backward()  # the mean over the whole batch, whatever the micro-batches
                losses.append(loss.detach())
                log_ratios.append((logps - ref_logps).detach())
            losses, log_ratios = torch.cat(losses), torch.cat(log_ratios)
            grad_norm = clip_grad_norm_(policy.parameters(), args.max_grad_norm, error_if_nonfinite=True)
            row = {"step": before + len(steps) + 1, "epoch": epoch, "learning_rate": scheduler.get_last_lr()[0]}
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            log_ratio = log_ratios.mean(0)  # (responses,), the best first
            row |= {"loss": losses.mean().item(), "grad_norm": grad_norm.item()}
            row |= {"chosen_log_ratio": log_ratio[0].item(), "rejected_log_ratio": log_ratio[-1].item()}
            steps.append(row)
            log("train", row)
            checkpoint.save(steps)
        checkpoint.save(steps, now=True)  # a kill during evaluation costs no training
        del optimizer, scheduler, checkpoint  # frees their memory for sampling

        metrics = evaluate(policy, tokenizer, judges, held_out, run, t, args)
        names, late = ("loss", "chosen_log_ratio", "rejected_log_ratio"), steps[-max(1, len(steps) // 4) :]
        metrics |= {name: sum(row[name] for row in late) / len(late) for name in names}  # of the last quarter
        metrics |= {"pairs": len(pairs), "replayed": len(pairs) - new}
        metrics |= Counter(pair["kind"] for pair in pairs[:new])
        metrics |= {"seconds": time.time() - began}
        finish_iterate(run, history, log, metrics, policy, tokenizer, steps, pairs[:new])

    finish_run(run, history)  # Alg. 2, line 9: the best of all iterates on held-out prompts, the base model included
    return history


if __name__ == "__main__":
    cli(main, Args, RECIPES, __doc__)
