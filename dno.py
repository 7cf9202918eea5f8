"""DNO, Direct Nash Optimization: contrastive learning on pairs of the policy's own samples and a teacher's answers.

Rosset et al. 2024, arXiv 2404.03715. Algorithm 2 (DNO-Prct), the default: in each iteration the policy pi_t answers
every prompt K times, a judge ranks these answers and a teacher's, and DPO's loss with pi_t as reference is minimised on
the pairs with a large margin. --loss exact puts Algorithm 1's loss in its place: cross-entropy with the soft target
sigmoid(r_t(y1) - r_t(y2)) (eq. 8; eq. 12 is the same), least where pi_{t+1} is proportional to pi_t exp(r_t / eta),
eq. 9.

    python dno.py                       the built-in task, a minute on two CPU cores (README.md)
    python dno.py --model DIR --prompts FILE.jsonl --gold FILE.jsonl --judge DIR    all of it your own

It writes what sppo.py writes: runs/NAME/ with config.json, metrics.jsonl, iter_1/..., final/, outputs.json and
win_rates.json.

Where this file departs from the paper, or fills what it leaves open:
 1. A response that the length limit cut, or that repeats itself, loses against every sound one, whatever the judge
    says. In the paper repetition makes automatic negatives; it does not mention cut responses.
 2. Candidates are shown to --judge llm in random order; the paper does not say in which. Other judges give preferences:
    margins are then differences of win rates, --min_win_rate and --win_rate_margin, whose values are ours. RECIPES has
    PairRM, which runs on the same GPU; --judge llm is the paper's kind.
 3. The learning rate is 5e-7 for real models. The paper prints 5e-5, a hundred times the usual rate of full DPO
    fine-tuning at 7B. The optimiser is sppo.py's RMSprop.
 4. --sft_alpha adds -alpha log pi(y+|x), summed over tokens; the paper names alpha = 0.005 and does not define it.
 5. Replay: the 30 % of iteration t - 1, 15 % of t - 2, ... are shares of all pairs that iteration t trains on. Their
    reference is pi_t; their preferences stay those of their own iteration.
 6. r_t(y), by eq. 9 the mean preference over pi_t's answers, is that over the other candidates, the teacher's included.
    --loss exact also keeps the teacher, replay and the best iterate where Algorithm 1 has none, none and the mixture of
    all iterates: --gold '' --replay 0 comes closest to it.
 7. On CUDA weights are bf16 with an exact float32 master; gradients are bf16, and so is RMSprop's moment, rounded
    stochastically.
eta multiplies the log-ratio here (DPO's beta), so at the optimum it divides the preference; SPPO's eta is its inverse.
"""

import collections
import itertools
import math
import random
import time
from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn.functional import logsigmoid
from transformers.hf_argparser import HfArg

from common import (
    CHUNK_OF_PROMPTS,
    RunArgs,
    are_sound,
    as_prefs,
    ask_judge,
    attach,
    check_run,
    cli,
    close_run,
    encode_prompts,
    evaluate,
    given_responses,
    gold_responses,
    late_means,
    load_gold,
    load_judge,
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
    stage,
    start_run,
    train,
)


@dataclass
class Args(RunArgs):
    """The defaults are those of the built-in digits task; RECIPES below holds the paper's values for real models."""

    # model and data
    model: str = HfArg(default="tiny", help="Policy to train: a short name from the list above, a folder, or a hub id.")
    prompts: str = HfArg(default="digits", help="'digits' (built in), a file, or a folder or hub dataset ID[:split].")
    gold: str = HfArg(default="digits", help="The teacher's responses: 'digits', a file or ID[:split]; '' for none.")
    responses: str = HfArg(default="", help="Responses to train on, with --iterations 1: a file or ID[:split].")
    judge: str = HfArg(default="digits", help="'digits', 'pairrm' or its folder or hub id, 'llm', or a key of JUDGES.")
    limit: int = HfArg(default=2304, help="Use the first so many prompts; 0 means all (5,632 for digits).")
    n_eval: int = HfArg(default=1024, help="Held-out prompts for evaluation, at most a quarter of all.")
    max_prompt_tokens: int = HfArg(default=64, help="Longer prompts are left out and counted.")
    # algorithm
    iterations: int = HfArg(default=3, help="Rounds of sampling, judging and training, each on its own prompts.")
    k: int = HfArg(default=5, help="Responses sampled per prompt.")
    loss: Literal["contrastive", "exact"] = HfArg(default="contrastive", help="Algorithm 2's loss, or Algorithm 1's.")
    eta: float = HfArg(default=2.0, help="DPO's beta: the higher, the closer to pi_t.")
    exact_scale: float = HfArg(default=1.0, help="c of --loss exact, of targets sigmoid(c (r1 - r2)).")
    pairs: Literal["dno", "restrictive", "spin", "all"] = HfArg(
        default="dno",
        help="dno: large margins; restrictive: of these, those that the teacher wins; spin: teacher before "
        "student, unjudged; all: any margin. --loss exact has no margins.",
    )
    min_score: float = HfArg(default=5.0, help="By a judge of points y+ has at least so many of 6.")
    margin: float = HfArg(default=2.0, help="... and so many more than y-, if y+ is the teacher's.")
    student_margin: float = HfArg(default=1.0, help="... and so many more than y-, if y+ is the student's.")
    min_win_rate: float = HfArg(default=0.5, help="By another judge y+ has at least this win rate.")
    win_rate_margin: float = HfArg(default=0.3, help="... and so much more than y-, half of it if y+ is the student's.")
    replay: float = HfArg(
        default=0.3, help="At most this share of pairs is from iteration t-1, half of it from t-2, ..."
    )
    sft_alpha: float = HfArg(default=1.0, help="Weight of -log pi(y+|x), added to the contrastive loss.")
    # sampling
    temperature: float = HfArg(default=1.0, help="Sampling temperature, for training and evaluation.")
    top_p: float = HfArg(default=1.0, help="Nucleus sampling threshold, for training and evaluation.")
    max_new_tokens: int = HfArg(default=16, help="Length at which a response is cut off and counts as unfinished.")
    # optimiser
    learning_rate: float = HfArg(default=1.5e-4, help="Peak learning rate of RMSprop, in the first iteration.")
    lr_decay: float = HfArg(default=1.0, help="It is multiplied by this from one iteration to the next.")
    warmup_ratio: float = HfArg(default=0.1, help="Share of the steps in which the rate rises; then it falls to 0.")
    epochs: int = HfArg(default=1, help="Passes over the pairs of an iteration.")
    batch_size: int = HfArg(default=64, help="Pairs per optimiser step; the last of an epoch may have fewer.")
    max_grad_norm: float = HfArg(default=1.0, help="Gradients are clipped to this norm.")


# arXiv 2404.03715, section 5, where the judge is GPT-4-Turbo (--judge llm) and the start Orca-2.5. K, 3 iterations, one
# epoch and the batch are the defaults; learning rate: departure 3; it falls later there, by how much is not said.
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
    "slots": 64,
    "learning_rate": 5e-7,
}
RECIPES = {"tiny": {}, "tiny-p": {}, "mistral-7b": PAPER, "other": PAPER}


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
    """r_t(y) as Algorithm 2, line 5, ranks by it: the mean preference over the other candidates, y itself left out.

    Source: arXiv 2404.03715. prefs (B, K, K), prefs[b, i, j] = P(y_i > y_j). Returns (B, K) in [0, 1].

    >>> win_rates(torch.tensor([[[0.5, 0.9, 0.7], [0.1, 0.5, 0.5], [0.3, 0.5, 0.5]]]))
    tensor([[0.8000, 0.3000, 0.4000]])
    """
    return (prefs.sum(-1) - prefs.diagonal(dim1=-2, dim2=-1)) / (prefs.shape[-1] - 1)


# Roll-out and pairs --------------------------------------------------------------------------------------------------


def rank(prompts, candidates, args):
    """Algorithm 2, line 5: give each candidate its "win_rate" over the others and, by a judge of points, its "points".

    A response that the length limit cut, or that repeats itself, gets 0 points. With --pairs spin the teacher wins,
    if it is sound, and nobody is asked.
    """
    if args.pairs == "spin":
        for y in itertools.chain(*candidates):
            y["win_rate"] = float("teacher" in y and y["finished"] and not y["repeats"])
        return
    judge = load_judge(args)
    for n in sorted({len(row) for row in candidates}):  # K + 1 and, where gold is missing, K
        some = [b for b, row in enumerate(candidates) if len(row) == n]
        rows = [candidates[b] for b in some]
        flat = [y for row in rows for y in row]
        opinion = ask_judge(judge, [prompts[b] for b in some], rows)  # prefs (B, n, n), or points (B, n)
        attach("win_rate", flat, win_rates(as_prefs(opinion, rows)).flatten())
        if opinion.dim() == 2:
            attach("points", flat, opinion.where(are_sound(rows) | opinion.isnan(), 0.0).flatten())


def ranking_stage(prompts, candidates, folder, args):
    """rank as a stage: preferences.jsonl, per prompt {"win_rate": [...]} and, if the judge gives them, "points"."""

    def make(rows):
        rank([prompt for prompt, _ in rows], [row for _, row in rows], args)
        return [{name: [y[name] for y in row] for name in ("win_rate", "points") if name in row[0]} for _, row in rows]

    rows = stage(folder / "preferences.jsonl", list(zip(prompts, candidates, strict=True)), make, CHUNK_OF_PROMPTS)
    for row, ranked in zip(candidates, rows, strict=True):
        for name, values in ranked.items():
            for y, value in zip(row, values, strict=True):
                y[name] = value


def make_pairs(prompts, candidates, args):
    """Algorithm 2, line 6: rows {"prompt", "prompt_ids", "responses": [y+, y-], "kind"} and {rule: how many failed it}.

    candidates: per prompt its responses as rank leaves them, the teacher's with "teacher". The contrastive loss wants
    y+ better and, with --pairs dno, y+ of at least min_score points and y- less by margin, or by student_margin if y+
    is the student's; where there are no points, min_win_rate and win_rate_margin, or half of it. --pairs restrictive
    wants the teacher to win as well; spin only that; all no margin. The exact loss takes any two different responses,
    as its targets say by how much which is better.
    """
    rows, failed, unit = [], collections.Counter(), "win_rate"
    least = ("below --min_win_rate", args.min_win_rate)  # of y+
    margins = ("within --win_rate_margin", args.win_rate_margin), ("within half of it", args.win_rate_margin / 2)
    if "points" in candidates[0][0]:
        unit, least = "points", ("below --min_score", args.min_score)
        margins = ("within --margin", args.margin), ("within --student_margin", args.student_margin)
    contrastive = args.loss == "contrastive"
    filtered = contrastive and args.pairs in ("dno", "restrictive")
    for prompt, candidate in zip(prompts, candidates, strict=True):
        if any(y[unit] is None for y in candidate):
            failed["not judged"] += math.comb(len(candidate), 2)
            continue
        ranking = sorted(candidate, key=lambda y: (-y[unit], "teacher" not in y))
        for a, b in itertools.combinations(ranking, 2):
            kind = "_".join("teacher" if "teacher" in y else "student" for y in (a, b))
            gap, rule = a[unit] - b[unit], ""  # the rule that it fails
            words, margin = margins[0] if "teacher" in a else margins[1]
            if a["ids"] == b["ids"]:
                rule = "identical"
            elif args.pairs in ("restrictive", "spin") and kind != "teacher_student":
                rule = "not won by the teacher"
            elif contrastive and gap <= 0:
                rule = "tied"
            elif filtered and a[unit] < least[1]:
                rule = least[0]
            elif filtered and gap < margin:
                rule = words
            failed[rule] += 1
            if not rule:
                rows.append({**prompt, "responses": [a, b], "kind": kind})
    del failed[""]
    return rows, dict(failed)


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


# Train ---------------------------------------------------------------------------------------------------------------


def train_step(policy, optimizer, scheduler, batch, args):
    """One optimiser step on `batch`, rows of make_pairs; returns means over the batch and the gradient norm."""
    rows = [(pair, response) for pair in batch for response in pair["responses"]]  # chosen, rejected, chosen, ...
    prompts, responses = [pair["prompt_ids"] for pair, _ in rows], [response["ids"] for _, response in rows]
    ref_logps = torch.tensor([response["ref_logps"] for _, response in rows], device=policy.device)
    win_rate = torch.tensor([response["win_rate"] for _, response in rows], device=policy.device)
    losses, log_ratio = torch.zeros(len(batch)), torch.zeros(len(rows))
    for i in micro_batches(policy, prompts, responses, args.micro_tokens, pairs=True):
        logps = response_logps(policy, [prompts[j] for j in i], [responses[j] for j in i])
        (chosen, rejected), (ref_chosen, ref_rejected) = logps.view(-1, 2).T, ref_logps[i].view(-1, 2).T
        if args.loss == "exact":
            r_1, r_2 = args.exact_scale * win_rate[i].view(-1, 2).T
            loss = dno_exact_loss(chosen, rejected, ref_chosen, ref_rejected, r_1, r_2, args.eta)  # eq. 8
        else:
            loss = dno_loss(chosen, rejected, ref_chosen, ref_rejected, args.eta)  # Alg. 2, line 7
            loss = loss - args.sft_alpha * chosen  # departure 4
        (loss.sum() / len(batch)).backward()  # the mean over the whole batch, however it is cut
        losses[[j // 2 for j in i[::2]]], log_ratio[i] = loss.detach().cpu(), (logps - ref_logps[i]).detach().cpu()
    grad_norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), args.max_grad_norm, error_if_nonfinite=True)
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad()
    loss, (chosen, rejected) = losses.mean().item(), log_ratio.view(-1, 2).mean(0).tolist()
    return {"loss": loss, "chosen_log_ratio": chosen, "rejected_log_ratio": rejected, "grad_norm": grad_norm.item()}


# Main ----------------------------------------------------------------------------------------------------------------


def main(args):
    """Run DNO; returns the metrics of every iterate, the start first. Raises InputError when it cannot go on."""
    one = args.iterations == 1 or not args.responses
    require(one, f"--responses: they are of one policy, so --iterations must be 1, not {args.iterations}")
    taught = args.gold or args.pairs not in ("restrictive", "spin")
    require(taught, f"--pairs {args.pairs}: its pairs are won by a teacher, so it takes --gold")
    run, plan = check_run(args, "dno", 2)  # a row to train on has a prompt and two responses
    prompts = load_prompts(args.prompts, args.limit, args.seed)
    given = load_responses(args.responses, args.k) if args.responses else None
    written = load_gold(args.gold) if args.gold not in ("", "digits") else {}
    policy, tokenizer, eval_prompts = prepare(args, plan)
    prompts = encode_prompts(tokenizer, prompts, args.max_prompt_tokens)
    parts, held_out = split_prompts(prompts, args.iterations, args.n_eval, args.seed, eval_prompts)
    if given:
        parts[0], given = given_responses(policy, tokenizer, parts[0], given, args)
        alike = not args.gold or "score" not in given[0][0]
        require(alike, "--responses: they have scores, which a teacher's has not; give --gold ''")
    golds = gold_responses(policy, tokenizer, parts, written, args)
    print(f"{args.iterations} iterations x {len(parts[0])} prompts x {args.k} responses; {len(held_out)} held out")
    ranked = args.k + bool(args.gold) if args.pairs != "spin" else 0  # responses per prompt
    sampled, most = 0 if args.responses else args.k, args.k * (args.k + 1)  # most: if all pairs of K + 1 are trained on
    show_costs(policy, parts[0], held_out, eval_prompts, args, row=2, trained=most, ranked=ranked, sampled=sampled)
    if args.dry_run:
        return []
    start_run(run, args, "dno", policy)
    answers, table, earlier = [], [], []
    record(run, table, evaluate(policy, tokenizer, held_out, answers, run / "iter_0", args)[0], args)

    for iteration, prompts in enumerate(parts, 1):  # Alg. 2, line 2
        start, folder = time.perf_counter(), run / f"iter_{iteration}"
        # Alg. 2, line 3: the teacher's responses are in golds, None where there is none; line 4: K from pi_t
        seed = f"{args.seed} sample {iteration}"
        responses = sampling_stage(policy, tokenizer, prompts, seed, folder, args, given)
        # Alg. 2, line 5: rank all K + 1
        candidates = [[*row, y] if y else row for row, y in zip(responses, golds[iteration - 1], strict=True)]
        ranking_stage(prompts, candidates, folder, args)
        # Alg. 2, line 6: pairs with a large margin
        new, failed = make_pairs(prompts, candidates, args)
        if not new:
            why = ", ".join(f"{n} {rule}" for rule, n in failed.items())
            nothing = f"iteration {iteration}: no pair; of all that there are {why or 'none'}"
            require(iteration > 1, f"{nothing}; see {folder}, and try lower margins")
            print(nothing)
            break
        # Alg. 2, line 7: with some of earlier iterations; pi_t is the reference: its log-probs, before it is trained
        pairs = with_replay(new, earlier, args.replay, random.Random(f"{args.seed} replay {iteration}"))
        pairs = reference_stage(policy, pairs, folder, args)
        learning_rate, seed = args.learning_rate * args.lr_decay ** (iteration - 1), f"{args.seed} shuffle {iteration}"
        steps = train(policy, tokenizer, pairs, train_step, learning_rate, seed, folder, args)
        earlier.append(new)

        metrics, iterate_prefs = evaluate(policy, tokenizer, held_out, answers, folder, args)
        metrics |= {**late_means(steps), "pairs": len(pairs), "replayed": len(pairs) - len(new)}
        for kind in ("teacher_student", "student_teacher", "student_student"):
            metrics[kind] = sum(pair["kind"] == kind for pair in new)
        metrics["seconds"] = time.perf_counter() - start
        # Alg. 2, line 9: the best iterate on held-out prompts
        best = record(run, table, metrics, args, steps, (pairs[0], pairs[-1]))

    del policy  # the best one takes its place
    close_run(run, table, best, iterate_prefs, held_out, eval_prompts, answers, args)
    return table


if __name__ == "__main__":
    cli(main, Args, RECIPES, __doc__)
