"""Models on disk: load, save, checkpoint, refusals; prompts and answers as token ids."""

import random

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from tokenizers import processors

import common
from common import Checkpoint, SplitMaster, encode_prompts, load_policy, make_tiny, response_logps, save_policy

SIZES = {"vocab_size": 100, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "bos_token_id": 0}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "eos_token_id": 1}
SIZES |= {"initializer_range": 0.3}
WINDOW = {"sliding_window": 4, "head_dim": 8, "layer_types": ["sliding_attention", "full_attention"]}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
CAPS = {"final_logit_softcapping": 3.0, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 8}
FAMILIES = {
    "llama": (hf.LlamaConfig, {}),
    "mistral": (hf.MistralConfig, {"sliding_window": 4}),
    "qwen3": (hf.Qwen3Config, {**WINDOW, "use_sliding_window": True}),
    "gemma2, soft-caps": (hf.Gemma2Config, {**WINDOW, **CAPS}),
    "gemma3": (hf.Gemma3TextConfig, {**WINDOW, "query_pre_attn_scalar": 8}),
    "cohere, logit_scale": (hf.CohereConfig, {"logit_scale": 0.25}),
    "granite, logits_scaling": (hf.GraniteConfig, {"logits_scaling": 4.0}),
    "gpt-neox": (hf.GPTNeoXConfig, {}),
    "gpt2 with dropout": (hf.GPT2Config, {**GPT2, "resid_pdrop": 0.5, "attn_pdrop": 0.5, "embd_pdrop": 0.5}),
}
PROMPTS = [[0, 5, 9, 40], [0], [7, 7, 7, 7, 7, 7, 2, 40]]
RESPONSES = [[8, 9, 1], [4, 4, 4, 4, 4, 4, 4, 1], [99]]


def build(config_class=hf.LlamaConfig, settings=(), seed=0):
    torch.manual_seed(seed)
    return hf.AutoModelForCausalLM.from_config(config_class(**{**SIZES, **dict(settings)})).eval()


@pytest.fixture
def tokenizer(tiny):
    return hf.AutoTokenizer.from_pretrained(tiny)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "policy"


def same_bits(policy, other):
    return all(torch.equal(p, q) for p, q in zip(policy.parameters(), other.parameters(), strict=True))


# Save and load --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_policy_comes_back_to_the_bit_and_its_log_probs_are_its_own(family, folder, tokenizer):
    built = build(*FAMILIES[family])
    save_policy(built, tokenizer, folder)
    policy, theirs = load_policy(folder)
    assert same_bits(policy, built) and not policy.training and policy.dtype == torch.float32
    assert theirs("12=").input_ids == tokenizer("12=").input_ids
    logps = response_logps(policy, PROMPTS, RESPONSES)
    for prompt, response, logp in zip(PROMPTS, RESPONSES, logps, strict=True):  # from all logits, in float64
        logits = built(input_ids=torch.tensor([prompt + response])).logits[0].double()
        by_token = logits.log_softmax(-1)[len(prompt) - 1 : -1]
        assert logp.item() == pytest.approx(sum(by_token[n, y].item() for n, y in enumerate(response)), abs=1e-4)


def trained(policy, steps=5):
    """After some steps of SplitMaster, too small to be seen in bf16 alone."""
    optimizer = SplitMaster(policy.parameters(), lr=1e-5)
    for _ in range(steps):
        response_logps(policy, PROMPTS, RESPONSES).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return policy


def test_the_float32_master_of_bf16_weights_comes_back_to_the_bit(folder, tokenizer):
    policy = trained(build().bfloat16())
    save_policy(policy, tokenizer, folder)
    loaded, _ = load_policy(folder)
    rest = 0
    for p, q in zip(policy.parameters(), loaded.parameters(), strict=True):
        bits = (p.view(torch.int16).int() << 16) + p.master_remainder  # by hand: the high half and the rest
        assert torch.equal(q.view(torch.int32), bits)
        rest += p.master_remainder.count_nonzero().item()
    assert rest > 1000
    assert same_bits(hf.AutoModelForCausalLM.from_pretrained(folder), policy)  # others see the rounded weights
    if torch.cuda.is_available():
        for p, q in zip(policy.parameters(), load_policy(folder, "cuda")[0].cpu().parameters(), strict=True):
            assert torch.equal(p, q) and torch.equal(p.master_remainder, q.master_remainder.cpu())
    save_policy(build().bfloat16(), tokenizer, folder)  # the next one has no remainders: the old ones are gone
    assert same_bits(load_policy(folder)[0], build().bfloat16().float())


def test_saving_replaces_a_folder_and_a_save_that_fails_leaves_it(folder, tokenizer, monkeypatch):
    save_policy(build(seed=1), tokenizer, folder)
    (folder / "old.txt").write_text("old")
    save_policy(build(), tokenizer, folder)
    assert list(folder.parent.iterdir()) == [folder] and not (folder / "old.txt").exists()
    monkeypatch.setattr(tokenizer, "save_pretrained", lambda path: 1 / 0)
    for place in (folder, folder.with_name("new")):
        with pytest.raises(ZeroDivisionError):
            save_policy(build(seed=1), tokenizer, place)
    assert same_bits(load_policy(folder)[0], build()) and not folder.with_name("new").exists()


def train(checkpoint, until):
    """Go on from the checkpoint to step `until`: all numbers that the next step depends on."""
    policy, optimizer, scheduler, steps = (
        checkpoint.policy,
        checkpoint.optimizer,
        checkpoint.scheduler,
        checkpoint.load(),
    )
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
    file = tmp_path / "iter_1" / "checkpoint.pt"

    def start(minutes):
        policy = build().to(dtype)
        optimizer = common.make_optimizer(policy, 1e-3)
        return Checkpoint(file, policy, optimizer, hf.get_linear_schedule_with_warmup(optimizer, 1, 9), minutes)

    right = train(start(minutes=1000), 6)
    assert not file.exists()  # 1000 minutes have not passed
    train(start(minutes=0), 3)
    written = file.read_bytes()
    for minutes in (1000, 0):  # the file is mapped into memory: training must not change it, saving may replace it
        assert all(torch.equal(a, b) for a, b in zip(train(start(minutes), 6), right, strict=True))
        assert (file.read_bytes() == written) == (minutes == 1000)


# Refusals -------------------------------------------------------------------------------------------------------------


def refusal(capsys, name):
    with pytest.raises(SystemExit) as end:
        load_policy(name)
    err = capsys.readouterr().err
    assert end.value.code == 2 and err.count("\n") == 1 and f"--model {name}: " in err
    return err


def change_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def as_pickle(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


DAMAGE = {
    "config.json cannot be loaded": lambda folder: (folder / "config.json").unlink(),
    "tokenizer or weights": lambda folder: [file.unlink() for file in folder.glob("tokenizer*")],
    "cannot be loaded": lambda folder: (folder / "model.safetensors").write_bytes(b"half of"),
    "in safetensors": as_pickle,  # which could run code
    # transformers would fill these at random
    "lacks lm_head.weight": lambda folder: change_weights(folder, lambda w: w.pop("lm_head.weight")),
    "lacks ('model.norm.weight'": lambda folder: change_weights(
        folder, lambda w: w.update({"model.norm.weight": torch.ones(3)})
    ),
}


@pytest.mark.parametrize("words", DAMAGE)
def test_a_damaged_folder_is_refused(words, folder, tokenizer, capsys):
    save_policy(build(), tokenizer, folder)
    DAMAGE[words](folder)
    assert words in refusal(capsys, folder)


ELSE = {  # (configuration, settings), or what is done to a Llama's tokenizer
    "no EOS": lambda tokenizer: setattr(tokenizer, "eos_token", None),
    "its tokenizer has 103 tokens, the model 100": lambda tokenizer: tokenizer.add_tokens([*"äöüßé"]),
    "head is more than a linear layer": (hf.PhiConfig, {}),  # a bias
    "full and sliding attention are": (hf.Llama4TextConfig, {"head_dim": 8, "num_local_experts": 2}),  # no base_model
    "not supported: only": (hf.MambaConfig, {"state_size": 4}),  # no cache of keys and values
}


@pytest.mark.parametrize("words", ELSE)
def test_a_model_that_would_be_computed_wrongly_is_refused(words, folder, tokenizer, capsys):
    what = ELSE[words]
    policy = build(*what) if isinstance(what, tuple) else build()
    if callable(what):
        what(tokenizer)
    save_policy(policy, tokenizer, folder)
    assert words in refusal(capsys, folder)


@pytest.mark.parametrize("family", ["gemma2, soft-caps", "cohere, logit_scale", "granite, logits_scaling"])
def test_a_head_of_an_unknown_kind_is_found_by_its_numbers(family, folder, tokenizer, capsys, monkeypatch):
    save_policy(build(*FAMILIES[family]), tokenizer, folder)
    monkeypatch.setattr(common, "head", lambda policy: {"weight": policy.get_output_embeddings().weight})
    assert "head are not those of a plain decoder" in refusal(capsys, folder)


@pytest.mark.parametrize("name", ["nobody/no-such-model", "pythia-2.8b", "nowhere", "../x"])
def test_what_is_not_here_is_refused_while_offline(name, workdir, capsys):
    refusal(capsys, name)


# tiny -----------------------------------------------------------------------------------------------------------------


def test_tiny_is_a_folder_as_others_and_is_made_once(workdir, tiny):
    files = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert files < {file.name for file in tiny.iterdir()}
    before = (tiny / "model.safetensors").stat().st_mtime_ns
    policy, tokenizer = load_policy("tiny")
    assert (tiny / "model.safetensors").stat().st_mtime_ns == before
    assert policy.num_parameters() == 455_808 and common.stop_ids(policy, tokenizer) == [1]
    assert tokenizer.decode(tokenizer("0123 ~!").input_ids) == "0123 ~!"


def test_tiny_neither_reads_nor_moves_the_global_random_numbers(tmp_path):
    made = []
    for seed in range(2):
        torch.manual_seed(seed)
        random.seed(seed)
        before = torch.get_rng_state(), random.getstate()
        made.append((make_tiny(tmp_path / str(seed), steps=2) / "model.safetensors").read_bytes())
        assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]
    assert made[0] == made[1]


# Chat templates, BOS, end of turn -------------------------------------------------------------------------------------

NO_BOS = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
TURNS = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>\n{% endfor %}"
ONE_TURN = "{% if messages | length > 1 %}{{ raise_exception('one turn') }}{% endif %}" + NO_BOS


def user(text):
    return [{"role": "user", "content": text}]


def encode(tokenizer, *prompts, max_tokens=50):
    return encode_prompts(tokenizer, [{"prompt": prompt} for prompt in prompts], max_tokens)


@pytest.mark.parametrize(
    ("template", "adds_bos", "bos", "text"),
    [
        ("{{ bos_token }}" + NO_BOS, False, "<s>", "<s>[12]"),
        ("{{ bos_token }}" + NO_BOS, True, "<s>", "<s>[12]"),  # Llama
        (NO_BOS, True, "<s>", "<s>[12]"),
        (None, True, "<s>", "<s>12"),
        (NO_BOS, False, "<s>", "[12]"),  # has one, but wants none: GPT-NeoX
        (NO_BOS, False, None, "[12]"),  # has none: Qwen
        (None, False, None, "12"),
    ],
)
def test_bos_is_there_exactly_once_for_a_model_that_wants_one(tokenizer, template, adds_bos, bos, text, capsys):
    tokenizer.chat_template, tokenizer.bos_token = template, bos
    if adds_bos:
        post = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)])
        tokenizer.backend_tokenizer.post_processor = post
    (row,) = encode(tokenizer, user("12"))
    assert row["prompt"] == user("12") and tokenizer.decode(row["prompt_ids"]) == text
    assert ("no chat template" in capsys.readouterr().out) == (template is None)


def test_a_prompt_of_tiny_ends_where_its_answer_begins(tokenizer):
    assert tokenizer.decode(encode(tokenizer, user("3142"))[0]["prompt_ids"]) == "<s>3142="


@pytest.mark.parametrize(
    ("template", "stops", "end"),
    [
        (TURNS, [1, 98], 98),  # Llama-3 and Gemma: a turn ends otherwise than a text
        (TURNS, [1], 1),  # what ends a turn does not end an answer
        (NO_BOS, 1, 1),  # no token between the turns
        (None, None, 1),
    ],
)
def test_an_answer_ends_with_the_token_that_ends_a_turn(tokenizer, template, stops, end):
    tokenizer.add_tokens(["<|end|>"], special_tokens=True)
    tokenizer.chat_template, policy = template, build()
    policy.generation_config.eos_token_id = stops
    assert common.stop_ids(policy, tokenizer) == (stops if template == TURNS else [1])
    ids = [*tokenizer("12").input_ids, end]
    assert common.as_response(policy, tokenizer, "12", 3) == {"text": "12", "ids": ids, "finished": True}
    assert common.as_response(policy, tokenizer, "12", 2) == {"text": "12", "ids": ids[:2], "finished": False}


def test_rows_that_cannot_be_prompts_are_left_out_and_counted(tokenizer, capsys):
    tokenizer.add_tokens(["<|im_end|>", "  "])  # the template writes it; the blanks are text, as in GPT-NeoX
    tokenizer.chat_template = ONE_TURN + "<|im_end|>"
    texts = ["1", "a</s>", "a <|im_end|> b", "a  b", "x" * 50, "(</s", "é <unk>"]
    rows = [{"prompt": user(text)} for text in texts] + [{"prompt": user("1") * 2}]
    rows += [{"prompt": user("2"), "chosen": "3", "rejected": x} for x in ("4", "<s>")]
    kept = encode_prompts(tokenizer, rows, 12, "--pairs")
    assert [row["prompt"][0]["content"] for row in kept] == ["1", "a  b", "(</s", "é <unk>", "2"]
    said = capsys.readouterr().out
    for words in ("3 of 10 left out: with a control token", "1 of 10 left out: over --max_prompt_tokens 12"):
        assert f"--pairs: {words}" in said
    assert "1 of 10 left out: rejected by the chat template" in said
    with pytest.raises(SystemExit):
        encode(tokenizer, user("</s>"), max_tokens=9)
    assert "--prompts: none is left: all are with a control token" in capsys.readouterr().err
