"""Per-token log-probs of a language model's head, forward and backward: time, error and peak memory.

    python tests/bench_logps.py        a minute on two CPU cores; `pip install liger-kernel trl` for their rows

Equal work: from hidden (N, D), weight (V, D) and targets (N,) to log-probs (N,), and from a random g (N,), one number
per token that only backward may see, to the gradients of hidden and weight.
 * Time is a ratio to the three matrix products that nobody can do without: logits, and from slopes (N, V) the two
   gradients (the logits stand in for the slopes). All take turns in one process; the median of the rounds' ratios.
 * Error is the largest of any log-prob, in nats, against float64 on the same inputs.
 * Memory is the peak of a call beyond the inputs and the two gradients.
Targets: time at most 1.05, error that of naive. (In a run micro_batches bounds the N x V slopes of ours.)
"""

from statistics import median

import torch
import torch.nn.functional as F

from measure import common, header, limits, make_parser, peak_memory, record, show, take_turns, timed


def naive(hidden, weight, targets):
    logits = (hidden @ weight.T).to(torch.promote_types(hidden.dtype, torch.float32))
    return torch.log_softmax(logits, -1).gather(1, targets[:, None])[:, 0]


def torch_chunked(hidden, weight, targets):
    chunked = {"options": torch.nn.LinearCrossEntropyOptions(), "reduction": "none"}
    return -F.linear_cross_entropy(hidden, weight, targets, **chunked)


def liger_grpo(hidden, weight, targets):
    from liger_kernel.chunked_loss.fused_linear_ppo import LigerFusedLinearPPOBase

    return LigerFusedLinearPPOBase.chunk_forward(hidden[None], weight, targets[None])[0]


def trl_fused(hidden, weight, targets):
    from trl.kernels import ChunkedLogProbFunction

    more = None, targets, 1.0, 32768, None, 1.0, ("log_probs",)  # 32768 columns at a time, as in TRL's trainers
    return ChunkedLogProbFunction.apply(hidden, weight, *more)[0]


CONTESTANTS = {
    "naive log_softmax": naive,
    "ours": common.token_logps,
    "torch linear_cross_entropy, chunked": torch_chunked,
    "Liger, from its GRPO loss": liger_grpo,
    "TRL, fused head": trl_fused,
}
if not hasattr(torch.nn, "LinearCrossEntropyOptions"):  # before torch 2.13
    del CONTESTANTS["torch linear_cross_entropy, chunked"]


def inputs(n, d, v, args):
    """hidden, weight, targets, g. The logits have standard deviation 2; the targets are drawn from their softmax."""
    torch.manual_seed(0)
    pair = torch.randn(n, d), torch.randn(v, d) * (2 / d**0.5)
    hidden, weight = (x.to(args.device, getattr(torch, args.dtype)) for x in pair)
    targets = torch.cat([(h @ weight.T).float().softmax(-1).multinomial(1)[:, 0] for h in hidden.split(64)])
    return hidden.requires_grad_(), weight.requires_grad_(), targets, torch.randn(n, device=args.device)


@torch.no_grad()
def three_products(hidden, weight):
    logits = hidden @ weight.T
    return logits @ weight, logits.T @ hidden


def forward_backward(name, hidden, weight, targets, g):
    logps = CONTESTANTS[name](hidden, weight, targets)
    torch.autograd.grad(logps, [hidden, weight], g.to(logps.dtype))
    return logps.detach()


def main():
    parser = make_parser(__doc__, repeats=7)
    parser.add_argument("--sizes", type=int, nargs=3, help="N D V, by device")
    args = parser.parse_args()
    cuda = args.device == "cuda"
    args.dtype = "bfloat16" if cuda else "float32"
    n, d, v = args.sizes or ([8192, 4096, 131072] if cuda else [384, 512, 16384])
    print(where := f"N {n}, D {d}, V {v}; {header(args, 'torch', 'transformers', 'liger_kernel', 'trl')}")
    hidden, weight, targets, g = inputs(n, d, v, args)
    parts, bare = zip(hidden.split(64), targets.split(64), strict=True), {}
    with torch.no_grad():
        true = torch.cat([naive(h.double(), weight.double(), t) for h, t in parts])

    def run(name, turn):
        if turn not in bare:
            bare[turn], _ = timed(args.device, three_products, hidden, weight)
        took, logps = timed(args.device, forward_backward, name, hidden, weight, targets, g)
        peak = peak_memory(args.device, forward_backward, name, hidden, weight, targets, g)
        extra = (peak - (n + v) * d * hidden.itemsize) / 2**20
        return took / bare[turn], (logps.double() - true).abs().max().item(), extra

    flops, _ = limits(args)
    results = take_turns(CONTESTANTS, run, args.repeats)
    took = median(list(bare.values())[1:])
    print(f"three products in {1e3 * took:.1f} ms, {6 * n * d * v / took / flops:.0%} of the speed of products here")
    formats = {"time / three products": ".2f", "error, nats": ".1e", "MiB": ",.0f"}
    table = show("forward and backward", formats, results, lambda _, found: map(median, zip(*found, strict=True)))
    record(args, where, table=table)


if __name__ == "__main__":
    main()
