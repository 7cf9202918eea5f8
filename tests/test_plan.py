import types

import pytest
import torch
import transformers as hf

import common
import sppo
from common import InputError, footprint, known_config, plan_run, response_logps, use_checkpointing
from test_logps import NINE, llama

PUBLISHED = {  # parameters, from the model cards and index files
    "mistral-7b": 7_241_732_096,
    "zephyr-7b-sft": 7_241_732_096,
    "llama-3-8b": 8_030_261_248,
    "gemma-2-9b": 9_241_705_984,
    "pythia-2.8b": 2_775_208_960,
    "qwen2.5-0.5b": 494_032_768,
    "smollm2-135m": 134_515_008,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_known_sizes_are_those_published(name):
    n, _, _ = footprint(known_config(name), torch.bfloat16)
    assert n == PUBLISHED[name]


def test_every_short_name_is_known():
    assert set(common.KNOWN) | set(common.TINIES) == set(common.MODELS)


def test_a_7b_full_fine_tune_fits_an_80_gb_gpu():
    """By hand: 8 bytes a parameter, 57.9 GB; a token's keys and values 32 layers x 2 x 8 heads x 128 x 2 bytes."""
    n, kv, _ = footprint(known_config("mistral-7b"), torch.bfloat16)
    assert kv == 32 * 2 * 8 * 128 * 2
    args = sppo.Args(model="mistral-7b", **sppo.RECIPES["mistral-7b"])
    plan = plan_run(args, "cuda", 2, memory=80e9)
    assert plan["checkpointing"], "without it the activations alone are over 100 GB"
    training = plan["stages"]["training"]
    assert training["weights"] + training["master"] + training["gradients"] + training["moments"] == 8 * n
    assert sum(training.values()) < 80e9


def saved_bytes(policy, prompts, responses):
    weights, kept = {p.untyped_storage().data_ptr() for p in policy.parameters()}, {}

    def keep(x):
        if x.untyped_storage().data_ptr() not in weights:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage()  # held, so that no address comes twice
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        response_logps(policy, prompts, responses).sum().backward()
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt-neox"])
def test_the_footprint_is_that_of_a_real_model(kind):
    sizes = {"vocab_size": 61, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = {
        "llama": hf.LlamaConfig(**sizes, intermediate_size=128, num_key_value_heads=2),
        "gpt2": hf.GPT2Config(vocab_size=61, n_embd=64, n_layer=4, n_head=4),
        "gpt-neox": hf.GPTNeoXConfig(**sizes, intermediate_size=256),
    }[kind]
    policy = hf.AutoModelForCausalLM.from_config(config).eval()
    n, kv, activations = footprint(config, torch.float32)
    assert n == policy.num_parameters()
    cache = policy(torch.ones(1, 10, dtype=torch.long), use_cache=True).past_key_values
    assert kv == sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers) / 10
    policy._shares_prompts = False
    real = saved_bytes(policy, [[1] * 300], [[2, 3]]) / 302  # two responses tokens: nearly nothing in the head
    assert 0.85 * real < activations < 1.5 * real


def test_checkpointing_changes_no_gradient_and_keeps_little():
    policy = llama(attention_dropout=0.5)  # which must stay off
    prompts, results = [[1, 5, 9, 4] * 5] * 9, []
    for _ in range(2):
        kept = saved_bytes(policy, prompts, NINE)
        results.append((kept, [p.grad.clone() for p in policy.parameters()]))
        policy.zero_grad()
        use_checkpointing(policy)
        use_checkpointing(policy)  # twice is once
    (plain, plain_grads), (less, grads) = results
    assert less < 0.5 * plain
    for a, b in zip(grads, plain_grads, strict=True):
        torch.testing.assert_close(a, b)
    assert not policy.training


ARGS = {"model": "smollm2-135m", "slots": 64, "max_prompt_tokens": 512, "max_new_tokens": 1024}


@pytest.mark.parametrize(("flag", "memory"), [("slots", 3e9), ("micro_tokens", 5e9)])
def test_the_flag_that_a_refusal_names_fits_and_little_more_does(flag, memory):
    args = sppo.Args(**{**ARGS, "slots": 64 if flag == "slots" else 1, "checkpointing": "off"})
    args.micro_tokens = 16384 if flag == "micro_tokens" else 1
    if flag == "slots":
        args.max_new_tokens = 16  # so that training fits
        args.slots = 4096
    with pytest.raises(InputError, match=rf"it fits with --{flag} \d+$") as refused:
        plan_run(args, "cuda", 2, memory)
    most = int(str(refused.value).split(f"--{flag} ")[1].split()[0])
    setattr(args, flag, most)
    plan_run(args, "cuda", 2, memory)
    setattr(args, flag, int(1.2 * most))
    with pytest.raises(InputError, match=rf"it fits with --{flag} \d+$"):
        plan_run(args, "cuda", 2, memory)


def test_a_refusal_names_all_flags_or_none():
    """A flag that mends one stage is no help where another cannot be mended."""
    with pytest.raises(InputError, match=r"it fits with --slots \d+ --micro_tokens \d+$"):
        plan_run(sppo.Args(**{**ARGS, "slots": 9999}, checkpointing="off"), "cuda", 2, 5e9)
    with pytest.raises(InputError, match="more memory or a smaller --model"):
        plan_run(sppo.Args(**{**ARGS, "slots": 9999}), "cuda", 2, 1e9)


def test_checkpointing_comes_when_memory_requires_it():
    args = sppo.Args(**ARGS)
    assert not plan_run(args, "cuda", 2, 80e9)["checkpointing"]
    assert plan_run(args, "cuda", 2, 5e9)["checkpointing"]
    with pytest.raises(InputError, match="training takes"):
        plan_run(sppo.Args(**ARGS, checkpointing="off"), "cuda", 2, 5e9)


def test_rows_too_long_for_the_memory_name_the_flag_that_shortens_them():
    args = sppo.Args(**{**ARGS, "slots": 1, "max_new_tokens": 2500}, checkpointing="off")
    with pytest.raises(InputError, match=r"lower --max_new_tokens: \d+ tokens fit"):
        plan_run(args, "cuda", 2, 5e9)


def test_too_few_positions_are_said_before_memory(workdir):
    with pytest.raises(InputError, match="has 512 positions"):
        plan_run(sppo.Args(max_new_tokens=10**7), "cpu", 2)


def test_a_disk_that_is_too_small_is_said_before_the_start(monkeypatch):
    monkeypatch.setattr(common.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=1e6))
    with pytest.raises(InputError, match="the disk has"):
        plan_run(sppo.Args(**{**ARGS, "slots": 1, "micro_tokens": 1}), "cpu", 2)


def test_7b_on_a_cpu_ends_with_one_line_before_anything_is_loaded(workdir, capsys, monkeypatch):
    monkeypatch.setattr(common, "memory_of", lambda device: 24e9)
    monkeypatch.setattr(common, "load_policy", None)
    with pytest.raises(SystemExit) as end:
        common.cli(sppo.main, sppo.Args, sppo.RECIPES, "", ["--model", "mistral-7b", "--device", "cpu"])
    error = capsys.readouterr().err
    assert end.value.code == 2
    assert error.count("\n") == 1
    assert "a CUDA GPU would do" in error
    assert {path.name[:5] for path in (workdir / "runs").iterdir()} == {"tiny-"}


def test_dry_run_prints_the_plan_and_leaves_nothing(workdir, capsys):
    before = sorted(workdir.rglob("*"))
    settings = {"limit": 40, "max_new_tokens": 4, "slots": 8, "n_eval": 8}
    assert sppo.main(sppo.Args(**settings, dry_run=True)) == []
    out = capsys.readouterr().out
    for word in ("parameters", "sampling", "training", "evaluation", "disk", "tokens/s", "hours"):
        assert word in out
    assert sorted(workdir.rglob("*")) == before
