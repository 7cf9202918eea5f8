"""What the README says of the code is true: equations, line counts, commands, flags, files."""

import ast
import importlib
import inspect
import json
import re
import shlex

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
    theirs = {"--repeats", "--device", "--seeds", "--epochs", "--limit"}  # of commands in tests/
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
    record = json.loads((ROOT / "tests" / "claims" / "results" / f"{name}.json").read_text(encoding="utf-8"))
    assert record["verdict"] == row[3]
    file = re.search(r"tests/claims/\w+\.py", record["command"])[0]
    assert f'"{name}"' in (ROOT / file).read_text() or f"def {name}(" in (ROOT / file).read_text(), record["command"]


def test_no_claim_is_passed_over():
    recorded = {file.stem for file in (ROOT / "tests" / "claims" / "results").glob("*.json")}
    assert recorded - {row[0].strip("`") for row in CLAIMS} <= {"default", "benches"}


def test_the_table_of_the_default_jobs_is_the_record():
    runs = json.loads((ROOT / "tests/claims/results/default.json").read_text(encoding="utf-8"))["runs"]
    part = TEXT.split("\n## Results\n")[1]
    for script, seeds in runs.items():
        for seed, table in seeds.items():
            row = f"| `{script}.py` | {seed} | {table[0]['exact_match']:.3f} → {table[-1]['exact_match']:.3f} |"
            assert row in part
