"""A real model on real text: SmolLM2-135M-Instruct (smollm2.py) on rows of HH-RLHF (hh_rows.jsonl; Anthropic, MIT).

Skipped where the packages are missing; the model is made once, in the folder for temporary files.
"""

import contextlib
from pathlib import Path

import pytest
import smollm2
import torch
from steps import cli, last_line, lines

import common
import dno
import sppo
import sr_dpo

pytestmark = pytest.mark.skipif(smollm2.missing() != [], reason=f"not installed: {', '.join(smollm2.missing())}")
FILE = Path(__file__).resolve().parent / "hh_rows.jsonl"


@pytest.fixture(scope="module", autouse=True)
def two_threads():
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folder():
    return str(smollm2.make())


@pytest.fixture(scope="module")
def real(folder):
    return common.load_policy(folder)


@pytest.fixture(scope="module")
def pairs():
    with contextlib.redirect_stdout(None):
        return common.load_rows("--pairs", str(FILE), sr_dpo.read_pair)


@torch.no_grad()
def test_greedy_samples_are_those_of_transformers(real, pairs):
    policy, tokenizer = real
    chat, right = common.Chat(policy, tokenizer), []
    prompts = [chat.prompt_ids(pair["prompt"]) for pair in pairs[:12]]
    for prompt in prompts:
        ids = torch.tensor([prompt])
        more = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": chat.stops}
        right.append(policy.generate(ids, attention_mask=torch.ones_like(ids), **more)[0, len(prompt) :].tolist())
    found = common.generate(policy, prompts, k=1, max_new_tokens=16, temperature=0, eos_ids=chat.stops, slots=5)
    assert [y for (y,) in found] == right
    assert {y[-1] in chat.stops for y in right} == {True, False}  # some end, some are cut


def test_ids_of_given_answers_are_those_of_the_whole_conversation(real, pairs):
    policy, tokenizer = real
    chat = common.Chat(policy, tokenizer)
    assert tokenizer.convert_ids_to_tokens(chat.stops) == ["<|im_end|>"]
    for pair in pairs:
        for answer in (pair["chosen"], pair["rejected"]):
            y = chat.response(pair["prompt"], answer, 999)
            turns = [*pair["prompt"], {"role": "assistant", "content": answer}]
            whole = tokenizer.apply_chat_template(turns)["input_ids"]
            assert [*chat.prompt_ids(pair["prompt"]), *y["ids"]] == whole[:-1]  # less the line's end behind the turn's
            assert y["finished"] and y["text"] == answer and tokenizer.decode(y["ids"][:-1]) == answer


@torch.no_grad()
def test_log_probs_are_within_1e_3_nats_of_float64(real, pairs, folder):
    policy, tokenizer = real
    chat, exact = common.Chat(policy, tokenizer), common.load_policy(folder)[0].double()
    pairs = sorted(pairs, key=lambda pair: len(pair["chosen"]))[-4:]  # the longest answers
    rows = [(chat.prompt_ids(x := pair["prompt"]), chat.response(x, pair["chosen"], 999)["ids"]) for pair in pairs]
    found = common.response_logps(policy, *zip(*rows, strict=True))
    for (x, y), logp in zip(rows, found.tolist(), strict=True):
        logits = exact(input_ids=torch.tensor([x + y])).logits[0, len(x) - 1 : -1]
        right = logits.log_softmax(-1).gather(1, torch.tensor(y)[:, None]).sum().item()
        assert logp == pytest.approx(right, abs=1e-3) and right < -20


@pytest.mark.parametrize("script", [sppo, dno, sr_dpo], ids=lambda script: script.__name__)
def test_a_short_run(script, folder, workdir, monkeypatch, capsys):
    def shorter(prompts, responses):
        n = torch.tensor([[float(len(y)) for y in texts] for texts in responses])
        return torch.sigmoid(n[:, None, :] - n[:, :, None])

    monkeypatch.setitem(common.JUDGES, "shorter", lambda args: shorter)
    flags = {"model": folder, "judge": "shorter", "n_eval": 2, "max_prompt_tokens": 256, "max_new_tokens": 8}
    flags |= {"epochs": 1, "batch_size": 4, "learning_rate": 1e-5, "device": "cpu", "name": "x", "limit": 10}
    flags |= {"checkpointing": False, "micro_tokens": 2048}  # faster
    flags |= {"pairs": FILE} if script is sr_dpo else {"prompts": FILE, "iterations": 1, "k": 2, "eta": 1.0}
    flags |= {"gold": FILE} if script is dno else {}
    cli(script, *(f"--{name}={value}" for name, value in flags.items()))
    said, table = capsys.readouterr().out, lines(Path("runs/x/metrics.jsonl"))
    assert (
        len(table) == 2
        and table[1]["pairs"] >= 3
        and 0 <= table[1]["wins_vs_start"] <= 1
        and 0 not in [table[1].get(name) for name in ("kl", "logp_drop")]
    )
    assert "[0] " in said and last_line(table) in said and "the chat template" not in said
    policy, _ = common.load_policy("runs/x/iter_1/policy")
    assert common.response_logps(policy, [[1, 2]], [[3, 2]]).isfinite().all()
