"""More architectures than in test_generate.py, small and with random weights: right in float32 and bf16, or refused.

python tests/test_architectures.py --table [FAMILY ...]     prints the table of tests/README.md, in 10 minutes
"""

import dataclasses
import random
import re
import sys
import tempfile

import conftest  # noqa: F401
import pytest
import torch
import transformers as hf
from steps import stopped
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import common

V, WINDOW = 101, {"sliding_window": 4, "layer_types": 2 * ["sliding_attention", "full_attention"]}
SIZES = {  # a configuration takes those that it knows
    "vocab_size": V, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256, "initializer_range": 0.3,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None, "sliding_window": 30, "rotary_dim": 4,
    "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 256, "num_layers": 4, "num_heads": 4, "ffn_dim": 48,
    "d_model": 32, "n_layers": 4, "n_heads": 4, "max_seq_len": 256, "decoder_layers": 4, "decoder_attention_heads": 4,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2,
    "moe_k": 2, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
    "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24, "kv_lora_rank": 8, "q_lora_rank": 8,
    "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "mamba_d_state": 8, "mamba_n_heads": 4,
    "mamba_d_head": 16, "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8, "vocab_size_per_layer_input": V, "hidden_size_per_layer_input": 8,
}  # fmt: skip
MORE = {  # what a family takes beside SIZES, so that the small one has all that the large one has
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": 10},
    "gemma2": {**WINDOW, "final_logit_softcapping": 3.0, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 8},
    "lfm2": {"layer_types": 2 * ["conv", "full_attention"]},
    "qwen3_next": {"layer_types": 2 * ["linear_attention", "full_attention"]},
    "qwen3_5_text": {"layer_types": 2 * ["linear_attention", "full_attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "bamba": {"attn_layer_indices": [1]},
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 4.0},
    "qwen2_moe": {"use_sliding_window": True, "max_window_layers": 0},
}
HEADS = ["cohere", "gemma2", "granite"]
RIGHT = [*HEADS, "exaone4", "gemma", "glm", "llama", "olmo2", "opt", "persimmon", "qwen2", "qwen2_moe", "qwen3"]
REFUSED = {  # and a word of the reason
    "mpt": "AttentionInterface",  # ALiBi
    "gpt_oss": "sinks",
    "codegen": "its head",
    "deepseek_v3": "attention or cache",  # keys and values of different sizes
    "jamba": "linear_attention",
    "rwkv": "AttentionInterface",
    "gpt_neo": "local",
    "doge": "a mask of its own",
    "gemma4_text": "head_dim",
    "plbart": "at given positions",  # takes none
}


def known(config_class, settings):
    names = {field.name for field in dataclasses.fields(config_class)} | config_class.attribute_map.keys()
    return {name: value for name, value in settings.items() if name in names}


def small_config(family, without=""):
    """A small configuration, of a family that also sees its text part, without what matches `without`."""
    config_class, settings = hf.CONFIG_MAPPING[family], SIZES | MORE.get(family, {})
    settings = {name: value for name, value in settings.items() if not re.fullmatch(without, name)}
    if "text_config" in config_class.sub_configs:
        return config_class(text_config=known(config_class.sub_configs["text_config"], settings))
    return config_class(**known(config_class, settings))


def build(family, dtype=torch.float32):
    """A small model that runs, with random weights far from uniform, norms and biases too."""
    latent = "num_key_value_heads|head_dim|v_head_dim|.*_lora_rank|qk_.*"  # sizes of latent attention
    for without in ("", "head_dim", "sliding_window", "head_dim|sliding_window", "(pad|bos)_token_id", latent):
        try:
            config = small_config(family, without)
            with torch.device("meta"):
                size = hf.AutoModelForCausalLM.from_config(config).num_parameters()
            assert size < 2e7, "too large"
            torch.manual_seed(1)
            policy = hf.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
            policy(input_ids=torch.tensor([[5, 6, 7]]))
            break
        except Exception as error:
            failed = error
    else:
        raise failed
    for name, p in policy.named_parameters():
        if p.ndim > 1 and not p.std() > 0.05:  # some take no notice of initializer_range
            p.data.normal_(0, 0.3)
        elif p.ndim == 1 and not re.search(r"A_log|\.D$|dt_bias", name):
            p.data.add_(0.2 * torch.randn_like(p))
    return policy.to(dtype)


@torch.no_grad()
def errors(policy):
    """Against the model's own forward the largest lack of a greedy token's logit, as a share, and error of a log-prob,
    in nats; and whether transformers' generate is greedy with the same tokens.
    """
    rng, lack, nats, same = random.Random(5), 0.0, 0.0, True
    prompts = [rng.choices(range(2, V), k=n) for n in (60, 3, 17)]
    samples = common.generate(policy, prompts, k=2, max_new_tokens=20, temperature=0, eos_ids=[], slots=2)
    logps = common.response_logps(policy, prompts, [y for y, _ in samples]).tolist()
    for x, (y, again), logp in zip(prompts, samples, logps, strict=True):
        logits = policy(input_ids=torch.tensor([x + y])).logits[0, len(x) - 1 : -1].double()
        picked = logits.gather(1, torch.tensor(y)[:, None])[:, 0]
        lack = max(lack, (logits.amax(1) - picked).max().item() / logits.abs().max().item(), float(y != again))
        nats = max(nats, abs((picked - logits.logsumexp(1)).sum().item() - logp))
        policy.generation_config = hf.GenerationConfig(max_new_tokens=20, pad_token_id=0)
        same &= policy.generate(torch.tensor([x]))[0, len(x) :].tolist() == y
    return lack, nats, same


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", RIGHT)
def test_log_probs_and_greedy_samples_are_those_of_the_models_own_forward(family, dtype):
    if family == "qwen2_moe" and dtype == torch.bfloat16:
        pytest.skip("where two experts are nearly as good, rounding decides which one is asked")
    policy = build(family, dtype)
    common.check_architecture(policy, family)  # refuses nothing
    lack, nats, same = errors(policy)
    assert (lack < 1e-5 and nats < 5e-4 and same) if dtype == torch.float32 else (lack < 0.02 and nats < 0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", REFUSED)
def test_what_would_be_computed_wrongly_is_refused_in_either_dtype(family, dtype, capsys):
    said = stopped(capsys, common.check_architecture, build(family, dtype), family)
    assert f"--model {family}: " in said and REFUSED[family] in said


@pytest.mark.parametrize("family", HEADS)
def test_a_head_of_an_unknown_kind_is_found_by_its_numbers(family, monkeypatch, capsys):
    monkeypatch.setattr(common, "head_of", lambda policy: {"weight": policy.get_output_embeddings().weight})
    assert "head are not those of a plain" in stopped(capsys, common.check_architecture, build(family), family)


def test_a_bias_that_depends_on_the_distance_does_not_pass_by_chance(monkeypatch, capsys):
    """As if sampling had other positions than the model's own forward."""
    policy = build("gpt2", torch.bfloat16)
    forward = type(policy.base_model).forward

    def shifted(self, *args, position_ids=None, **kwargs):
        return forward(self, *args, position_ids=None if position_ids is None else position_ids // 2, **kwargs)

    monkeypatch.setattr(type(policy.base_model), "forward", shifted)
    assert "its cache, masks or head" in stopped(capsys, common.check_architecture, policy, "shifted")


def verdict(family, folder):
    """What becomes of a family, in a few words."""
    try:
        policy = build(family)
    except Exception as error:
        print(f"{family}: {error}"[:150].replace("\n", " "), file=sys.stderr)
        return "not tried: this script builds no small one"
    try:
        common.check_architecture(policy, "")
    except common.UserError as error:
        print(f"{family}: {error}"[:150], file=sys.stderr)
        kinds = {"AttentionInterface": "not all layers are plain attention", "its head": "its head"}
        kinds |= {"its attention or cache": "sinks, masks, caches or sizes of its own"}
        other = "other numbers than its own forward"
        return "refused: " + next((kind for word, kind in kinds.items() if word in str(error)), other)
    lack, nats, same = errors(policy)
    if lack > 1e-5 or nats > 5e-4:
        return f"WRONG: {lack:.1e} of a logit, {nats:.1e} nats"
    if not same:
        return "as its own forward, but not as transformers' generate"
    policy.save_pretrained(folder)
    policy = hf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    try:
        common.check_architecture(policy, "")
    except common.UserError as error:
        print(f"{family}: {error}"[:150], file=sys.stderr)
        why = "its router stays float32" if "stays" in str(error) else "too noisy"
        return f"right in float32, refused in bf16: {why}"
    lack, nats, _ = errors(policy)
    return "right" if lack < 0.03 and nats < 0.5 else "right in float32; in bf16 rounding decides between experts"


def table(families):
    found = {}
    for family in families or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        with tempfile.TemporaryDirectory() as folder:
            found.setdefault(verdict(family, folder), []).append(family)
    print("| verdict | families |\n|---|---|")
    for what in sorted(found):
        print(f"| {what} ({len(found[what])}) | {', '.join(found[what])} |")


if __name__ == "__main__":
    hf.logging.set_verbosity_error(), hf.logging.disable_progress_bar()
    table([word for word in sys.argv[1:] if word != "--table"])
