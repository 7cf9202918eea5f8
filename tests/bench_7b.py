"""A Mistral of 7B with random weights on one GPU: speed of sampling and of an SPPO step, and the peak memory.

    python tests/bench_7b.py                                     a CUDA GPU with 80 GB, some minutes
    python tests/bench_7b.py --hidden 256 --layers 2 --pairs 4   a look at it anywhere

Sampling: `--slots` rows of K = 5 responses to prompts of 256 tokens, none of which ends before `--new_tokens`, with the
recipe's temperature and top-p; a first call is not timed, but each records its CUDA graphs. Bandwidth: bytes of
weights and of the keys and values that a step reads, over its time. Training: a step of sppo.py on `--pairs`
pairs of 256 prompt and 2 x 400 response tokens, the second of two; TFLOP/s counts 6 x parameters x tokens of both rows.
"""

import sys
import time
from pathlib import Path

import torch
from transformers import MistralConfig, MistralForCausalLM, get_constant_schedule

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common
import sppo
from measure import column, make_parser, one_step, record, synchronize


def timed(function, device):
    """(result, seconds)."""
    start = time.perf_counter()
    result = function()
    synchronize(device)
    return result, time.perf_counter() - start


def peak(device):
    """GB, on CUDA."""
    return torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else None


def in_words(gb):
    return f"{gb:.1f} GB" if gb else "not measured on a CPU"


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--new_tokens", type=int, default=256)
    parser.add_argument("--pairs", type=int, default=32)
    args = parser.parse_args()
    device = args.device
    config = MistralConfig(
        vocab_size=32000,
        hidden_size=args.hidden,
        intermediate_size=args.hidden * 7 // 2,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 128,
        num_key_value_heads=max(1, args.hidden // 512),
        sliding_window=None,
    )
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        policy = MistralForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)
    n, machine = policy.num_parameters(), torch.cuda.get_device_name() if device == "cuda" else "CPU"
    where = f"{machine}; bf16; {n / 1e9:.2f} G parameters; torch {torch.__version__}; {time.strftime('%Y-%m-%d')}"
    print(where)

    random = torch.Generator().manual_seed(0)
    prompts = torch.randint(32000, (max(1, args.slots // 5), 256), generator=random).tolist()
    settings = {"k": 5, "max_new_tokens": args.new_tokens, "eos_ids": [-1], "slots": args.slots}
    common.generate(policy, prompts, **settings)
    rows, seconds = timed(lambda: common.generate(policy, prompts, **settings), device)
    tokens = sum(len(ids) for row in rows for ids in row)
    kv = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 2
    read = 2 * n + len(prompts) * 5 * kv * (256 + args.new_tokens / 2)
    speed, gb = read * args.new_tokens / seconds / 1e9, peak(device)
    print(f"sampling   {tokens / seconds:,.0f} tokens/s, {speed:,.0f} GB/s of weights, keys and values; {in_words(gb)}")
    sampling = {"tokens/s": tokens / seconds, "GB/s": speed, "peak GB": gb}

    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    common.use_checkpointing(policy)
    optimizer = common.make_optimizer(policy, 5e-7)
    scheduler, micro_tokens = get_constant_schedule(optimizer), sppo.Args().micro_tokens
    pairs = []
    for _ in range(args.pairs):
        ids = torch.randint(32000, (256 + 800,), generator=random).tolist()
        answers = [{"ids": ids[256:656]}, {"ids": ids[656:]}]
        pairs.append({"prompt_ids": ids[:256], "responses": answers, "win_rate": [0.8, 0.2]})
    common.add_logps(policy, pairs, "ref_logps", micro_tokens)

    def loss_of(logps, micro):
        return sppo.sppo_loss(logps, column(micro, "ref_logps", logps), column(micro, "win_rate", logps), 1e3).mean(1)

    for _ in range(2):
        _, seconds = timed(lambda: one_step(policy, optimizer, scheduler, pairs, micro_tokens, loss_of), device)
    flops = 6 * n * sum(len(x["prompt_ids"]) + len(y["ids"]) for x in pairs for y in x["responses"]) / seconds / 1e12
    gb = peak(device)
    print(f"training   {args.pairs / seconds:.3g} pairs/s, {flops:,.1f} TFLOP/s; {in_words(gb)}")
    training = {"pairs/s": args.pairs / seconds, "TFLOP/s": flops, "peak GB": gb}
    record(args, where, sampling=sampling, training=training)


if __name__ == "__main__":
    main()
