"""What README.md, tests/README.md and tests/claims/README.md say of the code is true."""

import ast
import contextlib
import importlib
import inspect
import json
import re
import shlex
import sys
from statistics import mean, stdev

import pytest
import real_text
from conftest import ROOT

import bench_pairrm
import common
import dno
import sppo
import sr_dpo

README, TESTS, CLAIMS = ((ROOT / folder / "README.md").read_text("utf-8") for folder in (".", "tests", "tests/claims"))
SCRIPTS = {"sppo.py": sppo, "dno.py": dno, "sr_dpo.py": sr_dpo}


def table_rows(text, title):
    """Cells of the first table under a heading."""
    part = re.split(rf"\n##? {title}\n", "\n" + text)[1].split("\n## ")[0]
    lines = re.search(r"(?:^\|.*\n)+", part, re.M)[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]


EQUATIONS = table_rows(TESTS, "The equations in the code")


def names_in(file):
    return {node.name for node in ast.parse(file.read_text(encoding="utf-8")).body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("row", EQUATIONS, ids=lambda row: row[0])
def test_each_equation_stands_in_its_function_and_its_test_exists(row):
    where, _, functions, tests = row
    numbers = re.findall(r"eq\. [0-9.]+|Alg\. [0-9], line [0-9]", where)
    names = re.findall(r"`(\w+)\.(\w+)`", functions)
    assert numbers and names
    for script, function in names:
        source = inspect.getsource(getattr(importlib.import_module(script), function)).replace("Algorithm ", "Alg. ")
        for number in numbers:
            assert number in source, f"{script}.{function} does not say {number}"
    for name in re.findall(r"`(test_\w+)`", tests):
        assert any(name in names_in(file) for file in (ROOT / "tests").glob("test_*.py")), f"there is no {name}"


def test_every_equation_number_in_the_scripts_is_in_the_map():
    mapped = " ".join(row[0] for row in EQUATIONS)
    for script in SCRIPTS:
        for number in set(re.findall(r"eq\. \d+(?:\.\d+)?", (ROOT / script).read_text(encoding="utf-8"))):
            assert number in mapped, f"{number} of {script}"


def test_line_counts():
    counts = re.findall(r"^\| \[([\w.]+)\]\(\1\) \|.*\| ([\d,]+) \|", README, re.M)
    assert len(counts) == 4
    for file, lines in counts:
        assert int(lines.replace(",", "")) == len((ROOT / file).read_text(encoding="utf-8").splitlines()), file


def commands():
    """(script, its words) of every command of a script, in blocks and within sentences."""
    text = (README + TESTS + CLAIMS).replace("\\\n", " ")
    start = r"(?:^|`)python "
    found = re.findall(start + r"((?:sppo|dno|sr_dpo)\.py(?: [^`\n&#]*)?)", text, re.M)
    return sorted({tuple(shlex.split(line)) for line in found})


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_every_command_is_one_that_the_script_takes(command, tmp_path, monkeypatch):
    (file, *flags), called = command, []
    script = SCRIPTS[file]

    def main(args):
        called.append(args)

    # A command whose code is the script's own, stopped before it loads anything.
    main.__code__ = main.__code__.replace(co_filename=file)
    monkeypatch.setattr(common, "check_fit", lambda args: None)
    monkeypatch.setattr(common, "count_parameters", lambda name, config: 7e9)  # of DIR
    monkeypatch.setattr(common, "load_config", lambda name: (None, name))
    monkeypatch.setattr(common, "replaced_functions", lambda main: [])
    if "--resume" in flags:  # wants a run
        monkeypatch.chdir(tmp_path)
        begun = {**vars(script.Args()), "script": file[:-3], "versions": {}}
        common.write(tmp_path / "runs/NAME/config.json", json.dumps(begun))
    with pytest.raises(SystemExit, match=r"^0$") if "--help" in flags else contextlib.nullcontext():
        common.cli(main, script.Args, script.RECIPES, script.__doc__, flags)
    assert called or "--help" in flags


def test_every_flag_that_is_named_exists():
    known = {f"--{name}" for script in SCRIPTS.values() for name in script.Args.__dataclass_fields__} | {"--help"}
    theirs = "--record --repeats --seeds --data --no --device --table --set"  # of commands in tests/
    theirs += " --model_outputs --model_configs --model_args --tasks"  # of alpaca_eval and lm_eval
    assert set(re.findall(r"(?<![\w-])--[a-z_0-9]+", README + TESTS + CLAIMS)) <= known | set(theirs.split())


@pytest.mark.parametrize(("text", "folder"), [(README, "."), (TESTS, "tests"), (CLAIMS, "tests/claims")])
def test_every_file_that_is_named_or_shown_exists(text, folder):
    for path in re.findall(r"(?:\]\(|src=\")(?!http)([\w./-]+)", text):
        assert (ROOT / folder / path).exists(), path
    for path in re.findall(r"(?:python |`)(tests/[\w./-]+\.py)", text):
        assert (ROOT / path).exists(), path


BLOCKS = [block.split("```")[0] for block in README.split("```python\n")[1:]]


def test_the_parts_that_are_shown_run(tmp_path, capsys):
    bench_pairrm.save_pairrm(tmp_path, common.MODELS["tiny"], 1, "cpu", 1000)
    scope = {}
    exec(BLOCKS[0].replace("llm-blender/PairRM-hf", str(tmp_path)).replace('"cuda"', '"cpu"'), scope)
    logps, samples, prefs, *_ = capsys.readouterr().out.splitlines()
    assert scope["answers"][0][-1] in scope["chat"].stops  # EOS
    assert re.fullmatch(r"tensor\(\[ *-\d.*, *-\d.*\], grad_fn=.*\)", logps)
    assert len(ast.literal_eval(samples)) == 5 and scope["layer"].weight.master_remainder.any()
    assert prefs.startswith("tensor([[[0.5")


def test_the_judge_that_is_shown_runs(workdir, monkeypatch, capsys):
    monkeypatch.setattr(sppo, "sppo_loss", sppo.sppo_loss)  # which the code replaces
    monkeypatch.setattr(common, "JUDGES", dict(common.JUDGES))
    flags = "--judge=shorter --limit=40 --n_eval=8 --iterations=1 --name=x"
    monkeypatch.setattr(sys, "argv", ["mine.py", *flags.split()])
    scope = {}
    exec(BLOCKS[1], scope)
    prefs = scope["shorter"]([[]], [["a", "bbb", "c"]])
    assert prefs.tolist() == [[[0.5, 1.0, 0.5], [0.0, 0.5, 0.0], [0.5, 1.0, 0.5]]]
    said = capsys.readouterr().out
    assert common.read_config("runs/x")["replaced"] == ["sppo_loss"]
    assert "characters" in said and "the best iterate is [1]: wins_vs_start" in said
    steps = common.read_jsonl(workdir / "runs/x/iter_1/steps.jsonl")
    assert steps[0]["loss"] < 5  # eta |P - 1/2|, at most 10 / 2, at the start; eq. 4.7 has its square


def test_the_prompts_of_a_benchmark_are_answered_in_their_order(workdir, tiny):
    texts = "31", "75", "31"
    (workdir / "eval.jsonl").write_text("".join(json.dumps({"instruction": text}) + "\n" for text in texts))
    code = TESTS.split("```python\n")[1].split("```")[0].replace("runs/NAME/final", str(tiny))
    exec(code.replace("tatsu-lab/alpaca_eval:eval", "eval.jsonl").replace("cuda", "cpu").replace("1024", "16"), {})
    rows = json.loads((workdir / "outputs.json").read_text())
    assert [row["instruction"] for row in rows] == [*texts] and all(row["output"] for row in rows)
    assert rows[0]["output"] == rows[2]["output"] and {row["generator"] for row in rows} == {"mine"}


def test_two_runs_are_compared_on_their_common_prompts(workdir, capsys):
    def answers(run, texts):
        rows = [
            {"prompt": [{"role": "user", "content": x}], "responses": [{"text": y, "finished": True}]}
            for x, y in texts.items()
        ]
        common.write_jsonl(workdir / f"runs/{run}/iter_3/answers.jsonl", rows)

    answers("a", {"21": "12", "2 1": "12", "2-1": "11", "2,1": "22", "of a alone": "1"})
    answers("b", {"of b alone": "1", "2,1": "12", "2-1": "21", "2 1": "21", "21": "12"})
    exec(TESTS.split("```python\n")[2].split("```")[0], {})
    assert capsys.readouterr().out == "[0.5, 0.25, 0.25]\n"  # "12" wins over "21", "11" over "21"


def record(name):
    return json.loads((ROOT / "tests" / "claims" / "results" / f"{name}.json").read_text(encoding="utf-8"))


def test_the_table_of_the_default_jobs_is_the_record():
    for script, seeds in record("default")["runs"].items():
        best = [max(table[1:], key=lambda row: row["wins_vs_start"]) for table in seeds.values()]
        starts = [table[0]["exact_match"] for table in seeds.values()]
        right = ", ".join(f"{a:.2f} → {row['exact_match']:.2f}" for a, row in zip(starts, best, strict=True))
        wins = ", ".join(f"{row['wins_vs_start']:.2f}" for row in best)
        assert f"| `python {script}.py` | {right} | {wins} |" in README


def test_the_tables_and_the_answers_of_the_real_runs_are_the_records():
    for line in (*real_text.rows_of_table(), *real_text.lines_of_answers()):
        assert line in TESTS
    for line in real_text.rows_of_summary():
        assert line in README


def test_the_speed_on_a_gpu_is_the_record():
    found = record("bench_7b_cuda")
    for text in (README, TESTS):
        assert f"{found['sampling']['tokens/s']:,.0f} tokens/s" in text and f"{found['sampling']['% of it']}%" in text
        assert f"{found['training']['TFLOP/s']} TFLOP/s, " in text and f"{found['training']['peak GB']} GB" in text


ROWS = [row for row in table_rows(CLAIMS, "The papers' claims, in small") if row[0].startswith("`")]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_each_claim_has_the_verdict_and_the_figures_that_were_recorded(row):
    found = record(row[0].strip("`"))
    assert found["verdict"] == row[3]
    known = numbers({key: found.get(key) for key in ("figures", "comparisons", "parts", "median_ratio")})
    for number in set(re.findall(r"\d+\.\d+", row[2])):
        unit = 10.0 ** -len(number.partition(".")[2])
        assert any(abs(abs(x) - float(number)) < 0.51 * unit for x in known), f"{number} is not in the record"


def test_no_claim_is_passed_over():
    recorded = {file.stem for file in (ROOT / "tests" / "claims" / "results").glob("*.json")}
    others = {name for name in recorded if name.startswith(("default", "real_", "bench_"))}
    assert recorded - others == {row[0].strip("`") for row in ROWS}


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
