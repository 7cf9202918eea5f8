import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from common import CHUNK, micro_batches, response_logps, score, token_logps

SIZES = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def llama(**more):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2, initializer_range=0.3, **more)).eval()


def mistral_with_window():
    torch.manual_seed(0)
    config = MistralConfig(**SIZES, num_key_value_heads=2, initializer_range=0.3, sliding_window=4)
    return MistralForCausalLM(config).eval()


def gpt2(dropout=0.0):
    torch.manual_seed(0)
    drops = {"resid_pdrop": dropout, "attn_pdrop": dropout, "embd_pdrop": dropout}
    return GPT2LMHeadModel(GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=4, **drops)).eval()


POLICIES = {"llama": llama, "mistral-window": mistral_with_window, "gpt2": gpt2}
PROMPTS = [[1, 5, 9], [1], [1, 7, 7, 7, 7, 7, 2, 40], [3, 3]]
RESPONSES = [[8, 9, 2], [4, 4, 4, 4, 4, 4, 4, 2], [2], [60, 0, 0]]  # with id 0, the padding, and 2, an EOS, inside


def softmax_by_hand(hidden, weight, target, bias=None, scale=1.0, softcap=0.0):
    """Source: the definition, in float64, one token at a time."""
    logits = [float(weight[v].double() @ hidden.double()) + (0 if bias is None else float(bias[v])) for v in range(61)]
    logits = torch.tensor(logits, dtype=torch.float64) * scale
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    return (logits[target].exp() / logits.exp().sum()).log()


@pytest.mark.parametrize("options", [{}, {"bias": True}, {"scale": 0.25}, {"softcap": 3.0}], ids=str)
def test_token_logps_is_log_softmax_of_the_head(options):
    torch.manual_seed(1)
    hidden, weight, targets = torch.randn(7, 16), torch.randn(61, 16), torch.randint(61, (7,))
    options = {**options, "bias": torch.randn(61)} if "bias" in options else options
    right = [softmax_by_hand(h, weight, t, **options) for h, t in zip(hidden, targets, strict=True)]
    got = token_logps(hidden, weight, targets, **options)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), torch.stack(right), atol=1e-5, rtol=0)


def test_token_logps_gradients():
    torch.manual_seed(1)
    hidden, weight = torch.randn(5, 4, dtype=torch.float64), torch.randn(9, 4, dtype=torch.float64)
    bias, targets = torch.randn(9, dtype=torch.float64), torch.randint(9, (5,))

    def all_options(hidden, weight, bias):
        return token_logps(hidden, weight, targets, bias=bias, scale=0.7, softcap=2.0)

    assert torch.autograd.gradcheck(all_options, [x.requires_grad_() for x in (hidden, weight, bias)])


def test_token_logps_in_chunks_equals_one_piece():
    torch.manual_seed(1)
    n = 2 * CHUNK + 3
    hidden, weight, targets = torch.randn(n, 8), torch.randn(11, 8), torch.randint(11, (n,))
    hidden.requires_grad_(), weight.requires_grad_()
    whole = torch.log_softmax(hidden @ weight.T, -1).gather(1, targets[:, None])[:, 0]
    g = torch.randn(n)
    pieces = token_logps(hidden, weight, targets)
    torch.testing.assert_close(pieces, whole)
    for mine, right in zip(*(torch.autograd.grad(x @ g, [hidden, weight]) for x in (pieces, whole)), strict=True):
        torch.testing.assert_close(mine, right, atol=1e-4, rtol=1e-4)


def test_token_logps_of_no_tokens():
    assert token_logps(torch.zeros(0, 4), torch.zeros(9, 4), torch.zeros(0, dtype=torch.long)).shape == (0,)


def test_token_logps_rejects_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match=r"hidden \(N, D\)"):
        token_logps(torch.zeros(3, 4), torch.zeros(9, 5), torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match="targets"):
        token_logps(torch.zeros(3, 4), torch.zeros(9, 4), torch.zeros(2, dtype=torch.long))


def test_sums_of_bf16_models_keep_float32_precision():
    """Log-probs summed in bf16 came back as -2240 instead of -2247.9 in admired code."""
    torch.manual_seed(1)
    hidden, weight = torch.randn(400, 64).bfloat16(), (0.3 * torch.randn(1000, 64)).bfloat16()
    targets = torch.randint(1000, (400,))
    right = torch.log_softmax(hidden.double() @ weight.double().T, -1).gather(1, targets[:, None]).sum()
    got = token_logps(hidden, weight, targets)
    assert got.dtype == torch.float32 and right < -2000
    assert abs(got.sum().double() - right) < 1e-2


@pytest.mark.parametrize("name", POLICIES)
def test_response_logps_is_the_sum_over_the_response_alone(name):
    policy = POLICIES[name]()
    right = []
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
        total = 0.0
        for n, token in enumerate(response):  # one row, no padding, one token at a time
            logits = policy(torch.tensor([prompt + response[:n]])).logits[0, -1].double()
            total += torch.log_softmax(logits, -1)[token].item()
        right.append(total)
    torch.testing.assert_close(response_logps(policy, PROMPTS, RESPONSES), torch.tensor(right), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", POLICIES)
def test_a_row_depends_neither_on_its_batch_mates_nor_on_their_order(name):
    policy = POLICIES[name]()
    together = response_logps(policy, PROMPTS, RESPONSES)
    alone = [response_logps(policy, [x], [y]) for x, y in zip(PROMPTS, RESPONSES, strict=True)]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=0)
    backwards = response_logps(policy, PROMPTS[::-1], RESPONSES[::-1]).flip(0)
    torch.testing.assert_close(together, backwards, atol=1e-5, rtol=0)
    for max_tokens in (1, 13, 10_000):
        torch.testing.assert_close(together, score(policy, PROMPTS, RESPONSES, max_tokens), atol=1e-5, rtol=0)


def test_eos_is_part_of_the_response_even_when_it_is_the_padding_id():
    """With masks made by `ids == pad` the EOS would drop out, and the policy would never learn to stop."""
    policy, eos = llama(eos_token_id=0, pad_token_id=0), 0
    with_eos, without = response_logps(policy, [[1, 5], [1, 5]], [[8, 9, eos], [8, 9]])
    log_eos = torch.log_softmax(policy(torch.tensor([[1, 5, 8, 9]])).logits[0, -1], -1)[eos]
    torch.testing.assert_close(with_eos - without, log_eos, atol=1e-5, rtol=0)
    with_eos.backward()
    before = log_eos.item()
    with torch.no_grad():
        for p in policy.parameters():
            p += 1e-3 * p.grad
    after = torch.log_softmax(policy(torch.tensor([[1, 5, 8, 9]])).logits[0, -1], -1)[eos]
    assert after > before


def test_prompt_tokens_never_reach_the_head(monkeypatch):
    import common

    rows = []
    monkeypatch.setattr(common, "token_logps", lambda h, **head: rows.append(len(h)) or token_logps(h, **head))
    response_logps(llama(), PROMPTS, RESPONSES)
    assert rows == [sum(map(len, RESPONSES))]


@pytest.mark.parametrize(("prompts", "responses"), [([[]], [[1]]), ([[1]], [[]]), ([[1], [2]], [[1]])])
def test_response_logps_rejects_what_has_no_log_prob(prompts, responses):
    with pytest.raises(ValueError, match="response_logps wants"):
        response_logps(llama(), prompts, responses)


def test_micro_batches_hold_every_row_once_within_the_budget():
    lengths = torch.randint(1, 50, (200,), generator=torch.Generator().manual_seed(0)).tolist()
    for budget in (1, 60, 500, 10**6):
        batches = micro_batches(lengths, budget)
        assert sorted(i for rows in batches for i in rows) == list(range(200))
        assert all(len(rows) == 1 or len(rows) * max(lengths[i] for i in rows) <= budget for rows in batches)
    padded = sum(len(rows) * max(lengths[i] for i in rows) for rows in micro_batches(lengths, 500))
    assert padded < 1.15 * sum(lengths)  # similar lengths together; batches of ten in file order would pad by 0.9
