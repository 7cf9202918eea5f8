"""Sampling five responses per prompt: `common.generate` against transformers' `generate` and `generate_batch`.

    python tests/bench_generate.py     five minutes on two CPU cores

The policy is a Llama with random weights: its next token is almost uniform over the vocabulary, so one id in `--mean`
as EOS gives lengths that are about exponential.
 * Spread lengths: mean `--mean`, cut at `--longest`. Ours draws them, the same in every round. `generate` takes over
   these very lengths through a stopping criterion, 8 prompts x 5 rows at a time; such a batch runs until its longest
   row ends. `generate_batch` cannot be told a length per response and draws its own from the same law.
 * Equal lengths: nothing ends a response, and each has `--mean` tokens.
Equal work: the same prompts of 16 to 64 tokens, 40 rows at a time for all, temperature 1, no top-k, no top-p. All take
turns in one process. Speed is in useful tokens, those up to the end of a response, per second; `ours / theirs` is the
median of the rounds' ratios. Occupancy is useful tokens by rows x steps of the decoding: how much of it was not idle.
The first token of a response comes from its prompt and counts for the speed alone.
Targets: 3 x `generate` at spread lengths (on CUDA 5 x) and 1.3 x at equal lengths.

`generate_batch` has a cache for 40 rows at their longest, kept from round to round; how it attends, forks and uses
CUDA graphs is left to it. With sdpa it builds a dense mask over all rows.
"""

import logging
import random
import sys
import time
from pathlib import Path
from statistics import median

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, LlamaConfig, LlamaForCausalLM, StoppingCriteria

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common
from measure import header, make_parser, reason, record

logging.getLogger("ContinuousBatchingLogger").setLevel(logging.CRITICAL)  # a missing response is noticed below
K, GROUP, PAGE = 5, 8, 32  # responses per prompt; prompts in a batch of generate; tokens in a page of generate_batch


class Lengths(StoppingCriteria):
    """Ends each row at a length of its own, which includes prompt and padding."""

    def __init__(self, lengths):
        self.lengths = lengths  # (rows,)

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids.shape[1] >= self.lengths


class Count:
    """Rows x steps of decoding, counted by a hook on the policy's body."""

    def __init__(self, policy):
        self.rows = 0
        policy.base_model.register_forward_pre_hook(self.hook, with_kwargs=True)

    def hook(self, body, args, kwargs):
        rows, new_tokens = kwargs["input_ids"].shape
        self.rows += rows * (new_tokens == 1)


def settings(longest, eos_ids):
    """Plain sampling, as transformers wants to be told."""
    plain = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "num_return_sequences": K}
    return GenerationConfig(**plain, max_new_tokens=longest, eos_token_id=eos_ids, pad_token_id=0)


def ours(policy, prompts, longest, eos_ids, lengths):
    rows = common.generate(policy, prompts, k=K, max_new_tokens=longest, eos_ids=eos_ids or [-1], slots=GROUP * K)
    lengths[:] = [[len(ids) for ids in row] for row in rows]
    return sum(map(sum, lengths))


def hf_generate(policy, prompts, longest, eos_ids, lengths):
    for i in range(0, len(prompts), GROUP):
        rows, wanted = prompts[i : i + GROUP], torch.tensor(lengths[i : i + GROUP], device=policy.device).flatten()
        width = max(map(len, rows))
        ids = torch.tensor([[0] * (width - len(row)) + row for row in rows], device=policy.device)  # left padding
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=policy.device)
        stop, plain = [Lengths(width + wanted)], settings(longest, None)
        out = policy.generate(ids, attention_mask=mask, generation_config=plain, stopping_criteria=stop)
        assert out.shape == (len(wanted), width + wanted.max()), "generate did not keep to the lengths"
    return sum(map(sum, lengths))


def hf_generate_batch(policy, prompts, longest, eos_ids, lengths):
    most = max(map(len, prompts))
    config = ContinuousBatchingConfig(
        page_size=PAGE,
        num_blocks=GROUP * K * (2 + (most + longest) // PAGE),
        max_batch_tokens=GROUP * (K + most),
        max_requests_per_batch=GROUP * K,
        seed=0,
    )
    plain = settings(longest, eos_ids)
    out = policy.generate_batch(
        prompts, generation_config=plain, continuous_batching_config=config, persistent_manager=True
    )
    assert len(out) == K * len(prompts) and not any(x.error for x in out.values()), "generate_batch lost responses"
    return sum(len(x.generated_tokens) for x in out.values())


CONTESTANTS = {"ours": ours, "transformers generate": hf_generate, "transformers generate_batch": hf_generate_batch}


def race(policy, count, prompts, longest, eos_ids, repeats):
    """All contestants on the same prompts, `repeats` rounds; prints a table and returns it."""
    speeds, occupancy, failed, lengths = {name: [] for name in CONTESTANTS}, {}, {}, []
    for turn in range(repeats + 1):
        few = prompts if turn else prompts[:GROUP]  # the first round warms up and is not timed
        for name in [name for name in CONTESTANTS if name not in failed]:
            count.rows, start = 0, time.perf_counter()
            try:
                tokens = CONTESTANTS[name](policy, few, longest, eos_ids, lengths)  # ids on the CPU: all is done
            except Exception as error:  # whatever other people's code raises here
                failed[name] = reason(error)
                continue
            if turn:
                speeds[name].append(tokens / (time.perf_counter() - start))
                decoded = tokens - K * len(few)
                # generate_batch packs all rows in one; a replayed CUDA graph passes by the hook
                occupancy[name] = decoded / count.rows if count.rows >= decoded else None
    policy.destroy_cached_continuous_batching_manager()
    flat = [length for row in lengths for length in row]
    print(f"\nlengths: mean {sum(flat) / len(flat):.1f}, longest {max(flat)}")
    print(f"{'':<30}{'tokens/s':>10}{'ours / theirs':>16}{'occupancy':>12}")
    table = {}
    for name, speed in speeds.items():
        if name in failed:
            table[name], figures = {"reason": failed[name]}, failed[name]
        else:
            ratio = median(mine / theirs for mine, theirs in zip(speeds["ours"], speed, strict=False))
            share = "-" if occupancy[name] is None else f"{occupancy[name]:.2f}"
            table[name] = {"tokens/s": median(speed), "ours / theirs": ratio, "occupancy": occupancy[name]}
            figures = f"{median(speed):>9,.0f}{ratio:>16.2f}{share:>12}"
        print(f"{name:<30}", figures)
    return table


def main():
    parser = make_parser(__doc__, repeats=3)
    parser.add_argument("--size", type=int, nargs=3, help="hidden size, layers, vocabulary of the policy, by device")
    parser.add_argument("--prompts", type=int, default=40)
    parser.add_argument("--mean", type=int, default=50)
    parser.add_argument("--longest", type=int, default=240)
    args = parser.parse_args()
    cuda = args.device == "cuda"
    args.dtype = "bfloat16" if cuda else "float32"
    hidden, layers, vocab = args.size or ((2048, 16, 32768) if cuda else (256, 4, 4096))
    torch.manual_seed(0)
    heads = {"num_attention_heads": hidden // 64, "num_key_value_heads": hidden // 128}
    sizes = {"hidden_size": hidden, "intermediate_size": 3 * hidden, "num_hidden_layers": layers, "vocab_size": vocab}
    config = LlamaConfig(**sizes, **heads, max_position_embeddings=4096, bos_token_id=None, eos_token_id=None)
    policy = LlamaForCausalLM(config).to(args.device, getattr(torch, args.dtype)).eval()
    rng = random.Random(0)
    prompts = [[rng.randrange(vocab) for _ in range(rng.randint(16, 64))] for _ in range(args.prompts)]
    where = header(args, "torch", "transformers")
    print(where)
    print(f"Llama of {policy.num_parameters() / 1e6:.1f} M: hidden {hidden}, {layers} layers, vocabulary {vocab}")
    print(f"{args.prompts} prompts x {K} responses, {GROUP * K} rows at a time")
    count = Count(policy)
    spread = race(policy, count, prompts, args.longest, list(range(vocab // args.mean)), args.repeats)
    equal = race(policy, count, prompts, args.mean, None, args.repeats)
    record(args, where, spread=spread, equal=equal)


if __name__ == "__main__":
    main()
