"""The README's pictures, drawn with matplotlib (pip install matplotlib) from results/*.json into .github/*.svg.

    python tests/claims/pictures.py        all whose figures are there; it says which are not

Backgrounds are transparent and text is grey, so that they can be read on light and on dark pages; colours are Okabe and
Ito's, and whatever differs in colour differs in style as well. The same figures give the same bytes.
"""

import json
import sys
from pathlib import Path

import matplotlib
import torch

matplotlib.use("Agg")  # no display
import matplotlib.pyplot as plt

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))
import real_text
from games import BIASED, NASH, RESULTS, dno_exact_step, dpo_step, play, sppo_step, tensor

PICTURES = Path(__file__).resolve().parents[2] / ".github"
GREY, FAINT = "#7f8a96", "#7f8a9655"
STYLES = {  # the same in all pictures
    "DPO": {"color": "#0072B2", "linestyle": (0, (5, 1.5, 1, 1.5))},
    "SPPO": {"color": "#D55E00", "linestyle": "-"},
    "DNO": {"color": "#009E73", "linestyle": (0, (4, 3))},
    "DNO, teacher": {"color": "#E69F00", "linestyle": (0, (7, 2))},
    "Sr-DPO": {"color": "#CC79A7", "linestyle": (0, (1, 1.2))},
}
plt.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "pictures", "savefig.transparent": True})
plt.rcParams.update({"font.family": "DejaVu Sans", "font.size": 10, "axes.titlesize": 11, "legend.frameon": False})
plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "grid.color": FAINT, "text.color": GREY})
plt.rcParams.update({f"axes.{part}color": GREY for part in ("edge", "label", "title")})
plt.rcParams.update({"xtick.color": GREY, "ytick.color": GREY})


# The games -----------------------------------------------------------------------------------------------------------


def in_the_plane(pi):
    """Policies (..., 3) as points (x, y) of a triangle with paper on top, rock to the left, scissors to the right."""
    corners = tensor([0, 0], [0.5, 3**0.5 / 2], [1, 0])
    return (pi @ corners).unbind(-1)


def draw_phase(axes, results, T=1000, eta=0.25):
    """T rounds on the biased game: iterates thin, their running averages thick."""
    start = torch.log_softmax(tensor([0.5, 0.0, -0.5]), -1)
    shown = [
        ("DPO", "DPO, given pairs", lambda log_pi: dpo_step(log_pi, BIASED, 1 / eta, start.exp())),
        ("SPPO", "SPPO", lambda log_pi: sppo_step(log_pi, BIASED, eta, "half")),
        ("DNO", "DNO (exact)", lambda log_pi: dno_exact_step(log_pi, BIASED, 1 / eta)),
    ]
    axes.plot(*in_the_plane(tensor([1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 0, 0])), color=GREY, linewidth=1)
    for name, label, step in shown:
        pi = play(step, start, T)[:, 0].exp()
        means = pi.cumsum(0) / torch.arange(1, len(pi) + 1)[:, None]
        axes.plot(*in_the_plane(pi[::2]), linewidth=1, alpha=0.8, **STYLES[name])
        axes.plot(*in_the_plane(means[::2]), linewidth=3, label=label, **STYLES[name])
    axes.plot(*in_the_plane(start[0].exp()), "o", color=GREY, markersize=6, label="start")
    style = {"color": "#E69F00", "markersize": 14, "markeredgecolor": GREY, "markeredgewidth": 0.6, "label": "Nash"}
    axes.plot(*in_the_plane(NASH), "*", **style)
    names = (("only rock", (0, -14), "center"), ("only paper", (8, -2), "left"), ("only scissors", (0, -14), "center"))
    for corner, (name, offset, side) in zip(torch.eye(3, dtype=torch.float64), names, strict=True):
        axes.annotate(name, in_the_plane(corner), offset, textcoords="offset points", ha=side)
    axes.set_aspect("equal", adjustable="datalim")
    axes.axis("off")
    axes.legend(loc="upper left", bbox_to_anchor=(-0.05, 1.0), handlelength=2.6)


def draw_gap(axes, results):
    """The duality gap after T rounds: mean over starts, and from the least to the largest."""
    record = json.loads((results / "average_iterate.json").read_text())
    T, curves = record["rounds"], record["curves"]
    shown = [
        ("DPO", curves["DPO"]["last"], "DPO, given pairs", 1.6, ""),
        ("SPPO", curves["SPPO, eta / 2"]["last"], "SPPO, last iterate", 1.0, "o"),
        ("DNO", curves["exact DNO"]["last"], "DNO, last iterate", 1.0, "o"),
        ("SPPO", curves["SPPO, eta / 2"]["average"], "SPPO, average", 2.8, "s"),
        ("DNO", curves["exact DNO"]["average"], "DNO, average", 2.8, "s"),
    ]
    for name, gaps, label, width, marker in shown:
        gaps = tensor(*gaps)  # (T, starts)
        style = {"linewidth": width, "marker": marker, "markersize": 7 if name == "SPPO" else 4} | STYLES[name]
        axes.plot(T, gaps.mean(1), label=label, markerfacecolor="none" if width < 2 else None, **style)
        if name == "SPPO":  # DNO's band is the same
            axes.fill_between(T, gaps.amin(1), gaps.amax(1), color=STYLES[name]["color"], alpha=0.12, linewidth=0)
    for power, label, at in ((-0.5, "1/√T", len(T) - 1), (-1, "1/T", len(T) - 3)):
        guide = [0.16 * (t / T[0]) ** power for t in T]
        axes.plot(T, guide, color=GREY, linewidth=1, linestyle=(0, (1, 2)))
        axes.annotate(label, (T[at], guide[at]), (6, 3), textcoords="offset points")
    axes.set(xscale="log", yscale="log", ylim=(8e-4, 0.5))
    axes.set(xlabel="rounds T", ylabel="duality gap, probability (0: Nash)")
    axes.grid(linewidth=0.5)
    axes.legend(loc="lower left", fontsize=9)


def overview(results):
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 5), width_ratios=(1, 1.05))
    draw_phase(left, results)
    draw_gap(right, results)
    left.set_title("Where policies go: iterates thin, averages thick")
    right.set_title("How easily they are beaten")
    return figure


# Runs ----------------------------------------------------------------------------------------------------------------


def band(axes, x, rows, **style):
    """The mean of rows (seeds, steps) over x as a line, and their range as a band."""
    rows = tensor(*rows)
    axes.plot(x, rows.mean(0), **style)
    axes.fill_between(x, rows.amin(0), rows.amax(0), color=style["color"], alpha=0.18, linewidth=0)


def real_runs(results):
    """{method: its records, one a seed} of tests/real_text.py."""
    files = {name: sorted(results.glob(f"real_{key}_[0-9].json")) for key, name in real_text.NAMES.items()}
    found = {name: [json.loads(file.read_text()) for file in some] for name, some in files.items() if some}
    if "SPPO" not in found:
        raise FileNotFoundError(2, "no such file", str(results / "real_sppo_1.json"))
    return found


def real(results):
    """What SmolLM2-135M does by iterate, mean over seeds, with the standard error over all prompts of all seeds."""
    shown = (
        ("kept", "one instruction is followed", 64),
        ("kept of two", "two at once, never trained", 32),
        ("topic named", "the topic is named, not rewarded", 96),
    )
    figure, panels = plt.subplots(1, 3, figsize=(10, 3.4), sharey=True, layout="constrained")
    for axes, (key, title, n) in zip(panels, shown, strict=True):
        for place, (name, seeds) in enumerate(real_runs(results).items()):
            rows = tensor(*([row["unseen"][key] for row in seed["table"]] for seed in seeds))  # (seeds, iterates)
            mean, x = rows.mean(0), torch.arange(rows.shape[1]) + 0.03 * place
            error = (mean * (1 - mean) / (n * len(seeds))) ** 0.5
            seeds = f"{len(seeds)} seed" + "s" * (len(seeds) > 1)
            style = {"marker": "o", "linewidth": 2, "capsize": 3, "label": f"{name}, {seeds}", **STYLES[name]}
            axes.errorbar(x, mean, error, **style)
        axes.set(title=title, xlabel="iterate (0: base model)", ylim=(0, 1), xticks=range(3))
        axes.grid(linewidth=0.5)
    panels[0].set_ylabel("share of answers on unseen topics")
    panels[1].legend(loc="upper left", fontsize=8.5)
    return figure


def logratios(results):
    """log pi / pi_t of chosen and rejected responses: digits in the first iteration; SmolLM2-135M over all steps."""
    digits = json.loads((results / "log_ratios.json").read_text())["steps"]
    runs = real_runs(results)
    figure, panels = plt.subplots(2, 3, figsize=(10, 5.6), layout="constrained")
    for name, column in zip(("SPPO", "DNO", "DPO"), panels.T, strict=True):
        real = [seed["log_ratios"] for seed in runs.get(name, [])]
        for axes, what, seeds in zip(column, ("digits", "real model"), ([*digits[name].values()], real), strict=True):
            if not seeds:
                axes.axis("off")
                continue
            steps = min(map(len, seeds))
            rows = torch.stack([tensor(*rows[:steps]) for rows in seeds])  # (seeds, steps, 2)
            width = max(1, steps // 15)
            bins = steps // width
            means = rows[:, : bins * width].unflatten(1, (bins, width)).mean(2)  # (seeds, bins, 2)
            for i, (label, line) in enumerate((("chosen", "-"), ("rejected", "--"))):
                style = {"color": STYLES[name]["color"], "linestyle": line, "linewidth": 2, "label": label}
                band(axes, (torch.arange(bins) + 0.5) * width, means[:, :, i].tolist(), **style)
            axes.axhline(0, color=GREY, linewidth=1)
            title = f"{name}, {what}, {len(seeds)} seed" + "s" * (len(seeds) > 1)
            axes.set(xlabel=f"training step (means of {width})", title=title)
            axes.grid(linewidth=0.5)
            axes.legend(loc="best")
    for axes in panels[:, 0]:
        axes.set_ylabel("log-ratio, nats")
    return figure


def benches(results):
    """How many times faster, and in how many times less memory, than something else."""
    logps, train, pairrm = (json.loads((results / f"bench_{x}.json").read_text()) for x in ("logps", "train", "pairrm"))
    logps, train = logps["table"], train["table"]
    speed = json.loads((results / "bench_generate.json").read_text())["spread"]["transformers generate"]
    trl = min((name for name in train if name.startswith("TRL")), key=lambda name: train[name]["time / ours"])
    rows = {"an SPPO step\nagainst TRL's DPOTrainer at its best": (train, "time / ours", "ours", trl)}
    for theirs in ("TRL, fused head", "Liger, from its GRPO loss", "naive log_softmax"):
        rows[f"token_logps\nagainst {theirs}"] = logps, "time / three products", "ours", theirs
    factors = {
        label: [table[theirs][figure] / table[mine][figure] for figure in (time, "MiB")]
        for label, (table, time, mine, theirs) in rows.items()
    }
    factors["generate, lengths spread\nagainst transformers' generate"] = [speed["ours / theirs"]]
    ours, eager = (pairrm["2048 tokens"][name] for name in ("ours, packed", "transformers eager"))
    ratios = [eager[figure] / ours[figure] for figure in ("ms a pair", "MiB")]
    factors["PairRM, 2,048 tokens\nagainst transformers' eager attention"] = ratios
    figure, axes = plt.subplots(figsize=(9, 0.9 + 0.62 * len(factors)), layout="constrained")
    words = ("time", "#D55E00", "", "faster"), ("memory", "#0072B2", "///", "less memory")
    for n, (name, color, hatch, word) in enumerate(words):
        bars = [(y + 0.2 - 0.4 * n, found[n]) for y, found in enumerate(factors.values()) if n < len(found)]
        style = {"color": color, "hatch": hatch, "edgecolor": GREY, "linewidth": 0.5, "label": name}
        axes.barh([y for y, _ in bars], [x for _, x in bars], height=0.36, **style)
        for at, x in bars:
            axes.annotate(f"{x:.3g} × {word}", (x, at), (4, 0), textcoords="offset points", va="center", fontsize=9)
    axes.axvline(1, color=GREY, linewidth=1.2)
    axes.set(xscale="log", xlim=(0.5, 2.5 * max(x for found in factors.values() for x in found)))
    axes.set(xlabel="factor (1: equal), two cores of a CPU, float32")
    axes.set_xticks((0.5, 1, 2, 5, 10, 20), ("0.5", "1", "2", "5", "10", "20"))
    axes.minorticks_off()
    axes.set_yticks(range(len(factors)), list(factors), fontsize=9)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    return figure


PICTURED = {"overview": overview, "real": real, "logratios": logratios, "benches": benches}


def main(results=RESULTS, pictures=PICTURES):
    """Draw what there are figures for."""
    pictures.mkdir(exist_ok=True)
    for name, picture in PICTURED.items():
        try:
            figure = picture(results)
        except FileNotFoundError as error:
            print(f"{name}.svg: not drawn, there is no {Path(error.filename).name}")
            continue
        figure.savefig(pictures / f"{name}.svg", bbox_inches="tight", metadata={"Date": None, "Creator": None})
        plt.close(figure)


if __name__ == "__main__":
    main()
