"""Models on disk: load, save, checkpoint, refusals."""

import json
import time

import pytest
import torch
import transformers as hf
from make_tiny import make_tiny
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from steps import cli, stopped

import common
import sppo
import test_architectures
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
    remainders = [p.master_remainder for p in policy.parameters() if hasattr(p, "master_remainder")]
    weights = [*policy.state_dict().values(), *remainders]
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


def test_remainders_that_belong_to_other_weights_are_not_used(tmp_path, tokenizer, capsys):
    policy = build().bfloat16()
    train(policy, tmp_path / "none", minutes=1000)
    save_policy(policy, tokenizer, tmp_path / "mine")
    theirs = {name: x.float() + 1e-4 for name, x in load_file(tmp_path / "mine/model.safetensors").items()}
    save_file(theirs, tmp_path / "mine/model.safetensors", metadata={"format": "pt"})  # as another trainer
    again = load_policy(tmp_path / "mine")[0]
    assert all(torch.equal(p, theirs[name]) for name, p in again.named_parameters())
    assert (
        "mine/master.remainders is not used: another tool, or version, wrote the weights beside it"
        in capsys.readouterr().out
    )


def test_the_mark_of_weights_sees_every_tensor(tmp_path):
    weights = {name: torch.zeros(300, 300) for name in "abc"}
    marks = set()
    for name in ("", *weights):
        save_file(weights | ({name: torch.ones(300, 300)} if name else {}), tmp_path / "model.safetensors")
        marks.add(common.weights_mark(tmp_path))
    assert len(marks) == 4


def test_what_was_loaded_can_be_saved_though_its_stop_ids_changed(tmp_path, tokenizer):
    """transformers checks strictly what was changed: no temperature without do_sample."""
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{{ '~' if m.role == 'assistant' }}{% endfor %}"
    tokenizer.add_special_tokens({"extra_special_tokens": ["~"]})
    save_policy(build(), tokenizer, tmp_path / "model")
    settings = {"temperature": 0.6, "top_p": 0.9, "eos_token_id": 1}
    (tmp_path / "model/generation_config.json").write_text(json.dumps(settings))
    save_policy(*load_policy(tmp_path / "model"), tmp_path / "final")
    saved = json.loads((tmp_path / "final/generation_config.json").read_text())
    assert (saved["temperature"], saved["top_p"]) == (0.6, 0.9) and len(saved["eos_token_id"]) == 2


def test_routers_that_stay_float32_in_bf16_are_refused_at_load(tmp_path, capsys):
    test_architectures.build("glm4_moe").save_pretrained(tmp_path)
    policy = hf.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    said = stopped(capsys, common.check_architecture, policy, "x")
    assert "--model x: not supported in bf16: ['model.layers.1.mlp.gate.weight'] stays in float32" in said


@pytest.mark.parametrize("damage", ["torn", "text", "other"])
def test_a_damaged_or_foreign_checkpoint_is_one_line(damage, tmp_path, capsys):
    file = tmp_path / "checkpoint.pt"
    train(build(**({"hidden_size": 64} if damage == "other" else {})), file, minutes=0, until=1)
    if damage != "other":
        file.write_bytes(file.read_bytes()[:-9000] if damage == "torn" else b"no checkpoint")
    said = stopped(capsys, train, build(), file, minutes=1000)
    assert f"{file}: damaged, or of another run (" in said and said.endswith("remove it, then --resume")


def test_the_clock_of_checkpoints_cannot_be_set_back(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "time", lambda: 0.0)
    train(build(), tmp_path / "checkpoint.pt", minutes=1e-9, until=1)
    assert (tmp_path / "checkpoint.pt").exists()


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"),
            "make room on the disk",
        ),
        (SafetensorError("I/O error: No space left on device (os error 28)"), "make room on the disk"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "lower --slots or --micro_tokens"),
        (MemoryError(), "out of memory; lower --slots or --micro_tokens"),
    ],
    ids=str,
)
def test_a_full_disk_or_no_memory_is_one_line(error, words, workdir, monkeypatch, capsys):
    """The words of torch and safetensors on a full file system of 1 MiB, and of torch's allocator under a limit."""

    def fail(args):
        raise error

    monkeypatch.setattr(sppo, "load_judge", fail)
    assert words in stopped(capsys, cli, sppo, "--name", "x")


@pytest.mark.parametrize(
    ("model", "damage", "words"),
    [
        ({}, "config.json", "its config.json cannot be loaded"),
        ({}, "tokenizer*", "tokenizer or weights"),
        ({}, "model.safetensors", "weights (in safetensors) not loaded"),  # a pickle is there, which may run code
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
    flash = dict.fromkeys(["attn_implementation", "_attn_implementation"], "flash_attention_2")
    (tmp_path / "model/config.json").write_text(json.dumps(config | flash))
    loaded = load_policy(tmp_path / "model")
    assert capsys.readouterr().out == ""
    save_policy(*loaded, tmp_path / "final")
    assert {file.name for file in (tmp_path / "final").iterdir()} == {f.name for f in (tmp_path / "model").iterdir()}
    (tmp_path / "model/adapter_config.json").write_text('{"peft_type": "LORA"}')
    assert "it is an adapter, as of LoRA; merge it" in stopped(capsys, load_policy, tmp_path / "model")


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_a_file_that_git_lfs_did_not_fetch_ends_the_run(tmp_path, tokenizer, capsys, name):
    save_policy(build(), tokenizer, tmp_path)
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4943162336\n")
    assert "not loaded" in stopped(capsys, load_policy, tmp_path)


def test_tiny_is_a_folder_as_others_and_is_made_once(workdir, tiny):
    files = {file.name: file.stat().st_mtime_ns for file in tiny.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} < files.keys()
    policy, tokenizer = load_policy("tiny")
    assert files == {file.name: file.stat().st_mtime_ns for file in tiny.iterdir()}
    assert len(tokenizer) == 98 and tokenizer.decode(tokenizer("0123 ~!").input_ids) == "0123 ~!"
    prompt = common.Chat(policy, tokenizer).prompt_ids(as_messages("3142"))
    assert tokenizer.decode(prompt) == "<s>3142="  # it ends where the answer begins
    torch.manual_seed(1)  # which making it does not read
    first, second = (make_tiny(workdir / name, steps=2) / "model.safetensors" for name in "ab")
    assert first.read_bytes() == second.read_bytes()
