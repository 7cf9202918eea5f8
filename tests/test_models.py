"""Models on disk: load, save, checkpoint, refusals."""

import json

import pytest
import torch
import transformers as hf
from safetensors.torch import save_file
from steps import stopped

import common
import test_generate
from common import as_messages, load_policy, response_logps, save_policy

SIZES = {**test_generate.SIZES, "vocab_size": 100, "num_hidden_layers": 2, "bos_token_id": 0, "eos_token_id": 1}
PROMPTS, RESPONSES = [[0, 5, 9, 40], [0], [7, 7, 7, 7, 2, 40]], [[8, 9, 1], [4, 4, 4, 4, 4, 1], [99]]


def build(config_class=hf.LlamaConfig, **settings):
    return test_generate.build(config_class, SIZES | settings)


@pytest.fixture
def tokenizer(tiny):
    return hf.AutoTokenizer.from_pretrained(tiny)


def same_bits(policy, other):
    return all(torch.equal(p, q) for p, q in zip(policy.parameters(), other.parameters(), strict=True))


def test_a_policy_comes_back_to_the_bit(tmp_path, tokenizer):
    built = build()
    save_policy(built, tokenizer, tmp_path)
    policy, theirs = load_policy(tmp_path)
    assert same_bits(policy, built) and not policy.training and policy.dtype == torch.float32
    assert theirs("12=").input_ids == tokenizer("12=").input_ids


def train(policy, file, minutes, until=6):
    """Go on from the checkpoint in `file` to step `until`: all numbers that the next step depends on."""
    optimizer, scheduler = common.make_optimizer(policy, 1e-4, 0.2, 9)
    checkpoint = common.Checkpoint(file, policy, optimizer, scheduler, minutes)
    steps = checkpoint.load()
    while len(steps) < until:
        response_logps(policy, PROMPTS, RESPONSES).sum().backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        steps.append({"step": len(steps) + 1})
        checkpoint.save(steps)
    assert [row["step"] for row in steps] == [*range(1, until + 1)]
    moments = [value for state in optimizer.state.values() for value in state.values()]
    weights = [*policy.state_dict().values(), *common.master_remainders(policy).values()]
    return [torch.as_tensor(x) for x in (*weights, *moments, scheduler.get_last_lr()[0])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_training_goes_on_from_a_checkpoint_to_the_bit(dtype, tmp_path):
    file = tmp_path / "checkpoint.pt"
    right = train(build().to(dtype), file, minutes=1000)
    assert not file.exists()  # 1000 minutes have not passed
    train(build().to(dtype), file, minutes=0, until=3)
    written = file.read_bytes()
    for minutes in (1000, 0):  # the file is mapped into memory: training must not change it, saving may replace it
        got = train(build().to(dtype), file, minutes)
        assert all(torch.equal(a, b) for a, b in zip(got, right, strict=True))
        assert (file.read_bytes() == written) == (minutes == 1000)


def test_the_float32_master_of_bf16_weights_comes_back_to_the_bit(tmp_path, tokenizer):
    policy = build().bfloat16()
    train(policy, tmp_path / "none", minutes=1000)
    save_policy(policy, tokenizer, tmp_path)
    for p, q in zip(policy.parameters(), load_policy(tmp_path)[0].parameters(), strict=True):
        bits = (p.view(torch.int16).int() << 16) + p.master_remainder  # by hand: the high half and the rest
        assert p.master_remainder.any() and torch.equal(q.view(torch.int32), bits)
    assert same_bits(hf.AutoModelForCausalLM.from_pretrained(tmp_path), policy)  # others see the rounded weights
    save_policy(build().bfloat16(), tokenizer, tmp_path)  # without remainders: the old ones are gone
    assert same_bits(load_policy(tmp_path)[0], build().bfloat16().float())


@pytest.mark.parametrize(
    ("model", "damage", "words"),
    [
        ({}, "config.json", "its config.json cannot be loaded"),
        ({}, "tokenizer*", "tokenizer or weights"),
        ({}, "model.safetensors", "weights (in safetensors) cannot be loaded"),  # a pickle is there, which may run code
        ({}, {"lm_head.weight": None}, "it lacks lm_head.weight"),  # transformers would fill this one at random
        ({}, {"model.norm.weight": torch.ones(3)}, "it lacks ('model.norm.weight'"),
        ({"eos_token": None}, None, "its tokenizer has no EOS"),
        ({"vocab_size": 97}, None, "its tokenizer has 98 tokens, the model 97"),
        ({"config_class": hf.PhiConfig}, None, "its head is more than a linear layer"),  # a bias
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_would_be_computed_wrongly_is_refused(tmp_path, tokenizer, capsys, model, damage, words):
    tokenizer.eos_token = model.get("eos_token", tokenizer.eos_token)
    policy = build(**{name: value for name, value in model.items() if name != "eos_token"})
    save_policy(policy, tokenizer, tmp_path)
    if isinstance(damage, str):
        torch.save(policy.state_dict(), tmp_path / "pytorch_model.bin")
        [file.unlink() for file in tmp_path.glob(damage)]
    elif damage:
        tensors = {name: x for name, x in (policy.state_dict() | damage).items() if x is not None}
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    said = stopped(capsys, load_policy, tmp_path)
    assert f"--model {tmp_path}: " in said and words in said


def test_what_others_put_into_a_folder(tmp_path, tokenizer, capsys):
    policy = build()
    save_policy(policy, tokenizer, tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text())
    (tmp_path / "model/config.json").write_text(json.dumps(config | {"attn_implementation": "flash_attention_2"}))
    loaded = load_policy(tmp_path / "model")
    assert capsys.readouterr().out == ""
    save_policy(*loaded, tmp_path / "final")
    assert {file.name for file in (tmp_path / "final").iterdir()} == {f.name for f in (tmp_path / "model").iterdir()}
    (tmp_path / "model/adapter_config.json").write_text('{"peft_type": "LORA"}')
    assert "it is an adapter, as of LoRA; merge it" in stopped(capsys, load_policy, tmp_path / "model")


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_a_pointer_of_git_lfs_is_called_one(tmp_path, tokenizer, capsys, name):
    save_policy(build(), tokenizer, tmp_path)
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4943162336\n")
    assert f"{name} is a Git LFS pointer: run git lfs pull" in stopped(capsys, load_policy, tmp_path)


def test_tiny_is_a_folder_as_others_and_is_made_once(workdir, tiny):
    files = {file.name: file.stat().st_mtime_ns for file in tiny.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} < files.keys()
    policy, tokenizer = load_policy("tiny")
    assert files == {file.name: file.stat().st_mtime_ns for file in tiny.iterdir()}
    assert len(tokenizer) == 98 and tokenizer.decode(tokenizer("0123 ~!").input_ids) == "0123 ~!"
    prompt = common.Chat(policy, tokenizer).prompt_ids(as_messages("3142"))
    assert tokenizer.decode(prompt) == "<s>3142="  # it ends where the answer begins
    torch.manual_seed(1)  # which making it does not read
    first, second = (common.make_tiny(workdir / name, steps=2) / "model.safetensors" for name in "ab")
    assert first.read_bytes() == second.read_bytes()
