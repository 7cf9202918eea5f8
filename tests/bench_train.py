"""One optimiser step on preference pairs: the step of sppo.py's main against TRL's DPOTrainer, in time and peak memory.

    python tests/bench_train.py        three minutes on two CPU cores; `pip install trl` for its rows

Equal work: the same random Llama, the same pairs as token ids, all of them in one step, reference log-probs given (TRL:
precompute_ref_log_probs), the same loss (hard targets; TRL: sppo_hard with beta = 1 / eta), the same RMSprop, clipping
and scheduler, no checkpointing, no autocast. TRL's loss is the sum over a pair where ours is the mean, so half of its
gradient norm must be ours; the last column shows it, for the first step.
Lengths are log-normal, as in chats, at most 512 in all; prompts are 0.4 of prompt and response on average.
 * bare: the body alone, forward and backward on as many tokens as the pairs have (each prompt twice), in rows of their
   mean length: no padding, no head, no optimiser.
 * ours: sorted by length, `--micro_tokens` padded tokens at a time.
 * DPO and Sr-DPO: sr_dpo.py's step without and with the refinement, whose p has 40 tokens; its gradients are of
   other losses. Target for Sr-DPO: 1.24 times the time of DPO.
 * TRL: its training_step on what its data collator pads; all pairs at once, or `--trl_pairs` of similar length at a
   time, as gradient_accumulation_steps and train_sampling_strategy="group_by_length" would do. padding_free is left
   out: it warns and pads. On a device without Triton its head also scores prompts and padding.
All take turns in one process, after a round that warms up; ratios are medians of the rounds' ratios. `tokens` counts
what the body computes, padding included. Memory is the peak of the second step beyond weights and optimiser state; on
CUDA torch.cuda.max_memory_allocated. The CPU has no such counter in torch, so it is the process's resident peak (VmHWM
in /proc/self/status, set back before the step: Linux only) less what was resident before, in a child process whose
malloc returns freed tensors at once.
Target: twice the pairs per second of TRL's better row.
"""

import copy
import os
import random
import sys
import tempfile
import time
import warnings
from collections import Counter
from functools import cache, partial
from pathlib import Path
from statistics import median

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common
import sppo
import sr_dpo
from measure import column, header, make_parser, memory_in_a_child, one_step, peak_memory, reason, record, synchronize

ETA = 10.0
P = 40  # tokens of sr_dpo.py's p


def optimiser(policy):
    """What all contestants use: RMSprop at a rate that stays, and moves little, so that all rounds are alike."""
    optimizer = torch.optim.RMSprop(policy.parameters(), lr=1e-6)
    return optimizer, transformers.get_constant_schedule(optimizer)


def bare(policy, pairs, args):
    lengths = [len(pair["prompt_ids"]) + len(y["ids"]) for pair in pairs for y in pair["responses"]]
    mean = sum(lengths) // len(lengths)
    at_once = max(1, args.micro_tokens // mean)

    def step():
        for i in range(0, len(lengths), at_once):
            ids = torch.ones(min(at_once, len(lengths) - i), mean, dtype=torch.long, device=policy.device)
            policy.base_model(input_ids=ids, use_cache=False).last_hidden_state.sum().backward()
        policy.zero_grad()

    return step


def ours(policy, pairs, args):
    common.add_logps(policy, pairs, "ref_logps", args.micro_tokens)
    optimizer, scheduler = optimiser(policy)

    def loss_of(logps, micro):
        return sppo.sppo_loss(logps, column(micro, "ref_logps", logps), column(micro, "win_rate", logps), ETA).mean(1)

    return lambda: one_step(policy, optimizer, scheduler, pairs, args.micro_tokens, loss_of)


def refined(lam):
    def build(policy, pairs, args):
        pairs = [{**pair, "refined_ids": [7] * P + pair["prompt_ids"]} for pair in pairs]
        sr_dpo.add_both(policy, pairs, "ref_logps", args)
        optimizer, scheduler = optimiser(policy)

        def loss_of(logps, micro):
            delta = torch.zeros(len(micro), device=logps.device)
            if lam:
                with torch.no_grad():
                    logps_p = common.pair_logps(policy, micro, "refined_ids")
                delta = sr_dpo.refinement(*logps_p.T, *column(micro, "ref_logps_p", logps).T, 0.1)
            return sr_dpo.sr_dpo_loss(*logps.T, *column(micro, "ref_logps", logps).T, delta, 0.1, lam)

        # its loss is another one, and so is its gradient
        return lambda: one_step(policy, optimizer, scheduler, pairs, args.micro_tokens, loss_of) and None

    return build


def trl(few):
    def build(policy, pairs, args):
        import datasets
        from trl import DPOConfig, DPOTrainer

        datasets.disable_progress_bars()
        os.environ["TQDM_DISABLE"] = "1"
        warnings.simplefilter("ignore", FutureWarning)
        optimizer, scheduler = optimiser(policy)
        n = args.trl_pairs if few else len(pairs)
        loss = {"loss_type": ["sppo_hard"], "beta": 1 / ETA, "precompute_ref_log_probs": True, "max_length": None}
        plain = {"gradient_checkpointing": False, "bf16": False, "report_to": "none", "use_cpu": args.device == "cpu"}
        config = DPOConfig(tempfile.gettempdir(), **loss, **plain, per_device_train_batch_size=n)  # nothing is saved
        given = {"train_dataset": datasets.Dataset.from_list([pair["text"] for pair in pairs])}
        given |= {"processing_class": tokenizer_of_tiny(), "optimizers": (optimizer, scheduler)}
        trainer = DPOTrainer(policy, args=config, **given)
        rows = list(trainer.train_dataset)  # token ids and reference log-probs
        if few:
            rows.sort(key=lambda row: len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"])))
        parts = [rows[i : i + n] for i in range(0, len(rows), n)]
        trainer.current_gradient_accumulation_steps = len(parts)

        def step():
            for part in parts:
                trainer.training_step(policy, trainer.data_collator(part))
            norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            return norm.item() / 2

        return step

    return build


CONTESTANTS = {
    "bare": bare,
    "ours": ours,
    "DPO of sr_dpo.py": refined(0.0),
    "Sr-DPO of sr_dpo.py": refined(0.3),
    "TRL, all pairs at once": trl(few=False),
    "TRL, a few, by length": trl(few=True),
}


@cache
def tokenizer_of_tiny():
    """A character a token."""
    folder = common.make_tiny(Path(tempfile.mkdtemp()) / "tiny", steps=1)
    return transformers.AutoTokenizer.from_pretrained(folder)


def inputs(args):
    """The policy and the pairs, as rows of sppo.make_pairs; TRL reads their text, one token a character."""
    torch.manual_seed(0)
    hidden, layers, vocab = args.size
    heads = {"num_attention_heads": hidden // 64, "num_key_value_heads": hidden // 128}
    sizes = {"hidden_size": hidden, "intermediate_size": 3 * hidden, "num_hidden_layers": layers, "vocab_size": vocab}
    policy = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads))
    policy.to(args.device, getattr(torch, args.dtype)).eval()
    rng, tokenizer, pairs = random.Random(0), tokenizer_of_tiny(), []

    def text(median_length, longest):
        n = min(longest, max(8, round(median_length * rng.lognormvariate(0, 0.6))))
        return "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=n))

    for _ in range(args.pairs):
        prompt, chosen, rejected = text(82, 200), text(130, 310), text(130, 310)  # and EOS: at most 511
        ids = [tokenizer(x).input_ids for x in (prompt, f"{chosen}</s>", f"{rejected}</s>")]
        responses = [{"ids": y} for y in ids[1:]]
        strings = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
        pairs.append({"prompt_ids": ids[0], "responses": responses, "win_rate": [1.0, 0.0], "text": strings})
    return policy, pairs


def count(tokens, name, body, args, kwargs):
    tokens[name] += kwargs["input_ids"].numel()


def print_memory(args):
    policy, pairs = inputs(args)
    print(f"\n{'memory of a step':<24}{'MiB':>15}{'by ours':>15}")
    ours, table = None, {}
    for name, build in CONTESTANTS.items():
        try:
            step = build(copy.deepcopy(policy), pairs, args)
            step()  # loads libraries, makes the optimiser's state
            peak = peak_memory(args.device, step)
            ours = peak if name == "ours" else ours
            table[name] = {"MiB": peak / 2**20, "by ours": peak / ours if ours else None}
            figures = f"{peak / 2**20:>14,.0f}" + (f"{peak / ours:>15.2f}" if ours else "")
        except Exception as error:
            figures = reason(error)
            table[name] = {"reason": figures}
        print(f"{name:<24}", figures)
    return table


def print_time(args):
    policy, pairs = inputs(args)
    lengths = [(len(pair["prompt_ids"]), len(y["ids"])) for pair in pairs for y in pair["responses"]]
    share = sum(x / (x + y) for x, y in lengths) / len(lengths)
    print(f"Llama of {policy.num_parameters() / 1e6:.1f} M: hidden size, layers, vocabulary {args.size}")
    print(f"{len(pairs)} pairs of {sum(map(sum, lengths)):,} tokens; prompts are {share:.2f} of a row")
    print(f"at a time: {args.micro_tokens} tokens of ours, {args.trl_pairs} pairs of TRL\n")
    steps, failed, first, tokens, seconds = {}, {}, {}, Counter(), {name: [] for name in CONTESTANTS}
    for turn in range(args.repeats + 1):  # the first one warms up and is not timed
        for name in [name for name in CONTESTANTS if name not in failed]:
            try:
                if not turn:
                    mine = copy.deepcopy(policy)
                    steps[name] = CONTESTANTS[name](mine, pairs, args)
                    mine.base_model.register_forward_pre_hook(partial(count, tokens, name), with_kwargs=True)
                synchronize(args.device)
                start = time.perf_counter()
                norm = steps[name]()
                synchronize(args.device)
            except Exception as error:  # whatever other people's code raises here
                failed[name] = reason(error)
                continue
            if turn:
                seconds[name].append(time.perf_counter() - start)
            else:
                first[name] = (norm, tokens[name])
    others = {"time / bare": "bare", "time / ours": "ours", "time / DPO": "DPO of sr_dpo.py"}
    table = {}
    print(f"{'':<24}", *(f"{title:>15}" for title in ["pairs/s", *others, "tokens / bare", "gradient norm"]), sep="")
    for name, took in seconds.items():
        if name in failed:
            table[name] = {"reason": failed[name]}
            print(f"{name:<24} {failed[name]}")
            continue
        table[name] = {"pairs/s": len(pairs) / median(took)}
        for title, other in others.items():
            table[name][title] = median(x / y for x, y in zip(took, seconds[other], strict=True))
        norm, computed = first[name]
        table[name]["tokens / bare"] = computed / first["bare"][1]
        cells = [f"{figure:>15.2f}" for figure in table[name].values()]
        table[name]["gradient norm"] = norm
        print(f"{name:<24}", *cells, f"{norm:>15.3f}" if norm else "", sep="")
    return table


def main():
    parser = make_parser(__doc__, repeats=3)
    parser.add_argument("--size", type=int, nargs=3, help="hidden size, layers, vocabulary of the policy, by device")
    parser.add_argument("--pairs", type=int, default=16, help="pairs in a step")
    parser.add_argument("--micro_tokens", type=int, help="padded tokens in a forward of ours, by device")
    parser.add_argument("--trl_pairs", type=int, help="pairs in a forward of TRL, by device; divides --pairs")
    parser.add_argument("--memory_only", action="store_true", help="only the second table")
    args = parser.parse_args()
    cuda = args.device == "cuda"
    args.dtype = "bfloat16" if cuda else "float32"
    args.size = args.size or ([2048, 16, 32768] if cuda else [256, 4, 8192])
    args.micro_tokens = args.micro_tokens or (8192 if cuda else 2048)
    args.trl_pairs = args.trl_pairs or (8 if cuda else 4)
    if args.memory_only:
        return record(args, memory=print_memory(args))
    where = header(args, "torch", "transformers", "trl")
    print(where)
    record(args, where, time=print_time(args))
    memory_in_a_child()


if __name__ == "__main__":
    main()
