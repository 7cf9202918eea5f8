"""What the benches share: where they ran, taking turns, the peak memory of a call, and the record."""

import argparse
import itertools
import json
import platform
import re
import shlex
import sys
import time
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch
from torch.nn.utils import clip_grad_norm_
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common

RESULTS = Path(__file__).resolve().parent / "claims" / "results"


def make_parser(description, repeats=0):
    """A command line with the flags of every bench; those without rounds have no --repeats."""
    found = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    text = "write tests/claims/results/NAME.json, or to another folder"
    found.add_argument("--record", nargs="?", const=RESULTS, type=Path, metavar="FOLDER", help=text)
    if repeats:
        found.add_argument("--repeats", type=int, default=repeats, help="rounds in which the contestants take turns")
    return found


def header(args, *packages):
    """Where, with what and when, in one line."""
    cpu = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    where = torch.cuda.get_device_name() if args.device == "cuda" else cpu
    versions = ", ".join(f"{package} {version(package)}" for package in packages if find_spec(package))
    return f"{where}; {args.dtype}; {versions}; {time.strftime('%Y-%m-%d')}; {args.repeats} rounds"


def take_turns(contestants, run, repeats):
    """{name: [run(name, round), ...]}, or why it failed; round 0 warms up and is left out."""
    results = {name: [] for name in contestants}
    for turn in range(repeats + 1):
        for name in [name for name, found in results.items() if isinstance(found, list)]:
            try:
                results[name] += [run(name, turn)][not turn :]
            except ModuleNotFoundError:
                results[name] = "not installed"
            except Exception as error:  # whatever other people's code raises here
                results[name] = f"failed: {' '.join(str(error).split())[:80] or type(error).__name__}"
    return results


def show(title, formats, results, figures):
    """Print and return the table {name: its figures, or {"reason": why it has none}}.

    formats: {column: format}; figures(name, result) -> numbers.
    """
    print(f"{title:<38}" + "".join(f"{column:>24}" for column in formats))
    table = {}
    for name, found in results.items():
        known = dict(zip(formats, figures(name, found), strict=True)) if not isinstance(found, str) else None
        cells = [f"{format(x, formats[column]):>24}" for column, x in (known or {}).items()]
        print(f"{name:<38}" + ("".join(cells) if known else found))
        table[name] = known or {"reason": found}
    return table


def timed(device, function, *inputs):
    """(seconds, result) of a call."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    start, result = time.perf_counter(), function(*inputs)
    wait()
    return time.perf_counter() - start, result


def limits(args):
    """(FLOP/s of a large product in args.dtype, bytes/s that a large copy reads and writes): the best of five here."""
    n = 8192 if args.device == "cuda" else 1024
    a = torch.randn(n, n, device=args.device).to(getattr(torch, args.dtype))
    best, (b, c) = [], (a.repeat(16, 1) for _ in range(2))
    for call, amount in ((lambda: a @ a, 2 * n**3), (lambda: b.copy_(c), 2 * b.numel() * b.itemsize)):
        call()
        best.append(amount / min(timed(args.device, call)[0] for _ in range(5)))
    print(f"here: products {best[0] / 1e12:.2f} TFLOP/s, memory {best[1] / 1e9:.0f} GB/s")
    return best


def peak_memory(device, function, *inputs):
    """Bytes of tensors at the peak of a call, beyond what was there before it."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function(*inputs)
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function(*inputs)
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(itertools.accumulate(changes, initial=0))


def cpu():
    """The name of the processor, where Linux tells it."""
    file = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", file.read_text()) if file.exists() else None
    return found[1].strip() if found else "unknown"


def rounded(value):
    """The same, with the floats in it cut to four digits."""
    return json.loads(json.dumps(value), parse_float=lambda text: float(f"{float(text):.4g}"))


def write(name, result, folder=RESULTS):
    """FOLDER/NAME.json."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(rounded(result), indent=1, ensure_ascii=False)
    (folder / f"{name}.json").write_text(f"{text}\n", encoding="utf-8")


def record(args, where, **tables):
    """With --record, write tables, as show returns them, to FOLDER/NAME.json."""
    if args.record:
        script = Path(sys.argv[0])
        command = shlex.join(["python", f"tests/{script.name}", *sys.argv[1:]])
        name = script.stem + ("_cuda" if args.device == "cuda" else "")
        write(name, {"command": command, "where": where, "cpu": cpu(), **tables}, args.record)


def random_llama(args, **more):
    """A Llama of args.size with random weights."""
    torch.manual_seed(0)
    hidden, layers, vocab = args.size
    heads = {"num_attention_heads": hidden // 64, "num_key_value_heads": hidden // 128}
    sizes = {"hidden_size": hidden, "intermediate_size": 3 * hidden, "num_hidden_layers": layers, "vocab_size": vocab}
    config = LlamaConfig(**sizes, **heads, **more)
    return LlamaForCausalLM(config).to(args.device, getattr(torch, args.dtype)).eval()


def one_step(policy, optimizer, scheduler, pairs, micro_tokens, loss_of):
    """The optimiser step of the scripts' main, without its bookkeeping: the gradient norm.

    loss_of(logps, micro) -> the loss of each pair of a micro-batch; logps (pairs, responses).
    """
    for micro in common.micro_batches(policy, pairs, micro_tokens):
        (loss_of(common.pair_logps(policy, micro), micro).sum() / len(pairs)).backward()
    grad_norm = clip_grad_norm_(policy.parameters(), 1.0, error_if_nonfinite=True)
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad()
    return grad_norm.item()


def column(micro, name, like):
    """A column of a micro-batch as a tensor beside `like`."""
    return torch.tensor([pair[name] for pair in micro], device=like.device)
