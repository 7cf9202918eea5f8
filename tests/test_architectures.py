"""More architectures than in test_generate.py, small and with random weights: right in float32 and bf16, or refused."""

import pytest
import torch
import transformers as hf
from steps import stopped

import common
import test_generate

SIZES = {**test_generate.SIZES, "vocab_size": 101, "num_hidden_layers": 2, "max_position_embeddings": 256}
SIZES |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}
PLAIN = ["Ernie4_5", "GPT2", "InternLM3", "Mixtral", "Nemotron", "OPT", "Olmo2", "Olmo3", "Persimmon"]
PLAIN += ["Qwen2", "Qwen3Moe", "SeedOss", "SmolLM3", "StableLm", "Starcoder2"]
RIGHT = {name: {} for name in PLAIN}  # the class of a configuration, but for "Config"; what it takes beside SIZES
RIGHT["Qwen2Moe"] = {"use_sliding_window": True, "sliding_window": 30, "max_window_layers": 0}
RIGHT |= {name: {"head_dim": 8} for name in ("Exaone4", "Gemma", "Glm4", "Helium")}
WINDOW = {"sliding_window": 4, "head_dim": 8, "layer_types": ["sliding_attention", "full_attention"]}
CAPS = {"final_logit_softcapping": 3.0, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 8}
HEADS = {"Gemma2": WINDOW | CAPS, "Cohere": {"logit_scale": 0.25}, "Granite": {"logits_scaling": 4.0}}
REFUSED = {  # and a word of the reason
    "Mpt": "AttentionInterface",  # ALiBi
    "GptOss": "sinks",
    "Bloom": "AttentionInterface",  # ALiBi
    "CodeGen": "its head",
    "DeepseekV3": "architecture is not supported",  # keys and values of different sizes
    "GPTJ": "its head",
    "Jamba": "linear_attention",
    "Mamba": "linear_attention",
    "Rwkv": "AttentionInterface",
    "Falcon": "AttentionInterface",
    "GPTNeo": "local",
}
LOCAL = {"attention_types": [[["global", "local"], 1]], "num_layers": 2, "num_heads": 4, "window_size": 10}
MORE = {"Mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 256}, "GptOss": {"head_dim": 8}}
MORE["GPTNeo"] = {**LOCAL, "num_hidden_layers": 2}


def build(name, dtype, **more):
    torch.manual_seed(1)
    config = getattr(hf, f"{name}Config")(**SIZES | more)
    policy = hf.AutoModelForCausalLM.from_config(config).to(dtype).eval()
    for p in policy.parameters():
        if p.ndim > 1 and p.std() < 0.05:  # some take no notice of initializer_range
            p.data.normal_(0, 0.3)
    return policy


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", RIGHT | HEADS)
@torch.no_grad()
def test_log_probs_and_greedy_samples_are_those_of_the_models_own_forward(name, dtype):
    if name in ("Mixtral", "Qwen2Moe", "Qwen3Moe") and dtype == torch.bfloat16:
        pytest.skip("where two experts are nearly as good, rounding decides which one is asked")
    policy = build(name, dtype, **(RIGHT | HEADS)[name])
    common.check_architecture(policy, name)  # does not exit
    prompts = [torch.randint(2, 101, (n,)).tolist() for n in (60, 3, 17)]
    samples = common.generate(policy, prompts, k=2, max_new_tokens=20, temperature=0, eos_ids=[], slots=2)
    for x, (y, again) in zip(prompts, samples, strict=True):
        logits = policy(input_ids=torch.tensor([x + y])).logits[0, len(x) - 1 : -1].double()
        picked = logits.gather(1, torch.tensor(y)[:, None])[:, 0]
        noise = 1e-4 if dtype == torch.float32 else 0.02 * logits.abs().max().item()
        assert y == again and (logits.amax(1) - picked).max().item() < noise
        logp = common.response_logps(policy, [x, prompts[1]], [y, [5]])[0].item()
        assert logp == pytest.approx((picked - logits.logsumexp(1)).sum().item(), abs=len(y) * noise / 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", REFUSED)
def test_what_would_be_computed_wrongly_is_refused_in_either_dtype(name, dtype, capsys):
    said = stopped(capsys, common.check_architecture, build(name, dtype, **MORE.get(name, {})), name)
    assert f"--model {name}: " in said and REFUSED[name] in said


@pytest.mark.parametrize("name", HEADS)
def test_a_head_of_an_unknown_kind_is_found_by_its_numbers(name, monkeypatch, capsys):
    monkeypatch.setattr(common, "head_of", lambda policy: {"weight": policy.get_output_embeddings().weight})
    policy = build(name, torch.float32, **HEADS[name])
    assert "head are not those of a plain" in stopped(capsys, common.check_architecture, policy, name)


def test_a_bias_that_depends_on_the_distance_does_not_pass_by_chance(monkeypatch, capsys):
    """As if sampling had other positions than the model's own forward."""
    policy = build("GPT2", torch.bfloat16)
    forward = type(policy.base_model).forward

    def shifted(self, *args, position_ids=None, **kwargs):
        return forward(self, *args, position_ids=None if position_ids is None else position_ids // 2, **kwargs)

    monkeypatch.setattr(type(policy.base_model), "forward", shifted)
    assert "its cache, masks or head" in stopped(capsys, common.check_architecture, policy, "shifted")
