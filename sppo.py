"""SPPO, Self-Play Preference Optimization: a response's log-ratio is regressed on how often it beats the policy itself.

Wu et al. 2024, arXiv 2405.00675 (ICLR 2025), Algorithm 1 with the loss of eq. 4.7. In each iteration the policy pi_t
answers every prompt K times, a judge says how likely each answer is to be preferred to each other one, and the policy
moves towards pi_{t+1}(y) = pi_t(y) exp(eta P(y > pi_t)) / Z: a no-regret step in the game "whose answer is preferred?".

    python sppo.py                       the built-in task, two minutes on two CPU cores: 0.14 -> 0.89 right
    python sppo.py --model mistral-7b    the paper's: UltraFeedback in thirds, PairRM; one GPU of 80 GB; not run yet
    python sppo.py --model DIR --prompts FILE.jsonl --judge DIR    all of it your own, at the paper's settings

It writes runs/NAME/: config.json, metrics.jsonl (a line per iterate), iter_T/{responses,preferences,pairs,steps,
answers}.jsonl, iter_T/outputs.json (the answers for alpaca_eval), iter_T/policy, and final, the best iterate's policy.

Where this file departs from the paper, and why:
 1. A truncated response loses to any finished one, whatever the judge says: it may not see that the end is missing.
 2. A prompt whose best and worst response are the same, or tie, is left out: it would only say "stay where you are".
 3. A response may have 1024 new tokens; the paper gives 1024 to prompt and response together.
 4. The prompts are those of UltraFeedback's binarized version, and which third a prompt is in is drawn anew: the
    authors' own thirds are UCLA-AGI/data-mistral-7b-instruct-sppo-iter1, 2 and 3.
 5. On CUDA weights are bf16 with an exact float32 master; gradients are bf16, and so is RMSprop's moment, rounded
    stochastically.
 6. A preference of exactly 0 or 1, as by rule 1, has no finite score: it counts as -14 or 14. Best and worst go by the
    mean of the scores, as the paper says, targets by the mean preference: where a judge is very sure, these may differ.
 7. One epoch over the pairs of an iteration, as in the released scripts and model cards (num_train_epochs 1.0); the
    paper's appendix speaks of 18, which readers of the code have asked about (uclaml/SPPO issue 10).
Where the paper and its official code (uclaml/SPPO) differ otherwise, this file follows the paper. The code
 a. samples at temperature 0.7, top-p 0.9, up to 2048 tokens: --temperature 0.7 --top_p 0.9 --max_new_tokens 2048;
 b. calls 1/eta `beta` and adds losses of its own; TRL calls the hard-label one `sppo_hard`, here --targets hard;
 c. gives each response one score, P = sigmoid(score_i - score_j), so that preferences cannot be cyclic: --preference
    official. The paper's sigmoid(s(y, y')) may be; here s is the mean of both orders;
 d. gives PairRM the prompt in the policy's chat template; PairRM was trained on plain text, which is what it gets here.
eta here multiplies the preference; DNO's eta divides it.
"""

import math
import random
import time
from dataclasses import dataclass
from functools import partial
from typing import Literal

import pandas
import torch
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm
from transformers import get_linear_schedule_with_warmup
from transformers.hf_argparser import HfArg

from common import (
    Checkpoint,
    add_logps,
    add_up,
    cached,
    cli,
    evaluate,
    finish_iterate,
    finish_run,
    load_judge,
    load_policy,
    make_optimizer,
    micro_batches,
    pair_logps,
    preferences,
    report_pairs,
    sample,
    split_prompts,
    start_run,
)


@dataclass
class Args:
    """The defaults are those of the built-in digits task; RECIPES below holds the paper's values for real models."""

    # model and data
    model: str = HfArg(default="tiny", help="Policy to train: a short name from the list above, a folder, or a hub id.")
    prompts: str = HfArg(default="digits", help="'digits' (built in), a file, or a folder or hub dataset ID[:split].")
    limit: int = HfArg(default=0, help="Use the first so many prompts; 0 means all (5,632 for digits).")
    max_prompt_tokens: int = HfArg(default=64, help="Longer prompts are left out and counted.")
    # judge and evaluation
    judge: str = HfArg(default="digits", help="'digits', 'pairrm' or its folder or hub id, 'llm', or a key of JUDGES.")
    judge_url: str = HfArg(default="", help="--judge llm: an OpenAI-compatible server, e.g. http://localhost:8000/v1.")
    judge_model: str = HfArg(default="", help="--judge llm: the model's name there; the key is OPENAI_API_KEY.")
    n_eval: int = HfArg(default=1024, help="Held-out prompts for evaluation, at most a quarter of all.")
    eval_prompts: str = HfArg(default="", help="Answer these in outputs.json instead, e.g. AlpacaEval's; as --prompts.")
    # algorithm
    iterations: int = HfArg(default=3, help="Rounds of sampling, judging and training, each on its own prompts.")
    k: int = HfArg(default=5, help="Responses sampled per prompt.")
    eta: float = HfArg(default=10.0, help="Step size: a log-ratio is regressed on eta (P - 1/2).")
    pairing: Literal["extremes", "all"] = HfArg(default="extremes", help="Train on the best and worst, or on all K.")
    targets: Literal["soft", "hard"] = HfArg(default="soft", help="Win rates, or 1 for the best and 0 for the worst.")
    log_z: Literal["half", "estimate"] = HfArg(default="half", help="log Z as eta / 2, or estimated from the samples.")
    preference: Literal["paper", "official"] = HfArg(default="paper", help="P as judged, or of scores; c. above.")
    # sampling
    temperature: float = HfArg(default=1.0, help="Sampling temperature, for training and evaluation.")
    top_p: float = HfArg(default=1.0, help="Nucleus sampling threshold, for training and evaluation.")
    max_new_tokens: int = HfArg(default=16, help="A response is truncated at this length.")
    # optimiser
    learning_rate: float = HfArg(default=2e-4, help="Peak learning rate of RMSprop.")
    warmup_ratio: float = HfArg(default=0.1, help="Share of the steps in which the rate rises; then it falls to 0.")
    epochs: int = HfArg(default=3, help="Passes over the pairs of an iteration.")
    batch_size: int = HfArg(default=16, help="Prompts per optimiser step; the last of an epoch may have fewer.")
    max_grad_norm: float = HfArg(default=1.0, help="Gradients are clipped to this norm.")
    # memory and run
    slots: int = HfArg(default=256, help="At most so many responses are decoded together; fewer if memory is short.")
    micro_tokens: int = HfArg(default=16384, help="Padded tokens per forward and backward: memory against speed.")
    checkpointing: bool = HfArg(default=False, help="Recompute layers in backward: memory against speed.")
    checkpoint_minutes: float = HfArg(default=30.0, help="Minutes between two checkpoints of training.")
    name: str = HfArg(default="", help="The run goes to runs/NAME; by default script, model, seed and time.")
    resume: str = HfArg(default="", help="Go on with the run in this folder, with its flags.")
    dry_run: bool = HfArg(default=False, help="Say what memory and disk the run takes, and stop.")
    track: Literal["", "wandb", "trackio", "tensorboard"] = HfArg(default="", help="Send metrics and samples there.")
    seed: int = HfArg(default=1, help="Seeds splits, sampling and shuffling.")
    device: Literal["cpu", "cuda"] = HfArg(default="cuda" if torch.cuda.is_available() else "cpu", help="Where to run.")

    def __post_init__(self):
        allowed = self.targets == "soft" or (self.pairing == "extremes" and self.log_z == "half")
        if not allowed:
            raise ValueError(
                "--targets hard: give --pairing extremes and --log_z half; only best and worst are 1 and 0"
            )


PAPER = {  # arXiv 2405.00675, experiments; k, temperature, top_p, iterations: the defaults; see 3. and 7. above
    "prompts": "HuggingFaceH4/ultrafeedback_binarized:train_prefs",
    "judge": "pairrm",
    "max_prompt_tokens": 512,
    "eta": 1e3,
    "max_new_tokens": 1024,
    "checkpointing": True,
    "learning_rate": 5e-7,
    "epochs": 1,
    "batch_size": 64,
}
# What learned at 135 M; tests/README.md has what did not. Not tried at 0.5 B. RMSprop's moment starts at 0, so that the
# first steps are up to ten times the rate: hence the long warm-up.
SMALL = {"max_prompt_tokens": 128, "max_new_tokens": 80, "eta": 10.0, "temperature": 0.7, "top_p": 0.9}
SMALL |= {"learning_rate": 5e-6, "warmup_ratio": 0.2, "batch_size": 4, "micro_tokens": 2048}
SMALL = {**PAPER, **SMALL, "checkpointing": False}
RECIPES = {"tiny": {}, "mistral-7b": PAPER, "smollm2-135m": SMALL, "qwen2.5-0.5b": SMALL, "other": PAPER}


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

    logps, ref_logps (B,): log pi(y|x) of the policy and of pi_t, nats, summed over the response's tokens.
    win_rate (B,): P(y > pi_t) in [0, 1]. eta > 0: multiplies it (the official code's 1/beta).
    log_z (B,) or None: log of the normaliser, nats; None stands for eta / 2, as in eq. 4.7.
    Returns (B,), nats squared; at the start eta^2 (win_rate - 1/2)^2, so 1e5 is normal at eta = 1e3.
    Raises ValueError when eta is not positive or the shapes differ.

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

    rows: B rows with "responses"; prefs (B, K, K). Trained on are the best and the worst, or all K, by the mean score
    s(y) = 1/K sum_k s(y, y_k) of section 5, where P(y > y') = sigmoid(s(y, y')). A row whose best and worst are the
    same or tie is left out. "win_rate" and "log_z" have a number for each of the responses.
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
    """Run SPPO; returns the metrics of every iterate, the start first."""
    run, table, log = start_run(args, __file__)  # table: a row per finished iterate; --resume has some
    judge = load_judge(args)
    newest = run / f"iter_{len(table) - 1}" / "policy" if len(table) > 1 else args.model
    policy, tokenizer = load_policy(newest, args.device, args.checkpointing)
    parts, held_out = split_prompts(policy, tokenizer, args)
    if not table:
        finish_iterate(run, table, log, evaluate(policy, tokenizer, judge, held_out, run, 0, args))

    for t in range(len(table), args.iterations + 1):  # Alg. 1, line 2
        folder, seed, began = run / f"iter_{t}", f"{args.seed} iteration {t}", time.time()
        # Alg. 1, line 3: K responses to each prompt from pi_t. Rows that are in a cached file already are kept.
        draw = partial(sample, policy, tokenizer, k=args.k, seed=seed, args=args)
        rows = cached(folder / "responses.jsonl", parts[t - 1], draw)
        # Alg. 1, line 4: prefs[b, i, j] = P(y_i > y_j)
        prefs = cached(folder / "preferences.jsonl", rows, lambda some: preferences(judge, some).tolist(), chunk=512)
        prefs = torch.tensor(prefs) if args.preference == "paper" else official_prefs(torch.tensor(prefs))
        # Alg. 1, line 5: win rates against pi_t, and the responses to train on
        pairs = make_pairs(rows, prefs, args)
        report_pairs(t, rows, pairs, began)
        if not pairs:
            break
        # log pi_t(y|x), before the first update and before a checkpoint is loaded: the policy is still pi_t
        add_logps(policy, pairs, "ref_logps", args.micro_tokens)

        # Alg. 1, line 6: eq. 4.7
        rng, size = random.Random(seed), args.batch_size
        epochs = [rng.sample(pairs, len(pairs)) for _ in range(args.epochs)]  # each in an order of its own
        batches = [(n, order[i : i + size]) for n, order in enumerate(epochs, 1) for i in range(0, len(order), size)]
        optimizer = make_optimizer(policy, args.learning_rate)
        scheduler = get_linear_schedule_with_warmup(optimizer, int(args.warmup_ratio * len(batches)), len(batches))
        checkpoint = Checkpoint(folder / "checkpoint.pt", policy, optimizer, scheduler, args.checkpoint_minutes)
        steps = checkpoint.load()  # [], unless the run was killed here
        before = table[-1]["step"]  # steps of earlier iterations
        for epoch, batch in tqdm(batches[len(steps) :], desc="training", leave=False, disable=None):
            losses, log_ratios = [], []
            for micro in micro_batches(policy, batch, args.micro_tokens):
                logps = pair_logps(policy, micro)  # (pairs, responses), as the three below
                ref_logps = torch.tensor([pair["ref_logps"] for pair in micro], device=policy.device)
                win_rate = torch.tensor([pair["win_rate"] for pair in micro], device=policy.device)
                log_z = torch.tensor([pair["log_z"] for pair in micro], device=policy.device)
                loss = sppo_loss(logps, ref_logps, win_rate, args.eta, log_z).mean(1)  # eq. 4.7
                (loss.sum() / len(batch)).backward()  # the mean over the whole batch, however it is cut
                losses.append(loss.detach())
                log_ratios.append((logps - ref_logps).detach())
            losses, log_ratios = add_up(policy, losses, log_ratios)  # over all GPUs; gradients, too
            grad_norm = clip_grad_norm_(policy.parameters(), args.max_grad_norm, error_if_nonfinite=True)
            row = {"step": before + len(steps) + 1, "epoch": epoch, "learning_rate": scheduler.get_last_lr()[0]}
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            log_ratio = log_ratios.mean(0)  # (responses,), best first
            row |= {"loss": losses.mean().item(), "grad_norm": grad_norm.item()}
            row |= {"chosen_log_ratio": log_ratio[0].item(), "rejected_log_ratio": log_ratio[-1].item()}
            steps.append(row)
            log("train", row)
            checkpoint.save(steps)
        checkpoint.save(steps, now=True)  # a kill during evaluation costs no training
        del optimizer, scheduler, checkpoint  # frees their memory for sampling

        metrics = evaluate(policy, tokenizer, judge, held_out, run, t, args)
        late = pandas.DataFrame(steps[-max(1, len(steps) // 4) :]).mean()  # of the last quarter of the steps
        metrics |= late[["loss", "chosen_log_ratio", "rejected_log_ratio"]].to_dict()
        metrics |= {"loss_over_eta2": late["loss"] / args.eta**2, "pairs": len(pairs), "seconds": time.time() - began}
        finish_iterate(run, table, log, metrics, policy, tokenizer, steps, pairs)

    # the best iterate on held-out prompts, as in the paper's experiments
    best = max(table[1:], key=lambda row: row.get("wins_vs_start", 0), default=None)
    finish_run(run, table, best)
    return table


if __name__ == "__main__":
    cli(main, Args, RECIPES, __doc__)
