"""The benches run, on sizes of seconds, and record what they find. How fast anything is, no test looks at."""

import json
import os
import subprocess
import sys

import bench_generate
import bench_logps
import bench_train
import pytest
import real_text
from conftest import ROOT

import measure

PEAK = "/proc/self/clear_refs"
pytestmark = pytest.mark.skipif(not os.access(PEAK, os.W_OK), reason="benches set the peak of memory back by Linux")


def bench(name, folder, flags):
    """The record of tests/NAME.py with these flags."""
    command = [sys.executable, ROOT / "tests" / f"{name}.py", "--device", "cpu", *flags.split(), "--record", folder]
    environ = os.environ | {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"}
    done = subprocess.run(command, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    assert found["command"].startswith(f"python tests/{name}.py --device cpu") and found["cpu"]
    assert found["where"] == next(line for line in done.stdout.splitlines() if line.count(";") > 2)
    return found


def check_contestants(table, contestants):
    """All are there, and only packages that may be missing have no figures."""
    assert list(table) == list(contestants)
    assert all(name.startswith(("Liger", "TRL")) for name, figures in table.items() if "reason" in figures)


def test_logps(tmp_path):
    found = bench("bench_logps", tmp_path, "--repeats 1 --sizes 32 64 1000 --memory_sizes 256 64 16384")
    for table in (found["time"], found["memory"]):
        check_contestants(table, bench_logps.CONTESTANTS)
    for name in ("ours, slopes kept", "ours, recomputed"):
        assert found["time"][name]["error, nats"] <= 1e-5
        assert found["time"][name]["time / three products"] > 0
        assert 0 < found["memory"][name]["peak / naive"] < 0.6  # logits and softmax of naive, against slopes
    assert found["memory"]["naive log_softmax"]["peak / naive"] == 1


def test_generate(tmp_path):
    found = bench("bench_generate", tmp_path, "--repeats 1 --size 128 1 200 --prompts 8 --mean 5 --longest 20")
    for table in (found["spread"], found["equal"]):
        check_contestants(table, bench_generate.CONTESTANTS)
        assert table["ours"]["ours / theirs"] == 1
    occupancy = {name: figures["occupancy"] for name, figures in found["spread"].items()}
    assert 1 > occupancy["ours"] > occupancy["transformers generate"] > 0
    assert [figures["occupancy"] for figures in found["equal"].values()][:2] == [1, 1]


def test_train(tmp_path):
    found = bench("bench_train", tmp_path, "--repeats 1 --size 128 1 4096 --pairs 2 --trl_pairs 1")
    for table in (found["time"], found["memory"]):
        check_contestants(table, bench_train.CONTESTANTS)
    time, once, plain = found["time"], found["time"]["ours, prompt once"], found["time"]["ours, plain rows"]
    assert once["gradient norm"] > 0
    for figures in time.values():  # the same loss: TRL's too, where it is installed
        if figures.get("gradient norm"):
            assert figures["gradient norm"] == pytest.approx(once["gradient norm"], rel=1e-3)
    assert plain["gradient norm"] and plain["tokens / bare"] > once["tokens / bare"] > 0
    itself = {"time / bare": "bare", "time / ours": "ours, prompt once", "time / DPO": "DPO of sr_dpo.py"}
    assert all(time[name][ratio] == 1 for ratio, name in itself.items())
    assert found["memory"]["ours, prompt once"]["by ours"] == 1 and found["memory"]["ours, plain rows"]["MiB"] > 0


def test_7b(tmp_path):
    found = bench("bench_7b", tmp_path, "--hidden 256 --layers 1 --pairs 1 --slots 5 --new_tokens 4")
    assert found["sampling"]["tokens/s"] > 0 and found["training"]["pairs/s"] > 0
    assert found["sampling"]["peak GB"] is None  # of CUDA alone


def test_real_text(tmp_path, monkeypatch, capsys):
    """On text whose chosen answers are of other words than the rejected: both methods learn to tell them apart."""
    rows = [
        {"prompt": f"Question {i}?", "chosen": "yes of course " * 4, "rejected": "no never " * 4} for i in range(60)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["real_text.py", f"{tmp_path}/pairs.jsonl", "--seeds", "2", "--epochs", "1"])
    monkeypatch.setattr(real_text, "write", lambda name, result: measure.write(name, result, tmp_path))
    real_text.main()
    found = json.loads((tmp_path / "real_text.json").read_text())
    assert found["command"] == "python tests/real_text.py pairs.jsonl --seeds 2 --epochs 1"
    assert list(found["figures"]) == ["DPO", "Sr-DPO"] and found["pairs"] + found["held out"] == len(rows)
    for figures in found["figures"].values():
        assert figures["accuracy"] == [1, 1] and min(figures["marginal"]) > 0
    assert "DPO" in capsys.readouterr().out


def test_nothing_is_recorded_unless_asked(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "RESULTS", tmp_path)
    measure.record(measure.make_parser("", 1).parse_args([]), "here", time={})
    assert not list(tmp_path.iterdir())


def test_a_record_is_put_in_the_place_of_an_earlier_one(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["/somewhere/tests/bench_this.py", "--record"])
    args = measure.make_parser("", 1).parse_args([*sys.argv[1:], "--device", "cpu"])
    measure.record(args, "here", time={"ours": {"ratio": 1.23456, "rounds": 3, "all": [0.00012345]}})
    measure.record(args, memory={"ours": {"MiB": None}})  # the child
    (file,) = tmp_path.iterdir()
    found = json.loads(file.read_text())
    assert (file.name, found["command"]) == ("bench_this.json", "python tests/bench_this.py --record")
    assert found["time"] == {"ours": {"ratio": 1.235, "rounds": 3, "all": [0.0001234]}}
    assert found["where"] == "here" and found["memory"] == {"ours": {"MiB": None}}
    args.device = "cuda"
    measure.record(args, "there", time={})
    assert {file.name for file in tmp_path.iterdir()} == {"bench_this.json", "bench_this_cuda.json"}
    args.device = "cpu"
    measure.record(args, "anew", time={})
    assert "memory" not in json.loads(file.read_text())  # it was of another run
