"""SPPO, Self-Play Preference Optimization: a response's log-ratio is regressed on how often it beats the policy itself.

Wu et al. 2024, arXiv 2405.00675 (ICLR 2025), Algorithm 1 with the loss of eq. 4.7. In each iteration the policy pi_t
answers every prompt K times, a judge says how likely each answer is to be preferred to each other one, and the policy
moves towards pi_{t+1}(y) = pi_t(y) exp(eta P(y > pi_t)) / Z: a no-regret step in the game "whose answer is preferred?".

    python sppo.py                       the built-in task, a minute on two CPU cores (README.md)
    python sppo.py --model mistral-7b    the paper's: UltraFeedback in thirds, PairRM; one GPU of 80 GB; not run yet
    python sppo.py --model DIR --prompts FILE.jsonl --judge DIR    all of it your own, at the paper's settings

It writes runs/NAME/: config.json, metrics.jsonl (a line per iterate), iter_1/{responses,preferences,pairs,steps}.jsonl,
iter_1/policy/, ..., final/ (the best iterate on held-out prompts), outputs.json (its answers to them, or to
--eval_prompts) and win_rates.json (each iterate against each).

Where this file departs from the paper, and why:
 1. A response that the length limit cut, or that repeats itself, loses against every sound one, whatever the judge
    says: it may not see the end.
 2. A prompt whose best and worst response are the same, or tie, is left out: it would only say "stay where you are".
 3. A response may have 1024 new tokens; the paper gives 1024 to prompt and response together.
 4. The prompts are those of UltraFeedback's binarized version, and which third a prompt is in is drawn anew: the
    authors' own thirds are UCLA-AGI/data-mistral-7b-instruct-sppo-iter1, 2 and 3.
 5. On CUDA weights are bf16 with an exact float32 master; gradients are bf16, and so is RMSprop's moment, rounded
    stochastically.
 6. Best and worst go by the mean of the scores, as the paper says, targets by the mean preference; a preference of 0 or
    1, as by rule 1, counts as a score of -14 or 14. Where a judge is very sure of some pairs, the two may disagree.
Where the paper and its official code (uclaml/SPPO) differ, this file follows the paper. The code
 a. samples at temperature 0.7, top-p 0.9, up to 2048 tokens: --temperature 0.7 --top_p 0.9 --max_new_tokens 2048;
 b. calls 1/eta `beta` and adds losses of its own; TRL calls the hard-label one `sppo_hard`, here --targets hard;
 c. turns one score per response into sigmoid(score_i - score_j), which is transitive by construction; the paper's
    P(y > y') = sigmoid(s(y, y')) may be cyclic; here s is the mean of both orders. The code's is --preference official;
 d. gives PairRM the prompt in the policy's chat template; PairRM was trained on plain text, which is what it gets here.
eta here multiplies the preference; DNO's eta divides it.
"""

import math
import time
from dataclasses import dataclass
from typing import Literal

import torch
from transformers.hf_argparser import HfArg

from common import (
    RunArgs,
    attach,
    check_run,
    cli,
    close_run,
    encode_prompts,
    evaluate,
    given_responses,
    judging_stage,
    late_means,
    load_prompts,
    load_responses,
    micro_batches,
    prepare,
    record,
    reference_stage,
    require,
    response_logps,
    sampling_stage,
    show_costs,
    split_prompts,
    start_run,
    train,
)


@dataclass
class Args(RunArgs):
    """The defaults are those of the built-in digits task; RECIPES below holds the paper's values for real models."""

    # model and data
    model: str = HfArg(default="tiny", help="Policy to train: a short name from the list above, a folder, or a hub id.")
    prompts: str = HfArg(default="digits", help="'digits' (built in), a file, or a folder or hub dataset ID[:split].")
    responses: str = HfArg(default="", help="Responses to train on, with --iterations 1: a file or ID[:split].")
    judge: str = HfArg(default="digits", help="'digits', 'pairrm' or its folder or hub id, 'llm', or a key of JUDGES.")
    limit: int = HfArg(default=0, help="Use the first so many prompts; 0 means all (5,632 for digits).")
    n_eval: int = HfArg(default=1024, help="Held-out prompts for evaluation, at most a quarter of all.")
    max_prompt_tokens: int = HfArg(default=64, help="Longer prompts are left out and counted.")
    # algorithm
    iterations: int = HfArg(default=3, help="Rounds of sampling, judging and training, each on its own prompts.")
    k: int = HfArg(default=5, help="Responses sampled per prompt.")
    eta: float = HfArg(default=10.0, help="Step size: a log-ratio is regressed on eta (P - 1/2).")
    pairs: Literal["extremes", "all"] = HfArg(default="extremes", help="Train on the best and the worst, or on all K.")
    targets: Literal["soft", "hard"] = HfArg(default="soft", help="Win rates, or 1 for the best and 0 for the worst.")
    log_z: Literal["half", "estimate"] = HfArg(default="half", help="log Z as eta / 2, or estimated from the samples.")
    # sampling
    temperature: float = HfArg(default=1.0, help="Sampling temperature, for training and evaluation.")
    top_p: float = HfArg(default=1.0, help="Nucleus sampling threshold, for training and evaluation.")
    max_new_tokens: int = HfArg(default=16, help="Length at which a response is cut off and counts as unfinished.")
    # optimiser
    learning_rate: float = HfArg(default=2e-4, help="Peak learning rate of RMSprop.")
    warmup_ratio: float = HfArg(default=0.1, help="Share of the steps in which the rate rises; then it falls to 0.")
    epochs: int = HfArg(default=3, help="Passes over the pairs of an iteration.")
    batch_size: int = HfArg(default=16, help="Prompts per optimiser step; the last of an epoch may have fewer.")
    max_grad_norm: float = HfArg(default=1.0, help="Gradients are clipped to this norm.")


PAPER = {  # arXiv 2405.00675, experiments; K, T, top-p and 3 iterations are the defaults; max_new_tokens: 3. above
    "prompts": "HuggingFaceH4/ultrafeedback_binarized:train_prefs",
    "judge": "pairrm",
    "max_prompt_tokens": 512,
    "eta": 1e3,
    "max_new_tokens": 1024,
    "slots": 64,
    "learning_rate": 5e-7,
    "epochs": 1,
    "batch_size": 64,
}
RECIPES = {"tiny": {}, "tiny-p": {}, "mistral-7b": PAPER, "other": PAPER}


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


# Roll-out and pairs --------------------------------------------------------------------------------------------------


def make_pairs(prompts, responses, prefs, args):
    """Algorithm 1, line 5: a row per prompt with its chosen responses, best first, their win rates, and log Z.

    Chosen are the best and the worst, or all K, by the mean score s(y) = 1/K sum_k s(y, y_k) of section 5, where
    P(y > y') = sigmoid(s(y, y')). There is no row for a prompt whose best and worst are the same or tie.
    """
    win_rate = win_rates(prefs)  # (B, K)
    attach("win_rate", [y for row in responses for y in row], win_rate.flatten())
    half = torch.full((len(prompts),), args.eta / 2)
    log_z = log_partition(win_rate, args.eta) if args.log_z == "estimate" else half
    mean_score = torch.logit(prefs, eps=1e-6).mean(-1)  # (B, K); a preference of 0 or 1 is a score of -14 or 14
    order = torch.argsort(mean_score, dim=-1, descending=True, stable=True)
    rows = []
    for b, chosen in enumerate(order.tolist()):
        best, worst = chosen[0], chosen[-1]
        if mean_score[b, best] > mean_score[b, worst] and responses[b][best]["ids"] != responses[b][worst]["ids"]:
            chosen = chosen if args.pairs == "all" else [best, worst]
            rows.append({**prompts[b], "responses": [responses[b][i] for i in chosen], "log_z": log_z[b].item()})
    return rows


# Train ---------------------------------------------------------------------------------------------------------------


def train_step(policy, optimizer, scheduler, batch, args):
    """One optimiser step on `batch`, rows of make_pairs; returns means over the batch and the gradient norm."""
    rows = [(pair, response) for pair in batch for response in pair["responses"]]
    prompts, responses = [pair["prompt_ids"] for pair, _ in rows], [response["ids"] for _, response in rows]
    ref_logps = torch.tensor([response["ref_logps"] for _, response in rows], device=policy.device)
    win_rate = torch.tensor([response["win_rate"] for _, response in rows], device=policy.device)
    if args.targets == "hard":
        win_rate = torch.tensor([1.0, 0.0], device=policy.device).repeat(len(batch))  # eq. 4.12
    log_z = torch.tensor([pair["log_z"] for pair, _ in rows], device=policy.device)
    losses, log_ratio = torch.zeros(len(rows)), torch.zeros(len(rows))
    for i in micro_batches(policy, prompts, responses, args.micro_tokens):
        logps = response_logps(policy, [prompts[j] for j in i], [responses[j] for j in i])
        loss = sppo_loss(logps, ref_logps[i], win_rate[i], args.eta, log_z[i])  # eq. 4.7
        (loss.sum() / len(rows)).backward()  # the mean over the whole batch, however it is cut
        losses[i], log_ratio[i] = loss.detach().cpu(), (logps - ref_logps[i]).detach().cpu()
    grad_norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), args.max_grad_norm, error_if_nonfinite=True)
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad()
    log_ratio = log_ratio.view(len(batch), -1)  # (pairs, chosen responses), best first
    chosen, rejected = log_ratio[:, 0].mean().item(), log_ratio[:, -1].mean().item()
    loss = losses.mean().item()
    return {"loss": loss, "chosen_log_ratio": chosen, "rejected_log_ratio": rejected, "grad_norm": grad_norm.item()}


# Main ----------------------------------------------------------------------------------------------------------------


def main(args):
    """Run SPPO; returns the metrics of every iterate, the start first. Raises InputError when it cannot go on."""
    fits = args.targets == "soft" or (args.pairs == "extremes" and args.log_z == "half")
    require(fits, "--targets hard: wants --pairs extremes and --log_z half, as only the best and worst are 1 and 0")
    one = args.iterations == 1 or not args.responses
    require(one, f"--responses: they are of one policy, so --iterations must be 1, not {args.iterations}")
    trained = args.k if args.pairs == "all" else 2  # responses per prompt, all in a row behind it
    run, plan = check_run(args, "sppo", trained)
    prompts = load_prompts(args.prompts, args.limit, args.seed)
    given = load_responses(args.responses, args.k) if args.responses else None
    policy, tokenizer, eval_prompts = prepare(args, plan)
    prompts = encode_prompts(tokenizer, prompts, args.max_prompt_tokens)
    parts, held_out = split_prompts(prompts, args.iterations, args.n_eval, args.seed, eval_prompts)
    if given:
        parts[0], given = given_responses(policy, tokenizer, parts[0], given, args)
    print(f"{args.iterations} iterations x {len(parts[0])} prompts x {args.k} responses; {len(held_out)} held out")
    sampled = 0 if args.responses else args.k
    show_costs(
        policy, parts[0], held_out, eval_prompts, args, row=trained, trained=trained, ranked=args.k, sampled=sampled
    )
    if args.dry_run:
        return []
    start_run(run, args, "sppo", policy)
    answers, table = [], []
    record(run, table, evaluate(policy, tokenizer, held_out, answers, run / "iter_0", args)[0], args)

    for iteration, prompts in enumerate(parts, 1):  # Alg. 1, line 2
        start, folder = time.perf_counter(), run / f"iter_{iteration}"
        # Alg. 1, line 3: K responses per prompt from pi_t
        seed = f"{args.seed} sample {iteration}"
        responses = sampling_stage(policy, tokenizer, prompts, seed, folder, args, given)
        # Alg. 1, line 4: P(y_k > y_k') for all k, k'; its mean over k' is line 5's win rate against pi_t
        prefs = judging_stage(prompts, responses, folder, args)  # (B, K, K)
        # Alg. 1, line 5: the responses to train on
        pairs = make_pairs(prompts, responses, prefs, args)
        if not pairs:
            cut = sum(not y["finished"] for row in responses for y in row) / (len(prompts) * args.k)
            nothing = f"iteration {iteration}: no response is preferred to another, and {cut:.0%} are unfinished"
            require(iteration > 1, f"{nothing}; see {folder}, and try a higher --max_new_tokens, --k or --temperature")
            print(nothing)
            break
        pairs = reference_stage(policy, pairs, folder, args)  # with log pi_t, before the first update
        # Alg. 1, line 6: eq. 4.7
        seed = f"{args.seed} shuffle {iteration}"
        steps = train(policy, tokenizer, pairs, train_step, args.learning_rate, seed, folder, args)

        metrics, iterate_prefs = evaluate(policy, tokenizer, held_out, answers, folder, args)
        metrics |= {**late_means(steps), "pairs": len(pairs), "seconds": time.perf_counter() - start}
        metrics["loss_over_eta2"] = metrics.pop("loss") / args.eta**2
        best = record(run, table, metrics, args, steps, (pairs[0], pairs[-1]))

    del policy  # the best one takes its place
    close_run(run, table, best, iterate_prefs, held_out, eval_prompts, answers, args)
    return table


if __name__ == "__main__":
    cli(main, Args, RECIPES, __doc__)
