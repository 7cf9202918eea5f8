"""check_fit: what a run takes, said and checked before anything is loaded."""

import json
from types import SimpleNamespace

import pytest
import torch
from steps import stopped

import common
import dno
import sppo
import sr_dpo
import test_architectures
from test_logps import PROMPTS, RESPONSES, llama

MISTRAL = {"model_type": "mistral", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}
MISTRAL |= {"num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 32000, "max_position_embeddings": 32768}


@pytest.fixture
def seven_b(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(MISTRAL))
    return str(tmp_path)


def on(monkeypatch, gigabytes, disk=1000):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (gigabytes * 1e9, gigabytes * 1e9))
    monkeypatch.setattr(common.shutil, "disk_usage", lambda _: SimpleNamespace(free=disk * 1e9))


@pytest.mark.parametrize("script", [sppo, dno, sr_dpo])
def test_the_papers_recipes_fit_80_gb_at_7b(script, seven_b, monkeypatch, capsys):
    on(monkeypatch, 80)
    common.check_fit(script.Args(**{**script.RECIPES["paper"], "model": seven_b, "device": "cuda"}))
    said = capsys.readouterr().out
    assert said.startswith("7,241,732,096 parameters: ")  # as published
    assert ": at least 57.9 GB to train, 80.0 available;" in said  # weights, masters, gradients, moments


@pytest.mark.parametrize(
    ("gigabytes", "disk", "flags", "words"),
    [
        (50, 1000, {}, "training needs at least 58 GB, 50 are free"),
        (80, 100, {}, "GB of disk, 100 are free"),
        (80, 1000, {"max_new_tokens": 40_000}, "lower these"),
    ],
)
def test_what_does_not_fit_is_refused_with_a_remedy(seven_b, monkeypatch, capsys, gigabytes, disk, flags, words):
    on(monkeypatch, gigabytes, disk)
    args = sppo.Args(**{**sppo.RECIPES["paper"], "model": seven_b, "device": "cuda", **flags})
    assert words in stopped(capsys, common.check_fit, args)


def test_slots_are_as_many_as_memory_holds(seven_b, monkeypatch):
    """A Mistral of 7B keeps 128 KiB a token: 2 x 32 layers x 8 heads x 128 numbers of two bytes."""
    config, size = common.load_config(seven_b)[0], 1024 * 128 * 1024 + 64 * 32000
    assert common.slot_bytes(config, 1024, 2) == size
    policy, seen = llama(), []
    monkeypatch.setattr(common, "slot_layer", lambda like, pos, capacity: seen.append(len(pos)) or 1 / 0)
    one = common.slot_bytes(policy.config, max(map(len, PROMPTS)) + 4, 4)
    for memory, slots in ((100.0 * one, 7), (10.01 * one, 7), (2.0 * one, 1), (0.0, 1)):
        monkeypatch.setattr(common, "free_memory", lambda device, memory=memory: memory)
        with pytest.raises(ZeroDivisionError):
            common.generate(policy, PROMPTS, k=9, max_new_tokens=4, eos_ids=[], slots=7)
        assert seen.pop() == slots


def test_checkpointing_recomputes_and_changes_nothing():
    gradients, calls = [], []
    for on in (False, True):
        policy = llama()
        for layer in policy.model.layers:
            layer.input_layernorm.register_forward_hook(lambda *_, on=on: calls.append(on))
        if on:
            common.use_checkpointing(policy)
        common.response_logps(policy, PROMPTS, RESPONSES).sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in policy.parameters()]))
    assert torch.equal(*gradients)
    assert calls.count(True) == 2 * calls.count(False) > 0  # forward once more for backward


@pytest.mark.parametrize("family", ["gemma4_text", "mamba", "rwkv", "t5"])
def test_any_configuration_is_read_or_refused_in_one_line(family, tmp_path, capsys):
    test_architectures.small_config(family).save_pretrained(tmp_path)
    said = stopped(capsys, common.check_fit, sppo.Args(model=str(tmp_path)))
    assert f"--model {tmp_path}: not supported: no plain decoder (" in said


def test_resume_asks_only_for_the_disk_that_is_missing_where_the_run_is(workdir, seven_b, monkeypatch, capsys):
    on(monkeypatch, 80)
    asked, free = [], common.shutil.disk_usage
    monkeypatch.setattr(common.shutil, "disk_usage", lambda path: (asked.append(path), free(path))[1])
    args = sppo.Args(**{**sppo.RECIPES["paper"], "model": seven_b, "device": "cuda", "resume": "runs/x"})
    (workdir / "runs/x/iter_1").mkdir(parents=True)
    for size, disk in ((0, 173.8), (29 * 10**9, 144.8)):
        with open(workdir / "runs/x/iter_1/policy", "wb") as file:
            file.truncate(size)  # takes no disk
        common.check_fit(args)
        assert f"; {disk} of disk" in capsys.readouterr().out
    assert {str(path) for path in asked} == {"runs/x"}


def test_available_memory_is_the_least_of_what_is_free_and_what_a_container_may_use(monkeypatch):
    files = {"/proc/meminfo": "MemTotal: 9000 kB\nMemAvailable:   5000 kB\n"}
    monkeypatch.setattr(common.Path, "read_text", lambda self: files.get(str(self)) or (self / "none").open())
    for name, text, free in (("", "", 5_120_000), (".max", "max\n", 5_120_000), (".max", "4000000\n", 4_000_000)):
        files[f"/sys/fs/cgroup/memory{name}"] = text
        assert common.free_memory("cpu") == free
