"""One optimiser step on preference pairs: the step of sppo.py's main against TRL's DPOTrainer, in time and peak memory.

    python tests/bench_train.py        three minutes on two CPU cores; `pip install trl` for its rows

Equal work: the same random Llama, the same pairs as token ids, all of them in one step, reference log-probs given, the
same loss (hard targets; TRL: sppo_hard with beta = 1 / eta), the same RMSprop, clipping and scheduler. TRL's loss is
the sum over a pair where ours is the mean, so half of its gradient norm must be ours. Lengths are log-normal, as in
chats, at most 512 in all; prompts are 0.4 of prompt and response on average.
 * ours: sorted by length, at most 2,048 padded tokens at a time (CUDA: 8,192).
 * DPO and Sr-DPO: the step of sr_dpo.py without and with the refinement, whose p has 40 tokens. Target: 1.24 times.
 * TRL: its training_step on what its data collator pads; all pairs at once, or 4 (CUDA: 8) of similar length, as
   gradient_accumulation_steps and train_sampling_strategy="group_by_length" would do. padding_free is left out: it
   warns and pads. On a device without Triton its head also scores prompts and padding.
All take turns; ratios are medians of the rounds' ratios. Memory is the peak of a step beyond weights and optimiser
state. Target: twice the pairs per second of TRL's better row.
"""

import copy
import os
import random
import tempfile
import warnings
from functools import cache, partial
from statistics import median

import torch
import transformers

import measure
from measure import column, common, one_step
from sppo import sppo_loss
from sr_dpo import add_both, refinement, sr_dpo_loss

ETA, BETA, P = 10.0, 0.1, 40  # P: tokens of sr_dpo.py's p


def optimiser(policy):
    optimizer = torch.optim.RMSprop(policy.parameters(), lr=1e-6)  # a rate that moves little: all rounds are alike
    return optimizer, transformers.get_constant_schedule(optimizer)


def ours(policy, pairs, args):
    pairs = common.add_logps(policy, pairs, "ref_logps", args.micro_tokens)

    def loss_of(logps, micro):
        return sppo_loss(logps, column(micro, "ref_logps", logps), column(micro, "win_rate", logps), ETA).mean(1)

    return partial(one_step, policy, *optimiser(policy), pairs, args.micro_tokens, loss_of)


def refined(policy, pairs, args, lam=0.3):
    pairs = [{**pair, "refined_ids": [7] * P + pair["prompt_ids"]} for pair in pairs]
    pairs = add_both(policy, pairs, "ref_logps", args)

    def loss_of(logps, micro):
        delta = torch.zeros(len(micro), device=logps.device)
        if lam:
            with torch.no_grad():
                logps_p = common.pair_logps(policy, micro, "refined_ids")
            delta = refinement(*logps_p.T, *column(micro, "ref_logps_p", logps).T, BETA)
        return sr_dpo_loss(*logps.T, *column(micro, "ref_logps", logps).T, delta, BETA, lam)

    return partial(one_step, policy, *optimiser(policy), pairs, args.micro_tokens, loss_of)


def trl(policy, pairs, args, few=False):
    import datasets
    from trl import DPOConfig, DPOTrainer

    datasets.disable_progress_bars()
    os.environ["TQDM_DISABLE"] = "1"
    warnings.simplefilter("ignore", FutureWarning)
    n, (optimizer, scheduler) = args.trl_pairs if few else len(pairs), optimiser(policy)
    loss = {"loss_type": ["sppo_hard"], "beta": 1 / ETA, "precompute_ref_log_probs": True, "max_length": None}
    plain = {"gradient_checkpointing": False, "bf16": False, "report_to": "none", "use_cpu": args.device == "cpu"}
    config = DPOConfig(tempfile.gettempdir(), **loss, **plain, per_device_train_batch_size=n)  # nothing is saved
    given = {"processing_class": letters(), "optimizers": (optimizer, scheduler), "args": config}
    trainer = DPOTrainer(policy, train_dataset=datasets.Dataset.from_list([pair["text"] for pair in pairs]), **given)
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


CONTESTANTS = {"ours": ours, "DPO of sr_dpo.py": partial(refined, lam=0.0), "Sr-DPO of sr_dpo.py": refined}
CONTESTANTS |= {"TRL, all pairs at once": trl, "TRL, a few, by length": partial(trl, few=True)}


@cache
def letters():
    """The tokenizer of `tiny`: a character a token."""
    return transformers.AutoTokenizer.from_pretrained(common.MODELS["tiny"])


def inputs():
    """16 pairs, as rows of sppo.make_pairs; TRL reads their text."""
    rng, pairs = random.Random(0), []

    def text(middle, longest):
        n = min(longest, max(8, round(middle * rng.lognormvariate(0, 0.6))))
        return "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=n))

    for _ in range(16):
        strings = {"prompt": text(82, 200), "chosen": text(130, 310), "rejected": text(130, 310)}  # and EOS: to 511
        x, *ys = (letters()(y + "</s>" * (name != "prompt")).input_ids for name, y in strings.items())
        pairs += [{"prompt_ids": x, "responses": [{"ids": y} for y in ys], "win_rate": [1.0, 0.0], "text": strings}]
    return pairs


def main():
    parser = measure.make_parser(__doc__, repeats=3)
    parser.add_argument("--size", type=int, nargs=3, help="hidden size, layers, vocabulary of the policy, by device")
    args = parser.parse_args()
    cuda = args.device == "cuda"
    args.dtype, args.micro_tokens, args.trl_pairs = ("bfloat16", 8192, 8) if cuda else ("float32", 2048, 4)
    args.size = args.size or ([2048, 16, 32768] if cuda else [256, 4, 8192])
    print(where := measure.header(args, "torch", "transformers", "trl"))
    policy, pairs, steps, norms = measure.random_llama(args), inputs(), {}, {}

    def run(name, turn):
        if not turn:
            steps[name] = CONTESTANTS[name](copy.deepcopy(policy), pairs, args)
        took, norm = measure.timed(args.device, steps[name])
        norms.setdefault(name, norm)  # of the first step
        return took, measure.peak_memory(args.device, steps[name])

    def figures(name, rounds):
        took, peaks = zip(*rounds, strict=True)
        others = results["ours"], results["DPO of sr_dpo.py"]
        ratios = [median(x / y for x, (y, _) in zip(took, other, strict=True)) for other in others]
        return len(pairs) / median(took), *ratios, median(peaks) / 2**20, norms[name]

    flops, _ = measure.limits(args)
    tokens = sum(len(pair["prompt_ids"]) + len(y["ids"]) for pair in pairs for y in pair["responses"])
    results = measure.take_turns(CONTESTANTS, run, args.repeats)
    speed = 6 * policy.num_parameters() * tokens / median(took for took, _ in results["ours"])
    print(f"ours: {speed / flops:.0%} of the speed of products here, counting 6 x parameters x unpadded tokens")
    formats = {"pairs/s": ".2f", "time / ours": ".2f", "time / DPO": ".2f", "MiB": ",.0f", "gradient norm": ".3f"}
    measure.record(args, where, table=measure.show("a step", formats, results, figures))


if __name__ == "__main__":
    main()
