"""Sampling five responses per prompt: `common.generate` against transformers' `generate`.

    python tests/bench_generate.py     five minutes on two CPU cores

The policy is a Llama with random weights: its next token is almost uniform over the vocabulary, so one id in `--mean`
as EOS gives lengths that are about exponential.
 * Spread lengths: mean `--mean`, cut at `--longest`. Ours draws them, the same in every round. `generate` takes over
   these very lengths through a stopping criterion, 8 prompts x 5 rows at a time; such a batch runs until its longest
   row ends.
 * Equal lengths: nothing ends a response, and each has `--mean` tokens.
Equal work: the same prompts of 16 to 64 tokens, 40 rows at a time for all, temperature 1, no top-k, no top-p. All take
turns in one process. Speed is in useful tokens, those up to the end of a response, per second; `ours / theirs` is the
median of the rounds' ratios. Targets: 3 x `generate` at spread lengths (on CUDA 5 x) and 1.3 x at equal lengths.
"""

import random
import time
from statistics import median

import torch
from transformers import GenerationConfig

from measure import common, header, limits, make_parser, random_llama, record, show, take_turns

K, GROUP = 5, 8  # responses per prompt; prompts in a batch of generate


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
        stop = [lambda ids, scores, lengths=width + wanted, **more: ids.shape[1] >= lengths]
        plain = settings(longest, None)
        out = policy.generate(ids, attention_mask=mask, generation_config=plain, stopping_criteria=stop)
        assert out.shape == (len(wanted), width + wanted.max()), "generate did not keep to the lengths"
    return sum(map(sum, lengths))


CONTESTANTS = {"ours": ours, "transformers generate": hf_generate}


def race(policy, prompts, longest, eos_ids, repeats, bandwidth):
    """All contestants on the same prompts, `repeats` rounds; prints a table and returns it."""
    lengths = []

    def run(name, turn):
        few, start = prompts if turn else prompts[:GROUP], time.perf_counter()
        return CONTESTANTS[name](policy, few, longest, eos_ids, lengths) / (time.perf_counter() - start)

    results = take_turns(CONTESTANTS, run, repeats)  # tokens/s
    flat = [length for row in lengths for length in row]
    print(f"\nlengths: mean {sum(flat) / len(flat):.1f}, longest {max(flat)}")

    c, size = policy.config, policy.dtype.itemsize
    row = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * size * (40 + sum(flat) / len(flat) / 2)
    read = policy.num_parameters() * size / (GROUP * K) + row  # bytes a token, were all rows busy

    def figures(name, speeds):
        ratio = median(mine / theirs for mine, theirs in zip(results["ours"], speeds, strict=True))
        return median(speeds), ratio, median(speeds) * read / bandwidth

    return show("", {"tokens/s": ",.0f", "ours / theirs": ".2f", "of the bandwidth": ".1%"}, results, figures)


def main():
    parser = make_parser(__doc__, repeats=3)
    parser.add_argument("--size", type=int, nargs=3, help="hidden size, layers, vocabulary of the policy, by device")
    for name, default in {"prompts": 40, "mean": 50, "longest": 240}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    cuda = args.device == "cuda"
    args.dtype = "bfloat16" if cuda else "float32"
    hidden, layers, vocab = args.size = args.size or ((2048, 16, 32768) if cuda else (256, 4, 4096))
    policy = random_llama(args, max_position_embeddings=4096, bos_token_id=None, eos_token_id=None)
    rng = random.Random(0)
    prompts = [[rng.randrange(vocab) for _ in range(rng.randint(16, 64))] for _ in range(args.prompts)]
    print(where := header(args, "torch", "transformers"))
    print(f"Llama of {policy.num_parameters() / 1e6:.1f} M: hidden {hidden}, {layers} layers, vocabulary {vocab}")
    print(f"{args.prompts} prompts x {K} responses, {GROUP * K} rows at a time")
    _, bandwidth = limits(args)
    spread = race(policy, prompts, args.longest, list(range(vocab // args.mean)), args.repeats, bandwidth)
    equal = race(policy, prompts, args.mean, None, args.repeats, bandwidth)
    record(args, where, spread=spread, equal=equal)


if __name__ == "__main__":
    main()
