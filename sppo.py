"""SPPO, Self-Play Preference Optimization: regress each response's log-ratio on its win rate against the policy.

Wu et al. 2024, arXiv 2405.00675 (ICLR 2025), Algorithm 1 with the loss of eq. 4.7. In each iteration the policy pi_t
answers every prompt K times, a judge estimates the probability that each is preferred to each other, and the policy
moves towards pi_{t+1}(y) = pi_t(y) exp(eta P(y > pi_t)) / Z: a no-regret step in the game "whose answer is preferred?".

    python sppo.py                       the built-in task, two minutes on one CPU core: 0.14 -> 0.89 right
    python sppo.py --model mistral-7b    the paper's setup: UltraFeedback in thirds, PairRM; one 80 GB GPU; not yet run
    python sppo.py --model DIR --prompts FILE.jsonl --judge DIR    your model, data and judge

It writes runs/NAME/: config.json, metrics.jsonl (a line per iterate), iter_T/{responses,preferences,pairs,steps,
answers}.jsonl, iter_T/outputs.json (the answers for alpaca_eval), iter_T/policy, and final, the best iterate's policy.

Where this file departs from the paper, and why:
 1. A truncated response loses to any finished one, whatever the judge says: it may not notice that the end is missing.
 2. A prompt whose best and worst response are the same, or tie, is dropped: it would only teach "stay where you are".
 3. A response may have 1024 new tokens; the paper gives 1024 to prompt and response together.
 4. The prompts are those of UltraFeedback's binarized version, and which third a prompt is in is drawn anew: the
    authors' own thirds are UCLA-AGI/data-mistral-7b-instruct-sppo-iter1, 2 and 3.
 5. On CUDA weights are bf16 with an exact float32 master; gradients are bf16, and so is RMSprop's moment, rounded
    stochastically.
 6. A preference of exactly 0 or 1, as rule 1 makes them, has no finite score: it counts as -14 or 14. As in the paper,
    the mean score decides which responses are best and worst, and the mean preference is the target. Where a judge is
    very sure, the two may rank differently.
 7. `final` is the best iterate on held-out prompts, if it beats the base model. The paper reports all three iterates
    and uses held-out prompts to choose hyperparameters (section 5.1); choosing an iterate is DNO's rule.
 8. With --log_z estimate, eq. 4.5's mean runs over the same K responses, each response's own included; the paper
    speaks of new samples.
Where the paper and its official code (uclaml/SPPO) differ otherwise, this file follows the paper. The code
 a. samples at temperature 0.7, top-p 0.9, up to 2048 tokens: --temperature 0.7 --top_p 0.9 --max_new_tokens 2048;
 b. calls 1/eta `beta` and has further losses; TRL calls the hard-label one `sppo_hard`, here --targets hard;
 c. gives each response one score, P = sigmoid(score_i - score_j), so that preferences cannot be cyclic: --preference
    official. The paper's sigmoid(s(y, y')) may be cyclic; here s is the mean of both orders;
 d. gives PairRM the prompt in the policy's chat template. PairRM was trained on plain text, so it gets that here;
 e. has a schedule of the one epoch that it trains: --schedule_epochs 1. The paper (section 5.1) trains the first epoch
    of a schedule of 18, so its rate only rises, to 2.8e-7: --schedule_epochs 18, as in RECIPES.
eta here multiplies the preference; DNO's eta divides it.
"""

import math
import random
import time
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
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
    limit: int = flag(0, "Use only the first N prompts; 0 means all (5,632 for digits).")
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
    eta: float = flag(10.0, "Step size: a log-ratio is regressed on eta (P - 1/2).", low=1e-6)
    pairing: Literal["extremes", "all"] = flag("extremes", "Train on the best and worst, or on all K.")
    targets: Literal["soft", "hard"] = flag("soft", "Win rates, or 1 for the best and 0 for the worst.")
    log_z: Literal["half", "estimate"] = flag("half", "log Z as eta / 2, or estimated from the samples.")
    preference: Literal["paper", "official"] = flag("paper", "P from pairs, or from a score per response: c. above.")
    # sampling
    temperature: float = flag(1.0, "Sampling temperature, for training and evaluation.", low=0.01, high=100)
    top_p: float = flag(1.0, "Nucleus sampling threshold, for training and evaluation.", low=1e-6, high=1)
    max_new_tokens: int = flag(16, "A response is truncated at this length.", low=1)
    # optimiser
    learning_rate: float = flag(2e-4, "Peak learning rate of RMSprop.", low=1e-12, high=1)
    warmup_steps: float = flag(0.1, "Linear warmup, in steps or, below 1, as a share of the schedule; then decay to 0.")
    epochs: int = flag(3, "Passes over the pairs.", low=1)
    schedule_epochs: int = flag(0, "Epochs that warmup and decay span; training stops after --epochs. 0: --epochs.")
    batch_size: int = flag(16, "Prompts per optimiser step; the last of an epoch may have fewer.", low=1)
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
        allowed = self.targets == "soft" or (self.pairing == "extremes" and self.log_z == "half")
        require(allowed, "--targets hard: give --pairing extremes and --log_z half; only best and worst are 1, 0")
        allowed = self.schedule_epochs == 0 or self.schedule_epochs >= self.epochs
        require(allowed, f"--schedule_epochs {self.schedule_epochs}: must be 0 or at least --epochs {self.epochs}")


PAPER = {  # arXiv 2405.00675, section 5.1; k, temperature, top_p, warmup, iterations: the defaults; see 3. above
    "prompts": "HuggingFaceH4/ultrafeedback_binarized:train_prefs",
    "judge": "pairrm",
    "max_prompt_tokens": 512,
    "eta": 1e3,
    "max_new_tokens": 1024,
    "checkpointing": True,
    "learning_rate": 5e-7,
    "epochs": 1,
    "schedule_epochs": 18,
    "batch_size": 64,
}
# Chosen at 135 M; tests/README.md has what else was tried. At 0.5 B it overshot: RMSprop's moment starts at 0, so that
# the first steps are up to ten times the rate, and with few steps a share of them is too short a warm-up.
SMALL = {"max_prompt_tokens": 128, "max_new_tokens": 80, "eta": 10.0, "temperature": 0.7, "micro_tokens": 2048}
SMALL |= {"learning_rate": 1e-5, "warmup_steps": 0.2, "batch_size": 8}
SMALL = {**PAPER, **SMALL, "schedule_epochs": 0, "checkpointing": False}
RECIPES = {"digits": {}, "small": SMALL, "paper": PAPER}


# The maths -----------------------------------------------------------------------------------------------------------


def win_rates(prefs):
    """P(y_k > pi_t), estimated by the mean preference of y_k over all K samples, itself (1/2) included.

    Source: Algorithm 1, line 5 of arXiv 2405.00675. prefs (B, K, K), probabilities, prefs[b, i, j] = P(y_i > y_j).
    Returns (B, K) in [0, 1]. Raises ValueError for another shape.

    >>> win_rates(torch.tensor([[[0.5, 0.9], [0.1, 0.5]]]))
    tensor([[0.7000, 0.3000]])
    """
    if prefs.ndim != 3 or prefs.shape[1] != prefs.shape[2]:
        raise ValueError(f"prefs must be (B, K, K), got {tuple(prefs.shape)}")
    return prefs.mean(-1)  # P^(y_k > pi_t) = 1/K sum_k' P(y_k > y_k')


def official_prefs(prefs):
    """The official code's P (B, K, K): sigmoid(score_i - score_j), a score being the mean of s(y, y_k) - s(y_k, y)."""
    scores = 2 * torch.logit(prefs, eps=1e-6).mean(-1)  # P = sigmoid((s(y, y') - s(y', y)) / 2)
    return torch.sigmoid(scores[:, :, None] - scores[:, None, :])


def log_partition(win_rate, eta):
    """log Z = log E_{y ~ pi_t} exp(eta P(y > pi_t)) as eq. 4.5 estimates it: win_rate (B, K) -> (B,), nats."""
    return torch.logsumexp(eta * win_rate, -1) - math.log(win_rate.shape[-1])  # eq. 4.5


def sppo_loss(logps, ref_logps, win_rate, eta, log_z=None):
    """The squared distance of a response's log-ratio from its target, eq. 4.7 of arXiv 2405.00675.

    All tensors have one shape, (pairs, responses) in main. logps, ref_logps: log pi(y|x) of the policy and of pi_t, in
    nats, summed over the response's tokens. win_rate: P(y > pi_t) in [0, 1]. eta > 0 multiplies it (the official code's
    1/beta). log_z: log of the normaliser in nats; None stands for eta / 2, as in eq. 4.7. Returns a loss per response,
    in nats squared. Before the first step it is eta^2 (win_rate - 1/2)^2, so 1e5 is normal at eta = 1e3. Raises
    ValueError when eta is not positive or the shapes differ.

    >>> one = torch.ones(1)
    >>> sppo_loss(-2 * one, -3 * one, 0.75 * one, eta=8.0)  # log-ratio 1, target 8 (0.75 - 0.5) = 2
    tensor([1.])
    """
    if eta <= 0:
        raise ValueError(f"eta must be positive, got {eta}")
    shapes = [tuple(x.shape) for x in (logps, ref_logps, win_rate, log_z) if x is not None]
    if len(set(shapes)) > 1:
        raise ValueError(f"shapes differ: {shapes}")
    log_ratio = logps - ref_logps
    log_z = eta / 2 if log_z is None else log_z
    return (log_ratio - (eta * win_rate - log_z)) ** 2  # eq. 4.7; with an estimated log_z, eq. 4.5


# Pairs ---------------------------------------------------------------------------------------------------------------


def make_pairs(rows, prefs, args):
    """Algorithm 1, line 5: of each row the "responses" to train on, best first, with their "win_rate" and "log_z".

    rows: B rows with "responses"; prefs (B, K, K). The best and the worst are chosen, or all K, by the mean score
    s(y) = 1/K sum_k s(y, y_k) of section 5, where P(y > y') = sigmoid(s(y, y')). A row whose best and worst are the
    same or tie is dropped. "win_rate" and "log_z" have a number for each of the responses.
    """
    win_rate = win_rates(prefs)  # (B, K)
    half = torch.full((len(rows),), args.eta / 2)
    log_z = log_partition(win_rate, args.eta) if args.log_z == "estimate" else half
    mean_score = torch.logit(prefs, eps=1e-6).mean(-1)  # (B, K); a preference of 0 or 1 is a score of -14 or 14
    order = torch.argsort(mean_score, dim=-1, descending=True, stable=True)
    pairs = []
    for b, (row, chosen) in enumerate(zip(rows, order.tolist(), strict=True)):
        best, worst, responses = chosen[0], chosen[-1], row["responses"]
        if mean_score[b, best] > mean_score[b, worst] and responses[best]["ids"] != responses[worst]["ids"]:
            chosen = chosen if args.pairing == "all" else [best, worst]
            targets = win_rate[b, chosen].tolist() if args.targets == "soft" else [1.0, 0.0]  # eq. 4.12
            pair = {"responses": [responses[i] for i in chosen], "win_rate": targets}
            pairs.append({**row, **pair, "log_z": [log_z[b].item()] * len(chosen)})
    return pairs


# Main ----------------------------------------------------------------------------------------------------------------


def main(args):
    """Run SPPO. Returns the metrics of every iterate, the base model's first; None for a dry run."""
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

    for t in range(len(history), args.iterations + 1):  # Alg. 1, line 2
        folder, seed, began = run / f"iter_{t}", f"{args.seed} iteration {t}", time.time()
        # Alg. 1, line 3: K responses {"text", "ids", "finished"} to each prompt, from pi_t; rows in the file are kept.
        respond = partial(sample_responses, policy, tokenizer, k=args.k, seed=seed, args=args)
        rows = read_or_make(folder / "responses.jsonl", parts[t - 1], respond)
        # Alg. 1, line 4: prefs[b, i, j] = P(y_i > y_j)
        prefs = read_or_make(folder / "preferences.jsonl", rows, lambda some: preferences(judge, some).tolist(), 128)
        prefs = truncated_lose(torch.tensor(prefs), rows)  # departure 1
        prefs = prefs if args.preference == "paper" else official_prefs(prefs)
        # Alg. 1, line 5: win rates against pi_t, and the responses to train on
        pairs = make_pairs(rows, prefs, args)
        report_pairs(t, rows, pairs, began)
        if not pairs:
            break
        # log pi_t(y|x), before the first update and before a checkpoint is loaded: the policy is still pi_t
        pairs = add_logps(policy, pairs, "ref_logps", args.micro_tokens)

        # Alg. 1, line 6: eq. 4.7
        rng, size = random.Random(seed), args.batch_size
        epochs = [rng.sample(pairs, len(pairs)) for _ in range(args.epochs)]  # shuffled anew in each epoch
        batches = [(n, order[i : i + size]) for n, order in enumerate(epochs, 1) for i in range(0, len(order), size)]
        total = len(batches) * (args.schedule_epochs or args.epochs) // args.epochs  # steps that the schedule spans
        optimizer, scheduler = make_optimizer(policy, args.learning_rate, args.warmup_steps, total)  # RMSprop
        checkpoint = Checkpoint(folder / "checkpoint.pt", policy, optimizer, scheduler, args.checkpoint_minutes)
        steps = checkpoint.load()  # [], or the steps done before a kill, with policy and optimizer as they were then
        before = history[-1]["step"]  # steps of earlier iterations
        for epoch, batch in progress(batches[len(steps) :], desc="training"):
            losses, log_ratios = [], []
            for micro in micro_batches(policy, batch, args.micro_tokens):  # cut to fit memory
                logps = pair_logps(policy, micro)  # (pairs, responses), as the three below
                ref_logps = torch.tensor([pair["ref_logps"] for pair in micro], device=policy.device)
                win_rate = torch.tensor([pair["win_rate"] for pair in micro], device=policy.device)
                log_z = torch.tensor([pair["log_z"] for pair in micro], device=policy.device)
                loss = sppo_loss(logps, ref_logps, win_rate, args.eta, log_z).mean(1)  # eq. 4.7
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
        metrics |= {"loss_over_eta2": metrics["loss"] / args.eta**2, "pairs": len(pairs)}
        metrics |= {"seconds": time.time() - began}
        finish_iterate(run, history, log, metrics, policy, tokenizer, steps, pairs)

    finish_run(run, history)  # final: the best iterate on held-out prompts, if it beats the base model (departure 7)
    return history


if __name__ == "__main__":
    cli(main, Args, RECIPES, __doc__)
