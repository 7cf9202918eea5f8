"""Sr-DPO and Sr-IPO, self-refined DPO and IPO: the policy itself, behind a prompt p, says how far apart a pair is.

Yu et al. 2024, arXiv 2405.21040. DPO and IPO learn from offline pairs (x, y+, y-) and a fixed reference; they treat all
pairs alike. Here lam * Delta is taken off a pair's margin (off beta times it, in Sr-DPO), so that it has to be moved
farther where Delta > 0. Delta (eq. 12) is beta times the margin over the reference that the policy gives the pair
behind p + x: a prompt p that asks for the best of answers, put in front of the query. Sr-DPO is eq. 13 and Algorithm 1,
Sr-IPO eq. 15 and Algorithm 2; lam = 0 is DPO and IPO exactly. At lam of 1 and more, targets may run away from the
policy.

    python sr_dpo.py                     the built-in task, a minute on two CPU cores (README.md)
    python sr_dpo.py --lam 0             DPO on the same pairs; --loss sr_ipo --lam 0 is IPO
    python sr_dpo.py --compare 3         all four over three seeds, in a table
    python sr_dpo.py --model DIR --pairs FILE.jsonl    all of it your own

It writes runs/NAME/: config.json, metrics.jsonl (a line per iterate), iter_1/{pairs,steps}.jsonl, iter_1/policy/,
final/, outputs.json (its answers to the held-out prompts, or to --eval_prompts) and, with a judge, win_rates.json.

Where this file departs from the paper, or fills what it leaves open:
 1. p goes in front of the query inside the last user turn, so that chat templates stay whole. Its wording is ours:
    REFINE_PROMPTS; --refine_prompt takes any of them or your own.
 2. Log-probs are sums over tokens, EOS included, as the formulas say. TRL's IPO takes the mean over tokens instead.
 3. A response over --max_new_tokens keeps its start and has no EOS; the pair stays what the data says it is.
 4. --online, which the paper leaves to future work: pairs are sampled from the policy, best and worst by a judge, in
    each of --iterations on their own prompts; the reference is the policy that sampled them. (The measures on held-out
    pairs stay relative to the start.)
 5. On CUDA weights are bf16 with an exact float32 master; gradients are bf16, and so is RMSprop's moment, rounded
    stochastically.
"""

import math
import statistics
import time
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch.nn.functional import logsigmoid
from transformers.hf_argparser import HfArg

from common import (
    COLUMNS,
    RunArgs,
    as_response,
    attach,
    attach_ref_logps,
    check_args,
    check_run,
    cli,
    close_run,
    correlations,
    encode_prompts,
    encode_text,
    evaluate,
    is_text,
    judging_stage,
    late_means,
    load_pairs,
    micro_batches,
    number,
    prepare,
    record,
    reference_stage,
    require,
    response_logps,
    run_folder,
    sampling_stage,
    score,
    show_costs,
    split_pairs,
    stage,
    start_run,
    stop_ids,
    train,
    turn_end,
)

REFINE_PROMPTS = {  # p, by name: --refine_prompt takes one of these names, or a text of your own
    "usefulness": "Answer the query below so that its usefulness, on a scale from 1 to 100, would be rated 100, and so "
    "that the answer does no harm.\n\nQuery: ",
    "expert": "Answer the query below as an expert would: correctly, completely and to the point.\n\nQuery: ",
    "short": "The best possible answer, 100 of 100, to this query: ",
    "tiny": "100/100: ",  # what `tiny-p` knows
}


@dataclass
class Args(RunArgs):
    """The defaults are those of the built-in digits task; RECIPES below holds the paper's values for real models."""

    # model and data
    model: str = HfArg(
        default="tiny-p", help="Policy to train: a short name from the list above, a folder, or a hub id."
    )
    pairs: str = HfArg(default="digits", help="'digits' (built in), a file, or a folder or hub dataset ID[:split].")
    judge: str = HfArg(
        default="digits", help="'digits', 'pairrm' or its folder or hub id, 'llm', or a key of JUDGES; '': none."
    )
    limit: int = HfArg(default=2304, help="Use the first so many pairs; 0 means all (5,632 for digits).")
    n_eval: int = HfArg(default=512, help="Held-out prompts, one pair of each, for evaluation: at most a quarter.")
    max_prompt_tokens: int = HfArg(default=64, help="Pairs whose p + prompt is longer are left out and counted.")
    # algorithm
    loss: Literal["sr_dpo", "sr_ipo"] = HfArg(default="sr_dpo", help="Eq. 13, or eq. 15.")
    beta: float = HfArg(default=1.0, help="Regularisation of --loss sr_dpo: the higher, the closer to the reference.")
    beta_ipo: float = HfArg(default=0.05, help="The same of --loss sr_ipo, which aims at a margin of 1 / (2 beta_ipo).")
    lam: float = HfArg(default=0.3, help="Weight of the refinement; 0: DPO or IPO, on the same pairs.")
    refine_prompt: str = HfArg(default="tiny", help="p: usefulness, expert, short, tiny, or a text of your own.")
    online: bool = HfArg(default=False, help="Sample pairs from the policy and judge them, instead of those given.")
    iterations: int = HfArg(default=1, help="Rounds of sampling, judging and training with --online.")
    k: int = HfArg(default=5, help="Responses sampled per prompt with --online.")
    # sampling
    temperature: float = HfArg(default=1.0, help="Sampling temperature, for training and evaluation.")
    top_p: float = HfArg(default=1.0, help="Nucleus sampling threshold, for training and evaluation.")
    max_new_tokens: int = HfArg(default=16, help="Length at which a response is cut off and counts as unfinished.")
    # optimiser
    learning_rate: float = HfArg(default=5e-5, help="Peak learning rate of RMSprop.")
    warmup_ratio: float = HfArg(default=0.1, help="Share of the steps in which the rate rises; then it falls to 0.")
    epochs: int = HfArg(default=3, help="Passes over the pairs of an iteration.")
    batch_size: int = HfArg(default=64, help="Pairs per optimiser step; the last of an epoch may have fewer.")
    max_grad_norm: float = HfArg(default=1.0, help="Gradients are clipped to this norm.")
    # run
    compare: int = HfArg(default=0, help="Train DPO, Sr-DPO, IPO and Sr-IPO with so many seeds, and show a table.")


PAPER = {  # arXiv 2405.21040; the batch is the default; lam is chosen among 0.1, 0.3, 0.5 and 1 there, epochs are ours
    "judge": "",
    "beta": 0.1,
    "beta_ipo": 0.1,
    "limit": 0,
    "max_prompt_tokens": 512,
    "refine_prompt": "usefulness",
    "max_new_tokens": 512,
    "slots": 64,
    "learning_rate": 5e-7,
    "epochs": 1,
}
HH = {**PAPER, "pairs": "Anthropic/hh-rlhf:train"}  # the paper's start is supervised on its chosen answers first
ULTRA = {**PAPER, "pairs": "HuggingFaceH4/ultrafeedback_binarized:train_prefs"}
RECIPES = {"tiny-p": {}, "tiny": {}, "pythia-2.8b": HH, "zephyr-7b-sft": ULTRA, "other": ULTRA}

# Of --compare.
MEASURES = ["exact_match", "greedy_exact_match", "win_rate_vs_start", "accuracy", "accuracy_p", "marginal", "pearson"]
MEASURES += ["spearman", "kendall", "kl", "length", "train_seconds"]


# The maths -----------------------------------------------------------------------------------------------------------


def refinement(chosen_logps_p, rejected_logps_p, ref_chosen_logps_p, ref_rejected_logps_p, beta):
    """Delta, eq. 12 of arXiv 2405.21040: the pair's margin as the policy sees it behind p + x, times beta.

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


LOSSES = {"sr_dpo": sr_dpo_loss, "sr_ipo": sr_ipo_loss}


# Roll-out and pairs --------------------------------------------------------------------------------------------------


# Each response gets log pi_ref(y|x) and log pi_ref(y|p + x).
REFERENCES = (("ref_logps", "prompt_ids"), ("ref_logps_p", "refined_ids"))


def refine(prompt, p):
    """p + x: the messages of `prompt` with the text p in front of the last one, the query."""
    *earlier, query = prompt
    return [*earlier, {**query, "content": p + query["content"]}]


def make_pairs(policy, tokenizer, pairs, args):
    """Rows {"prompt", "prompt_ids", "refined_ids", "responses": [y+, y-]}, and "gap" where it is known, of load_pairs.

    A response over --max_new_tokens keeps its start. Left out and counted are pairs whose prompt, or p + prompt, is too
    long, and those whose responses are the same to the policy.
    """
    p = REFINE_PROMPTS.get(args.refine_prompt, args.refine_prompt)
    require(is_text(p) and p.strip(), "--refine_prompt: give a name of REFINE_PROMPTS, or a text")
    print(f"p: {p!r}" + ("" if args.refine_prompt in REFINE_PROMPTS else ", as given"))
    rows = encode_prompts(tokenizer, pairs, args.max_prompt_tokens, "--pairs")
    refined = [{"row": row, "prompt": refine(row["prompt"], p)} for row in rows]
    refined = encode_prompts(tokenizer, refined, args.max_prompt_tokens, "--pairs with --refine_prompt")
    rows = [{**both["row"], "refined_ids": both["prompt_ids"]} for both in refined]
    end = turn_end(tokenizer, stop_ids(policy, tokenizer))
    for row in rows:
        row["responses"] = []
        for text in (row.pop("chosen"), row.pop("rejected")):
            ids = [*encode_text(tokenizer, text), end]
            finished = len(ids) <= args.max_new_tokens
            row["responses"].append(as_response(ids[: args.max_new_tokens], text, finished, args))
    cut = sum(not y["finished"] for row in rows for y in row["responses"])
    if cut:
        of = f"{2 * len(rows)} responses cut by --max_new_tokens {args.max_new_tokens}"
        print(f"--pairs: {cut} of {of}: they have no end")
    kept = [row for row in rows if row["responses"][0]["ids"] != row["responses"][1]["ids"]]
    if len(kept) < len(rows):
        print(f"--pairs: {len(rows) - len(kept)} of {len(rows)} left out: equal within --max_new_tokens")
    require(kept, f"--pairs {args.pairs}: none is left; see --max_new_tokens")
    return kept


def online_pairs(policy, tokenizer, prompts, iteration, folder, args):
    """Of K samples to each prompt the best and the worst by their mean preference over all K; [] if nothing differs."""
    samples = sampling_stage(policy, tokenizer, prompts, f"{args.seed} sample {iteration}", folder, args)
    win_rate = judging_stage(prompts, samples, folder, args).mean(-1)  # (B, K)
    attach("win_rate", [y for row in samples for y in row], win_rate.flatten())
    pairs = []
    for prompt, row in zip(prompts, samples, strict=True):
        row = sorted(row, key=lambda y: -y["win_rate"])
        if row[0]["win_rate"] > row[-1]["win_rate"] and row[0]["ids"] != row[-1]["ids"]:
            known = {name: value for name, value in prompt.items() if name != "gap"}  # that of other responses
            pairs.append({**known, "responses": [row[0], row[-1]]})
    return pairs


# Train and measure ---------------------------------------------------------------------------------------------------


def train_step(policy, optimizer, scheduler, batch, args):
    """One optimiser step on `batch`, rows of make_pairs; returns means over the batch and the gradient norm."""
    rows = [(pair, response) for pair in batch for response in pair["responses"]]  # chosen, rejected, chosen, ...
    prompts, responses = [pair["prompt_ids"] for pair, _ in rows], [response["ids"] for _, response in rows]
    ref_logps = torch.tensor([response["ref_logps"] for _, response in rows], device=policy.device)
    ref_logps_p = torch.tensor([response["ref_logps_p"] for _, response in rows], device=policy.device)
    beta = args.beta if args.loss == "sr_dpo" else args.beta_ipo
    losses, deltas, log_ratio = torch.zeros(len(batch)), torch.zeros(len(batch)), torch.zeros(len(rows))
    for i in micro_batches(policy, prompts, responses, args.micro_tokens, pairs=True):
        pair, ys = [j // 2 for j in i[::2]], [responses[j] for j in i]
        delta = torch.zeros(len(pair), device=policy.device)
        if args.lam:
            with torch.no_grad():  # keeps nothing for backward
                logps_p = response_logps(policy, [rows[j][0]["refined_ids"] for j in i], ys)
            delta = refinement(*logps_p.view(-1, 2).T, *ref_logps_p[i].view(-1, 2).T, beta)  # eq. 12
        logps = response_logps(policy, [prompts[j] for j in i], ys)
        terms = (*logps.view(-1, 2).T, *ref_logps[i].view(-1, 2).T)  # chosen, rejected, of policy and of reference
        loss = LOSSES[args.loss](*terms, delta, beta, args.lam)  # eq. 13 or 15
        (loss.sum() / len(batch)).backward()  # the mean over the whole batch, however it is cut
        losses[pair], deltas[pair] = loss.detach().cpu(), delta.cpu()
        log_ratio[i] = (logps - ref_logps[i]).detach().cpu()
    grad_norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), args.max_grad_norm, error_if_nonfinite=True)
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad()
    chosen, rejected = log_ratio.view(-1, 2).mean(0).tolist()
    means = {"loss": losses.mean().item(), "delta": deltas.mean().item(), "grad_norm": grad_norm.item()}
    return {**means, "chosen_log_ratio": chosen, "rejected_log_ratio": rejected}


def measure(policy, pairs, folder, args):
    """The paper's measures on held-out pairs, relative to the start: mean margin and accuracy, behind p as well, and
    how the margin rises with "gap", where that is known and varies. A stage: margins.jsonl, a row per pair.
    """

    def margins(pairs):
        rows, columns = [(pair, y) for pair in pairs for y in pair["responses"]], []
        for name, prompt_ids in REFERENCES:
            prompts, ids = [pair[prompt_ids] for pair, _ in rows], [y["ids"] for _, y in rows]
            log_ratio = score(policy, prompts, ids, args.micro_tokens, "measuring")
            log_ratio -= torch.tensor([y[name] for _, y in rows])
            columns.append((log_ratio[::2] - log_ratio[1::2]).tolist())  # h(y+) - h(y-)
        return [{"margin": x, "margin_p": p_x} for x, p_x in zip(*columns, strict=True)]

    rows, figures = stage(folder / "margins.jsonl", pairs, margins), {}
    gaps = [pair.get("gap", math.nan) for pair in pairs]
    for suffix in ("", "_p"):
        margin = torch.tensor([row[f"margin{suffix}"] for row in rows])
        figures[f"marginal{suffix}"] = margin.mean().item()
        figures[f"accuracy{suffix}"] = (margin > 0).float().mean().item()
        if not suffix and len(set(gaps)) > 1 and all(map(math.isfinite, gaps)) and margin.std() > 0:
            figures |= correlations(margin, torch.tensor(gaps))
    return figures


# Main ----------------------------------------------------------------------------------------------------------------


def compare(args):
    """The four methods over --compare seeds, each a run of its own: prints mean and standard deviation of MEASURES."""
    require(args.lam > 0 and not args.dry_run, "--compare: wants a --lam above 0, and no --dry_run")
    require(not args.resume, "--compare: its runs are resumed one by one")
    methods = {"DPO": ("sr_dpo", 0.0), "Sr-DPO": ("sr_dpo", args.lam)}
    methods |= {"IPO": ("sr_ipo", 0.0), "Sr-IPO": ("sr_ipo", args.lam)}
    root, runs = args.name or f"compare-{time.strftime('%Y%m%d-%H%M%S')}", []
    for method, (loss, lam) in methods.items():
        for seed in range(args.seed, args.seed + args.compare):
            name = f"{root}-{method.lower()}-s{seed}"
            runs.append((method, replace(args, compare=0, loss=loss, lam=lam, seed=seed, name=name)))
    for _, one in runs:
        check_args(one)
        run_folder(one, "sr_dpo")  # all of them, before the first one
    tables = {method: [] for method in methods}
    for method, one in runs:
        tables[method].append(main(one)[-1])
    print(f"\n{'':<22}" + "".join(f"{method:>20}" for method in methods))
    for measure in [name for name in MEASURES if all(name in row for rows in tables.values() for row in rows)]:
        cells = []
        for rows in tables.values():
            values = [row[measure] for row in rows]
            error = f" ± {statistics.stdev(values):.2g}" if len(values) > 1 else ""
            cells.append(f"{number(statistics.mean(values))}{error}")
        print(f"{COLUMNS[measure]:<22}" + "".join(f"{cell:>20}" for cell in cells))
    return tables


def main(args):
    """Run Sr-DPO or Sr-IPO; returns the metrics of every iterate, the start first, of --compare those of each method.

    Raises InputError when it cannot go on.
    """
    if args.compare:
        return compare(args)
    require(args.online or args.iterations == 1, "--iterations: there is one, unless --online samples pairs for more")
    judged = args.judge or not (args.online or args.best_of)
    require(judged, "--online, --best_of: they take a --judge")
    run, plan = check_run(args, "sr_dpo", 2)  # a row to train on has a prompt and two responses
    pairs = load_pairs(args.pairs, args.limit, args.seed)
    policy, tokenizer, eval_prompts = prepare(args, plan)
    parts, held_out = split_pairs(make_pairs(policy, tokenizer, pairs, args), args, eval_prompts)
    print(f"{args.iterations} iteration(s) x {len(parts[0])} pairs; {len(held_out)} held out")
    sampled = args.k if args.online else 0
    show_costs(policy, parts[0], held_out, eval_prompts, args, row=2, trained=2, ranked=sampled, sampled=sampled)
    if args.dry_run:
        return []
    start_run(run, args, "sr_dpo", policy)
    for name, prompt_ids in REFERENCES:  # log pi_ref of x and of p + x
        attach_ref_logps(policy, held_out, args, name, prompt_ids)
    answers, table = [], []
    record(run, table, evaluate(policy, tokenizer, held_out, answers, run / "iter_0", args)[0], args)

    for iteration, pairs in enumerate(parts, 1):
        start, folder = time.perf_counter(), run / f"iter_{iteration}"
        if args.online:
            pairs = online_pairs(policy, tokenizer, pairs, iteration, folder, args)
        if not pairs:
            nothing = f"--online: no response is preferred to another in iteration {iteration}"
            require(iteration > 1, f"{nothing}; try a higher --k or --temperature")
            print(nothing)
            break
        # log pi_ref of x and of p + x, once, before the first update
        pairs = reference_stage(policy, pairs, folder, args, REFERENCES)
        # Alg. 1 or 2: eq. 13 or 15, with Delta from the policy of each step
        begun, seed = time.perf_counter(), f"{args.seed} shuffle {iteration}"
        steps = train(policy, tokenizer, pairs, train_step, args.learning_rate, seed, folder, args)
        train_seconds = time.perf_counter() - begun

        metrics, iterate_prefs = evaluate(policy, tokenizer, held_out, answers, folder, args)
        metrics |= measure(policy, held_out, folder, args)
        metrics |= {**late_means(steps), "pairs": len(pairs)}
        metrics |= {"train_seconds": train_seconds, "seconds": time.perf_counter() - start}
        best = record(run, table, metrics, args, steps)

    del policy  # the best one takes its place
    close_run(run, table, best, iterate_prefs, held_out, eval_prompts, answers, args)
    return table


if __name__ == "__main__":
    cli(main, Args, RECIPES, __doc__)
