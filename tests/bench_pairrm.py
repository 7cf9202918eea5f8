"""PairRM's forward at DeBERTa-v3-large's width, random weights: ours against transformers' eager attention.

    python tests/bench_pairrm.py       five minutes on a CPU core; on a GPU all 24 layers, in float16

 * Time is of a pair; on the CPU processor seconds of one layer, as other work on the machine disturbs these less.
   Contestants take turns; ratios are the medians of the rounds'.
 * Eager reads one pair a forward, as PairRM did; ours the same, and packed: as many pairs as PairRM puts together.
 * Products alone: the linear layers of one pair, of the positions, too, and the four products of attention.
 * Memory is the peak of a forward beyond weights and inputs.
Targets: eager / packed at least 1.1 at 300 and 700 tokens and 2.3 at 2,048; on a GPU, where it has not run, 4 at
1,000 and 6 at 2,048; ours / products at most 1.6; memory at most 0.15 of eager's at 2,048.
"""

import time
from functools import partial
from operator import truediv
from statistics import median

import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer, DebertaV2Config

from measure import common, header, make_parser, peak_memory, record, show, take_turns, timed

HEADS, HIDDEN, INNER, POSITIONS = 16, 1024, 4096, 512
FORMATS = {"ms a pair": ",.1f", "eager / this": ".2f", "this / products": ".2f", "MiB": ",.0f"}


def random_pairrm(layers, device, **more):
    """A PairRMNet of this many layers, else of the real width, but for its vocabulary of 1,000; more: of its config."""
    sizes = {"hidden_size": HIDDEN, "num_hidden_layers": layers, "num_attention_heads": HEADS, "vocab_size": 1000}
    sizes |= {"intermediate_size": INNER, "type_vocab_size": 0, "position_biased_input": False, "share_att_key": True}
    sizes |= {"relative_attention": True, "position_buckets": POSITIONS // 2, "pos_att_type": ["p2c", "c2p"]}
    torch.manual_seed(0)
    config = DebertaV2Config(**sizes | more, norm_rel_ebd="layer_norm", drop_out=0.0, n_tasks=1)
    return common.PairRMNet(config).eval().to(device)


def save_pairrm(folder, other, layers, device, vocab):
    """Write a random_pairrm with this vocabulary and the tokenizer of the model in the folder `other`."""
    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.add_special_tokens({"cls_token": "[CLS]", "sep_token": "[SEP]"})
    marks = {f"{name}_prefix_id": len(tokenizer) + n for n, name in enumerate(("source", "cand1", "cand2"))}
    tokenizer.add_tokens(["<|source|>", "<|candidate1|>", "<|candidate2|>"])
    net = random_pairrm(layers, device, vocab_size=vocab, **marks)
    for part in (tokenizer, net.pretrained_model.config):
        part.save_pretrained(folder)
    save_file(net.state_dict(), folder / "model.safetensors")


def products_alone(length, layers, device):
    """A function that computes the matrix products of a pair of this length, and nothing else."""
    make = partial(torch.randn, device=device, dtype=torch.float16 if device == "cuda" else torch.float32)
    x, inner, square, wide = make(length, HIDDEN), make(length, INNER), make(HIDDEN, HIDDEN), make(HIDDEN, INNER)
    query, positions = make(HEADS, length, HIDDEN // HEADS), make(POSITIONS, HIDDEN)
    scores, table = make(HEADS, length, length), make(HEADS, length, POSITIONS)

    def run():
        for _ in range(layers):
            for _ in range(4):  # query, key, value, output
                torch.mm(x, square)
            torch.mm(torch.mm(x, wide, out=inner), wide.T)
            for _ in range(2):  # content to position and back
                torch.bmm(query, torch.mm(positions, square).view(HEADS, -1, POSITIONS), out=table)
            torch.bmm(torch.bmm(query, query.mT, out=scores), query)

    return run


def contestants(net, length, layers, device):
    """{name: (function, pairs that a call reads)}"""
    ids, n = torch.randint(5, 900, (length,), device=device), max(1, common.PAIRRM_TOKENS[device] // length)
    at, many = torch.zeros(1, 3, dtype=torch.long, device=device), ids.repeat(n)
    return {
        "transformers eager": (lambda: net.pretrained_model(ids[None], attention_mask=torch.ones_like(ids[None])), 1),
        "ours": (lambda: net(ids, [length], at), 1),
        "ours, packed": (lambda: net(many, [length] * n, at), n),
        "products alone": (products_alone(length, layers, device), 1),
    }


def compare(length, layers, args):
    """The table of the contestants at this length."""
    runs = contestants(random_pairrm(layers, args.device), length, layers, args.device)

    def seconds(name, _):
        (function, pairs), start = runs[name], time.process_time()
        wall, _ = timed(args.device, function)
        return (wall if args.device == "cuda" else time.process_time() - start) / pairs

    def figures(name, found):
        faster, over = map(truediv, times["transformers eager"], found), map(truediv, found, times["products alone"])
        return 1e3 * median(found), median(faster), median(over), peak_memory(args.device, runs[name][0]) / 2**20

    times = take_turns(runs, seconds, args.repeats)
    return show(f"{length} tokens", FORMATS, times, figures)


@torch.no_grad()
def main():
    args = make_parser(__doc__, repeats=7).parse_args()
    torch.set_num_threads(1)
    cuda = args.device == "cuda"
    args.dtype, layers, lengths = ("float16", 24, [1000, 2048]) if cuda else ("float32", 1, [300, 700, 1500, 2048])
    print(where := f"{layers} layers; {header(args, 'torch', 'transformers')}")
    with torch.autocast(args.device, torch.float16, enabled=cuda):
        tables = {f"{length} tokens": compare(length, layers, args) for length in lengths}
    record(args, where, **tables)


if __name__ == "__main__":
    main()
