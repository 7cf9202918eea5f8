"""Per-token log-probs of a language model's head, forward and backward: time, error and peak memory.

    python tests/bench_logps.py        four minutes on two CPU cores; `pip install liger-kernel trl` for their rows

Equal work: from hidden (N, D), weight (V, D) and targets (N,) to log-probs (N,), and from a random g (N,), one number
per token that only backward may see, to the gradients of hidden and weight.
 * Time is given as a ratio to the three matrix products that nobody can do without: logits, and from slopes (N, V) the
   two gradients (the logits stand in for the slopes). All take turns in one process; the median of the rounds' ratios.
 * Error is the largest of any log-prob, in nats, against float64 on the same inputs.
 * Memory is the peak of a call beyond the inputs and the two gradients, as a ratio to naive. On CUDA it is
   torch.cuda.max_memory_allocated. The CPU has no such counter in torch, so it is the process's resident peak (VmHWM
   in /proc/self/status, set back before the call: Linux only) less what was resident before. This is done in a child
   process whose malloc returns freed tensors at once: kept ones would hide, or seem to be, memory of the next call.
Targets: time at most 1.05, error at most 2e-6 for float32. Its slopes, N x V in the weights' dtype, are kept for
backward: micro_batches bounds them.

Liger: the operator under its GRPO loss, and its fused cross-entropy with reduction="none". TRL: the operator under the
fused head of its DPOTrainer, and selective_log_softmax, which is given logits.
"""

import sys
import time
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common
from measure import header, make_parser, memory_in_a_child, peak_memory, reason, record, synchronize


def naive(hidden, weight, targets):
    return torch.log_softmax((hidden @ weight.T).float(), -1).gather(1, targets[:, None])[:, 0]


def torch_fused(options):
    return lambda h, w, t: -F.linear_cross_entropy(h, w, t, reduction="none", options=options)


def liger_grpo(hidden, weight, targets):
    from liger_kernel.chunked_loss.fused_linear_ppo import LigerFusedLinearPPOBase

    return LigerFusedLinearPPOBase.chunk_forward(hidden[None], weight, targets[None])[0]


def liger_cross_entropy(hidden, weight, targets):
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return -liger_fused_linear_cross_entropy(hidden, weight, targets, reduction="none")


def trl_fused(hidden, weight, targets):
    from trl.kernels import ChunkedLogProbFunction

    tile = 32768  # columns of a tile, as in TRL's trainers
    return ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, tile, None, 1.0, ("log_probs",))[0]


def trl_selective(hidden, weight, targets):
    from trl.trainer.utils import selective_log_softmax

    return selective_log_softmax((hidden @ weight.T)[None], targets[None])[0]


CONTESTANTS = {
    "naive log_softmax": naive,
    "ours": common.token_logps,
    "torch linear_cross_entropy": torch_fused(None),
    "torch linear_cross_entropy, chunked": torch_fused(torch.nn.LinearCrossEntropyOptions()),
    "Liger, from its GRPO loss": liger_grpo,
    "Liger, fused cross-entropy": liger_cross_entropy,
    "TRL, fused head": trl_fused,
    "TRL, selective_log_softmax": trl_selective,
}


def inputs(n, d, v, args):
    """hidden, weight, targets, g. The logits have standard deviation 2; the targets are drawn from their softmax."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(n, d), torch.randn(v, d) * (2 / d**0.5)
    hidden, weight = (x.to(args.device, getattr(torch, args.dtype)).requires_grad_() for x in (hidden, weight))
    with torch.no_grad():
        targets = torch.cat([(h @ weight.T).float().softmax(-1).multinomial(1)[:, 0] for h in hidden.split(64)])
    return hidden, weight, targets, torch.randn(n, device=args.device)


@torch.no_grad()
def three_products(hidden, weight):
    logits = hidden @ weight.T
    return logits @ weight, logits.T @ hidden


def forward_backward(name, hidden, weight, targets, g):
    logps = CONTESTANTS[name](hidden, weight, targets)
    torch.autograd.grad(logps, [hidden, weight], g.to(logps.dtype))
    return logps.detach()


def seconds(args, function, *inputs):
    synchronize(args.device)
    start = time.perf_counter()
    output = function(*inputs)
    synchronize(args.device)
    return time.perf_counter() - start, output


def print_time(args):
    n, d, v = args.sizes
    hidden, weight, targets, g = inputs(n, d, v, args)
    with torch.no_grad():
        wide, pieces = weight.double(), zip(hidden.split(64), targets.split(64), strict=True)
        true = torch.cat([torch.log_softmax(h.double() @ wide.T, -1).gather(1, t[:, None])[:, 0] for h, t in pieces])
    bare, ratios, errors, failed = [], {name: [] for name in CONTESTANTS}, {}, {}
    for turn in range(args.repeats + 1):  # the first one warms up and is not timed
        bare.append(seconds(args, three_products, hidden, weight)[0])
        for name in [name for name in CONTESTANTS if name not in failed]:
            try:
                took, logps = seconds(args, forward_backward, name, hidden, weight, targets, g)
            except Exception as error:  # whatever other people's code raises here
                failed[name] = reason(error)
                continue
            errors[name] = (logps.double() - true).abs().max().item()
            if turn:
                ratios[name].append(took / bare[-1])
    print(f"\nN {n}, D {d}, V {v}: three products in {1e3 * median(bare[1:]):.1f} ms")
    print(f"{'forward and backward':<38}{'time / three products':>22}{'error, nats':>14}")
    table = {}
    for name in CONTESTANTS:
        if name in failed:
            table[name], figures = {"reason": failed[name]}, failed[name]
        else:
            ratio, error = median(ratios[name]), errors[name]
            table[name] = {"time / three products": ratio, "error, nats": error}
            figures = f"{ratio:>21.2f}{error:>14.1e}"
        print(f"{name:<38}", figures)
    return table


def print_memory(args):
    n, d, v = args.memory_sizes
    given = inputs(n, d, v, args)
    gradients, extra, table = sum(x.numel() * x.itemsize for x in given[:2]), {}, {}
    print(f"\nN {n}, D {d}, V {v}")
    print(f"{'extra memory':<38}{'peak / naive':>22}{'MiB':>14}")
    for name in CONTESTANTS:
        try:
            forward_backward(name, *inputs(8, d, 64, args))  # loads libraries
            extra[name] = peak_memory(args.device, forward_backward, name, *given) - gradients
            ratio, mib = extra[name] / extra["naive log_softmax"], extra[name] / 2**20
            table[name] = {"peak / naive": ratio, "MiB": mib}
            figures = f"{ratio:>21.3f}{mib:>14.0f}"
        except Exception as error:
            figures = reason(error)
            table[name] = {"reason": figures}
        print(f"{name:<38}", figures)
    return table


def main():
    parser = make_parser(__doc__, repeats=7)
    parser.add_argument("--dtype", help="default: float32 on the CPU, bfloat16 on CUDA")
    parser.add_argument("--sizes", type=int, nargs=3, help="N D V of the first table, by device")
    parser.add_argument("--memory_sizes", type=int, nargs=3, help="N D V of the second table, by device")
    parser.add_argument("--memory_only", action="store_true", help="only the second table")
    args = parser.parse_args()
    cuda = args.device == "cuda"
    args.dtype = args.dtype or ("bfloat16" if cuda else "float32")
    args.sizes = args.sizes or ([8192, 4096, 131072] if cuda else [384, 512, 16384])
    args.memory_sizes = args.memory_sizes or ([8192, 4096, 131072] if cuda else [2048, 256, 131072])
    if args.memory_only:
        return record(args, memory=print_memory(args))
    where = header(args, "torch", "transformers", "liger_kernel", "trl")
    print(where)
    record(args, where, time=print_time(args))
    memory_in_a_child()


if __name__ == "__main__":
    main()
