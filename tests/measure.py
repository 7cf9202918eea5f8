"""What the benches share: where they ran, why a row has no figures, the peak memory of a call, and the record."""

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch
from torch.nn.utils import clip_grad_norm_

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common

OPTIONAL = ("trl", "liger_kernel", "datasets")
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


def reason(error):
    """Why a row has no figures, in one line."""
    if isinstance(error, ModuleNotFoundError) and (error.name or "").split(".")[0] in OPTIONAL:
        return "not installed"
    return f"failed: {' '.join(str(error).split())[:80] or type(error).__name__}"


def synchronize(device):
    if device == "cuda":
        torch.cuda.synchronize()


def resident(field):
    """Bytes of this process in memory: now (VmRSS) or at most since the peak was set back (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def peak_memory(device, function, *inputs):
    """Bytes at the peak of a call beyond what was there before it; on the CPU Linux only, see memory_in_a_child."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function(*inputs)
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak back
    before = resident("VmRSS")
    function(*inputs)
    return resident("VmHWM") - before


def memory_in_a_child():
    """Run this command again with --memory_only, where malloc gives tensors from 1 MiB on pages of their own.

    Kept ones would hide, or seem to be, memory of the next call.
    """
    sys.stdout.flush()
    environ = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**20)}
    subprocess.run([sys.executable, *sys.argv, "--memory_only"], env=environ, check=True)


def cpu():
    """The name of the processor, where Linux tells it."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown")


def rounded(value):
    """The same, with the floats in it cut to four digits."""
    if isinstance(value, dict):
        return {name: rounded(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [rounded(inner) for inner in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def write(name, result, folder=RESULTS):
    """FOLDER/NAME.json."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(rounded(result), indent=1, ensure_ascii=False)
    (folder / f"{name}.json").write_text(f"{text}\n", encoding="utf-8")


def record(args, where=None, **tables):
    """With --record, write tables {contestant: its figures, or {"reason": why it has none}} to FOLDER/NAME.json.

    A child of memory_in_a_child, which has no `where`, adds them to what its parent has just written.
    """
    if not args.record:
        return
    script = Path(sys.argv[0])
    name = script.stem + ("_cuda" if args.device == "cuda" else "")
    if where:
        command = shlex.join(["python", f"tests/{script.name}", *sys.argv[1:]])
        found = {"command": command, "where": where, "cpu": cpu()}
    else:
        found = json.loads((args.record / f"{name}.json").read_text(encoding="utf-8"))
    write(name, {**found, **tables}, args.record)


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
