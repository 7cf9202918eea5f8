"""What the README says of the code is true: equations, line counts, commands, flags, files."""

import ast
import importlib
import inspect
import json
import re
import shlex
from statistics import mean, stdev

import pytest
from conftest import ROOT

import common
import dno
import sppo
import sr_dpo

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
SCRIPTS = {"sppo.py": sppo, "dno.py": dno, "sr_dpo.py": sr_dpo}


def table_rows(title):
    """Cells of the first table under a heading."""
    part = TEXT.split(f"\n## {title}\n")[1].split("\n## ")[0]
    lines = re.search(r"(?:^\|.*\n)+", part, re.M)[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]


EQUATIONS = table_rows("The equations in the code")


def names_in(file):
    tree = ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("row", EQUATIONS, ids=lambda row: row[0])
def test_each_equation_stands_in_its_function_and_its_test_exists(row):
    where, _, functions, tests = row
    numbers = re.findall(r"eq\. [0-9.]+|Alg\. [0-9], line [0-9]", where)
    assert numbers
    names = re.findall(r"`(\w+)\.(\w+)`", functions)
    assert names
    for script, function in names:
        source = inspect.getsource(getattr(importlib.import_module(script), function)).replace("Algorithm ", "Alg. ")
        for number in numbers:
            assert number in source, f"{script}.{function} does not say {number}"
    for name in re.findall(r"`(test_\w+)`", tests):
        files = [file.name for file in (ROOT / "tests").glob("test_*.py") if name in names_in(file.name)]
        assert files, f"there is no {name}"


def test_every_equation_number_in_the_scripts_is_in_the_map():
    mapped = " ".join(row[0] for row in EQUATIONS)
    for script in ("sppo", "dno", "sr_dpo"):
        for number in set(re.findall(r"eq\. \d+(?:\.\d+)?", (ROOT / f"{script}.py").read_text(encoding="utf-8"))):
            assert number in mapped, f"{number} of {script}.py"


def test_line_counts():
    for file, lines in re.findall(r"^\| \[([\w.]+)\]\(\1\) \|.*\| ([\d,]+) \|", TEXT, re.M):
        assert int(lines.replace(",", "")) == len((ROOT / file).read_text(encoding="utf-8").splitlines()), file


def commands():
    """(script, its words) of every command of a script in the README, in blocks and within sentences."""
    text = TEXT.replace("\\\n", " ")
    found = re.findall(r"(?:^|`)python ((?:sppo|dno|sr_dpo)\.py(?: [^`\n&#]*)?)", text, re.M)
    return sorted({tuple(shlex.split(line)) for line in found})


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_every_command_is_one_that_the_script_takes(command, capsys, tmp_path, monkeypatch):
    file, *flags = command
    script, called = SCRIPTS[file], []

    def main(args):
        called.append(args)

    if "--resume" in flags:  # wants a run
        monkeypatch.chdir(tmp_path)
        begun = {**vars(script.Args()), "script": "test_readme", "versions": {}}
        common.write_json(tmp_path / "runs" / "NAME" / "config.json", begun)
    if "--help" in flags:
        with pytest.raises(SystemExit) as stopped:
            common.cli(main, script.Args, script.RECIPES, script.__doc__, flags)
        assert stopped.value.code == 0
        return
    common.cli(main, script.Args, script.RECIPES, script.__doc__, flags)
    common.check_args(called[0])


def test_every_flag_that_is_named_exists():
    known = {f"--{name}" for script in SCRIPTS.values() for name in script.Args.__dataclass_fields__} | {"--help"}
    theirs = {"--record", "--repeats", "--device", "--seeds", "--epochs", "--limit"}  # of commands in tests/
    for flag in set(re.findall(r"(?<![\w-])--[a-z_0-9]+", TEXT)):
        assert flag in known | theirs, flag


def test_every_file_that_is_named_or_shown_exists():
    for path in re.findall(
        r"(?:python |\]\(|src=\"|srcset=\")((?:tests/|\.github/|common|dno|sppo|sr_dpo)[\w./-]*)", TEXT
    ):
        assert (ROOT / path).exists(), path


def test_no_line_of_prose_is_too_long():
    for line in TEXT.splitlines():
        assert len(line) <= 120 or line.startswith(("|", " ", "iterate", "http", "<")), line[:60]


CLAIMS = [row for row in table_rows("Claims of the papers, in small") if row[0].startswith("`")]


@pytest.mark.parametrize("row", CLAIMS, ids=lambda row: row[0])
def test_each_claim_has_the_verdict_that_was_recorded(row):
    name = row[0].strip("`")
    found = record(name)
    assert found["verdict"] == row[3]
    file = re.search(r"tests/claims/\w+\.py", found["command"])[0]
    assert f'"{name}"' in (ROOT / file).read_text() or f"def {name}(" in (ROOT / file).read_text(), found["command"]


def test_no_claim_is_passed_over():
    recorded = {file.stem for file in (ROOT / "tests" / "claims" / "results").glob("*.json")}
    assert recorded - {row[0].strip("`") for row in CLAIMS} <= {
        "default",
        "compare",
        "low_eta",
        "real_text",
        "bench_logps",
        "bench_generate",
        "bench_train",
    }


def record(name):
    return json.loads((ROOT / "tests" / "claims" / "results" / f"{name}.json").read_text(encoding="utf-8"))


def numbers(value):
    """All numbers in a record, the mean and standard deviation of each list of them, and all of these in percent."""
    if isinstance(value, dict):
        value = list(value.values())
    if not isinstance(value, list):
        return [float(value)] if type(value) in (int, float) else []
    found = [number for inner in value for number in numbers(inner)]
    if len(value) > 1 and all(type(inner) in (int, float) for inner in value):
        found += [mean(value), stdev(value), 100 * mean(value), 100 * stdev(value)]
    return found


def assert_recorded(text, value, elsewhere=()):
    """Every decimal number in `text` is one of `value`'s, rounded; but those that are `elsewhere`."""
    known = numbers(value)
    for number in set(re.findall(r"\d+\.\d+", text)) - {*elsewhere}:
        unit = 10.0 ** -len(number.partition(".")[2])
        near = any(abs(abs(x) - float(number)) < 0.51 * unit for x in known)  # records are rounded themselves
        assert near, f"{number} is not in the record"


@pytest.mark.parametrize("row", CLAIMS, ids=lambda row: row[0])
def test_the_figures_of_a_claim_are_those_that_were_recorded(row):
    name, found = row[0].strip("`"), record(row[0].strip("`"))
    kept = {key: value for key, value in found.items() if key in ("figures", "comparisons", "parts", "median_ratio")}
    pairs = [one["figures"] for one in (kept,) if name == "targets"]  # its ± is that of differences by seed
    kept["differences"] = [
        [b - a for a, b in zip(*(of["wins vs start"] for of in figures.values()), strict=True)] for figures in pairs
    ]
    assert_recorded(row[2], kept, elsewhere={"1.29"} if name == "sr_cost" else ())  # the table of the benches has it


def test_the_table_of_the_default_jobs_is_the_record():
    part = TEXT.split("\n## Results\n")[1]
    for script, seeds in record("default")["runs"].items():
        for seed, table in seeds.items():
            start, last = table[0], table[-1]
            cells = [
                f"`{script}.py`",
                seed,
                *(f"{start[x]:.3f} → {last[x]:.3f}" for x in ("exact_match", "greedy_exact_match")),
            ]
            cells += [f"{last['win_rate_vs_start']:.3f} ± {last['win_rate_vs_start_se']:.3f}"]
            assert f"| {' | '.join(cells)} | {sum(row.get('seconds', 0) for row in table):.0f} |" in part


def test_the_output_that_is_shown_is_the_record(capsys):
    table = record("default")["runs"]["sppo"]["1"]
    common.show_table(table, 3)
    shown = TEXT.split("`python sppo.py` prints\n\n```\n")[1].split("\n\niterate beats")[0]
    assert [line.split() for line in shown.splitlines()] == [
        line.split() for line in capsys.readouterr().out.split("\n")[1:6]
    ]


def test_the_output_of_compare_is_the_record():
    figures = record("compare")["figures"]
    shown = TEXT.split("Sr-IPO\n")[1].split("\n```")[0]
    for line in shown.splitlines():
        name = next(name for name, title in common.COLUMNS.items() if title == line[:22].strip())
        cells = [f"{common.number(mean(of[name]))} ± {stdev(of[name]):.2g}" for of in figures.values()]
        assert re.split(r"  +", line[22:].strip()) == cells, name


def test_other_figures_are_recorded():
    eta = TEXT.split("learning_rate 2e-4`,")[1].split("Hence")[0]
    assert_recorded(eta, record("low_eta")["figures"])
    text = TEXT.split("On real text, ")[1].split("## ")[0]
    assert_recorded(text, record("real_text"), elsewhere={"2.6"})  # million parameters


def test_memory_and_disk_of_a_7b_run_are_those_of_the_plan():
    args = sppo.Args(model="mistral-7b", **sppo.RECIPES["mistral-7b"])
    plan = common.plan_run(args, "cuda", 2, memory=int(0.95 * 80e9))
    training = plan["stages"]["training"]
    text = " ".join(TEXT.split())
    for words, size in (("weights", "weights"), ("the master's other half", "master"), ("gradients", "gradients")):
        assert re.search(rf"{words} {training[size] / 1e9:.1f}\b", text)
    assert f"RMSprop's moment {training['moments'] / 1e9:.1f};" in text
    assert f"the plan says {max(sum(s.values()) for s in plan['stages'].values()) / 1e9:.0f} GB" in text
    assert f"{plan['disk'] / 1e9:.0f} GB of disk" in text


def test_the_table_of_speeds_is_the_record():
    logps, generate, train = (record(f"bench_{name}") for name in ("logps", "generate", "train"))
    names = {"naive": "naive log_softmax", "linear_cross_entropy": "torch linear_cross_entropy"}
    names |= {"Liger": "Liger, from its GRPO loss", "TRL": "TRL, fused head"}
    spread, equal = (
        [generate[lengths][f"transformers {name}"]["ours / theirs"] for name in ("generate", "generate_batch")]
        for lengths in ("spread", "equal")
    )
    time, memory = train["time"], train["memory"]
    theirs = min(("TRL, all pairs at once", "TRL, a few, by length"), key=lambda name: time[name]["time / ours"])
    wanted = [
        [logps["time"]["ours, slopes kept"], *(logps["time"][name] for name in names.values())],
        [logps["memory"]["ours, recomputed"], *(logps["memory"][name] for name in list(names.values())[1:])],
        spread,
        equal,
        [time[theirs]["time / ours"], memory["ours, prompt once"]["MiB"] / memory[theirs]["MiB"]],
        [time["ours, plain rows"]["time / ours"]],
        [time["ours, prompt once"]["time / bare"]],
        [
            time["Sr-DPO of sr_dpo.py"]["time / DPO"],
            memory["Sr-DPO of sr_dpo.py"]["MiB"] / memory["DPO of sr_dpo.py"]["MiB"],
        ],
    ]
    rows = table_rows("How fast it is")
    assert len(rows) == len(wanted)
    for row, values in zip(rows, wanted, strict=True):
        values = [v if isinstance(v, float) else v.get("time / three products", v.get("peak / naive")) for v in values]
        shown = re.findall(r"\d+\.\d+", row[2].split("(wanted")[0])
        assert len(shown) == len(values), row
        for text, value in zip(shown, values, strict=True):
            assert text == f"{value:.{len(text.partition('.')[2])}f}", (row[0], text, value)
