"""Trains the built-in model `tiny`, which is kept in .tiny: python tests/make_tiny.py FOLDER (15 seconds)."""

import random
import sys
from pathlib import Path

import tokenizers
import torch
import transformers
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import response_logps, save_policy


def make_tiny(folder, steps=300):
    """Make `tiny` in a folder and return that: a character-level Mistral of 0.46 M parameters that sorts digits.

    It is trained on noisy answers, and on clean ones when the prompt starts with "100/100: ", the p of sr_dpo.py.
    """
    vocab = {token: i for i, token in enumerate(["<s>", "</s>", "<unk>", *map(chr, range(32, 127))])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges=[], unk_token="<unk>"))
    tokenizer.decoder = tokenizers.decoders.Fuse()
    template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ '=' if m.role == 'user' else eos_token }}"
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, chat_template=template + "{% endfor %}",
        bos_token="<s>", eos_token="</s>", unk_token="<unk>",
    )  # fmt: skip
    config = transformers.MistralConfig(
        vocab_size=len(vocab), hidden_size=128, num_hidden_layers=3, intermediate_size=256, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, sliding_window=None, tie_word_embeddings=True,
        bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    rng, digits = random.Random("tiny"), "0123456789"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        policy = transformers.MistralForCausalLM(config).eval()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=2.5e-3, betas=(0.9, 0.98), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2.5e-3, total_steps=steps, pct_start=0.1)
    for _ in tqdm(range(steps), desc="making tiny", leave=False, disable=None):
        for p, noise in (("", 0.28), ("100/100: ", 0.0)):  # noise: the share of digits that are replaced
            prompts, responses = [], []
            for _ in range(24):
                question = "".join(rng.choices(digits, k=rng.randint(4, 8)))
                answer = "".join(rng.choice(digits) if rng.random() < noise else d for d in sorted(question))
                prompts.append(tokenizer(f"<s>{p}{question}=").input_ids)
                responses.append(tokenizer(f"{answer}</s>").input_ids)
            loss = -response_logps(policy, prompts, responses).sum() / sum(map(len, responses)) / 2
            loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    save_policy(policy, tokenizer, folder)
    return folder


if __name__ == "__main__":
    torch.set_num_threads(1)
    make_tiny(Path(sys.argv[1]))
