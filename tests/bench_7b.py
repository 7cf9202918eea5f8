"""A Mistral of 7B with random weights on one CUDA GPU of 80 GB: speed of sampling and of an SPPO step, peak memory.

    python tests/bench_7b.py        some minutes; --hidden, --layers, --slots and --pairs for a smaller card

Sampling: `--slots` rows of K = 5 responses to prompts of 256 tokens, none of which ends before `--new_tokens`; a first
call is not timed. GB/s: the weights, keys and values that a step reads, over its time. Training: a step of sppo.py on
`--pairs` pairs of 256 prompt and 2 x 400 response tokens, the second of two. TFLOP/s: 6 x parameters x tokens.
"""

import json
import shutil
import time

import torch
from transformers import MistralConfig, MistralForCausalLM, get_constant_schedule

from bench_pairrm import random_pairrm
from measure import column, common, limits, make_parser, one_step, record, timed
from sppo import sppo_loss

MICRO_TOKENS = 16384


def random_mistral(args, vocab=32000, **more):
    """A Mistral of args.hidden and args.layers with random weights in bf16; more: of its config."""
    sizes = {"vocab_size": vocab, "hidden_size": args.hidden, "intermediate_size": args.hidden * 7 // 2}
    heads = {"num_attention_heads": args.hidden // 128, "num_key_value_heads": max(1, args.hidden // 512)}
    config = MistralConfig(**sizes, **heads, **more, num_hidden_layers=args.layers, sliding_window=None)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(args.device):
        policy = MistralForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)
    return policy


def save_mistral(folder, args):
    """Write a random_mistral with the tokenizer of `tiny` and more characters. Returns the number of its parameters."""
    shutil.copytree(common.MODELS["tiny"], folder, ignore=shutil.ignore_patterns("*.safetensors"))
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    known = tokenizer["model"]["vocab"]
    known |= {chr(0x3400 + i): i for i in range(len(known), args.vocab)}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    policy = random_mistral(args, args.vocab, bos_token_id=0, eos_token_id=1)
    policy.save_pretrained(folder)
    return policy.num_parameters()


def spent(function, *inputs):
    """(result, seconds, peak GB)."""
    torch.cuda.reset_peak_memory_stats()
    seconds, result = timed("cuda", function, *inputs)
    return result, seconds, torch.cuda.max_memory_allocated() / 1e9


def main():
    parser = make_parser(__doc__)
    for flag, default in {"hidden": 4096, "layers": 32, "slots": 192, "new_tokens": 256, "pairs": 32}.items():
        parser.add_argument(f"--{flag}", type=int, default=default)
    args = parser.parse_args()
    common.require(torch.cuda.is_available() and args.device == "cuda", "it wants a CUDA GPU, and there is none")
    policy = random_mistral(args)
    config = policy.config
    n, machine = policy.num_parameters(), torch.cuda.get_device_name()
    where = f"{machine}; bf16; {n / 1e9:.2f} G parameters; torch {torch.__version__}; {time.strftime('%Y-%m-%d')}"
    print(where)
    args.dtype = "bfloat16"
    flops, bandwidth = limits(args)

    random = torch.Generator().manual_seed(0)
    prompts = torch.randint(32000, (max(1, args.slots // 5), 256), generator=random).tolist()

    def sample():
        return common.generate(policy, prompts, k=5, max_new_tokens=args.new_tokens, eos_ids=[-1], slots=args.slots)

    sample()
    rows, seconds, gb = spent(sample)
    tokens = sum(len(ids) for row in rows for ids in row)
    kv = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 2
    read = 2 * n + len(prompts) * 5 * kv * (256 + args.new_tokens / 2)
    speed = read * args.new_tokens / seconds
    sampling = {"tokens/s": tokens / seconds, "GB/s": speed / 1e9, "% of it": 100 * speed / bandwidth, "peak GB": gb}
    print("sampling", *(f"{figure:,.1f} {name}" for name, figure in sampling.items()), sep="   ")

    common.use_checkpointing(policy)
    (optimizer, _), pairs = common.make_optimizer(policy, 5e-7, 0, 100), []
    for ids in torch.randint(32000, (args.pairs, 1056), generator=random).tolist():
        answers = [{"ids": ids[256:656]}, {"ids": ids[656:]}]
        pairs.append({"prompt_ids": ids[:256], "responses": answers, "win_rate": [0.8, 0.2]})
    pairs = common.add_logps(policy, pairs, "ref_logps", MICRO_TOKENS)

    def loss_of(logps, micro):
        return sppo_loss(logps, column(micro, "ref_logps", logps), column(micro, "win_rate", logps), 1e3).mean(1)

    step = policy, optimizer, get_constant_schedule(optimizer), pairs, MICRO_TOKENS, loss_of
    one_step(*step)
    _, seconds, gb = spent(one_step, *step)
    done = 6 * n * args.pairs * 2 * (256 + 400) / seconds
    training = {"pairs/s": args.pairs / seconds, "TFLOP/s": done / 1e12, "% of it": 100 * done / flops, "peak GB": gb}
    print("training", *(f"{figure:,.1f} {name}" for name, figure in training.items()), sep="   ")
    net = random_pairrm(24, args.device)
    ids, at = torch.randint(1000, (16_000,), device=args.device), 1000 * torch.arange(16, device=args.device)
    inputs = ids, [1000] * 16, at[:, None] + torch.tensor([1, 200, 600], device=args.device)
    with torch.no_grad(), torch.autocast("cuda", torch.float16):
        net(*inputs)
        _, seconds, gb = spent(net, *inputs)
    judging = {"pairs of 1,000 tokens/s": 16 / seconds, "peak GB": gb}
    print("PairRM", *(f"{figure:,.1f} {name}" for name, figure in judging.items()), sep="   ")
    record(args, where, sampling=sampling, training=training, judging=judging)


if __name__ == "__main__":
    main()
