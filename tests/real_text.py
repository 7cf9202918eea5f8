"""DPO against Sr-DPO on real text: a small language model, made on the spot from a file of preference pairs.

    python tests/real_text.py FILE.jsonl.gz        half an hour on two CPU cores for 2,300 pairs of HH-RLHF

The record is of Anthropic/hh-rlhf, harmless-base, test. Per seed a Llama of 3 M parameters and a BPE of 4,096 tokens
learn the training pairs in --epochs passes: both answers to a prompt, and behind p (REFINE_PROMPTS["short"]) the chosen
one, so that p means something. sr_dpo.py then trains this start with --lam 0 and with --lam. The means over seeds are
printed, each seed's figures written to tests/claims/results/real_text.json.
"""

import argparse
import random
import shlex
import sys
import time
from pathlib import Path
from statistics import mean, stdev

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import measure
import sr_dpo
from measure import common

TEMPLATE = "<s>{% for m in messages %}{{ '\n\nHuman: ' if m.role == 'user' else '\n\nAssistant: ' }}{{ m.content }}"
TEMPLATE += "{{ '' if m.role == 'user' else '</s>' }}{% endfor %}{{ '\n\nAssistant:' if add_generation_prompt }}"
SETTINGS = {"judge": "", "refine_prompt": "short", "beta": 0.1, "max_prompt_tokens": 320, "max_new_tokens": 160}
SETTINGS |= {"n_eval": 400, "epochs": 1, "learning_rate": 1e-4, "batch_size": 32, "micro_tokens": 4096, "slots": 64}
MEASURES = "accuracy", "accuracy_p", "marginal", "marginal_p", "kl", "tokens"


def make_tokenizer(texts):
    tokenizer, alphabet = Tokenizer(models.BPE()), pre_tokenizers.ByteLevel.alphabet()
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=4096, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts, trainer)
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=TEMPLATE, **special)


def supervise(policy, pairs, epochs, seed):
    """Both answers behind x, the chosen one behind p + x."""
    rows = [{"prompt_ids": pair["prompt_ids"], "responses": [y]} for pair in pairs for y in pair["responses"]]
    rows += [{"prompt_ids": pair["refined_ids"], "responses": pair["responses"][:1]} for pair in pairs]
    rng, steps = random.Random(seed), epochs * len(rows) // 32
    optimizer = torch.optim.AdamW(policy.parameters(), lr=2e-3, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
    for _ in range(steps):
        batch = rng.sample(rows, 32)
        n = sum(len(row["responses"][0]["ids"]) for row in batch)
        for micro in common.micro_batches(policy, batch, 4096):
            (-common.pair_logps(policy, micro).sum() / n).backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


def per_token(policy, pairs, prompt_ids):
    """Nats per token of the held-out chosen answers."""
    rows = [{**pair, "responses": pair["responses"][:1]} for pair in pairs]
    common.add_logps(policy, rows, "logps", 4096, prompt_ids)
    return -sum(row["logps"][0] for row in rows) / sum(len(row["responses"][0]["ids"]) for row in rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs")
    for flag, default in {"seeds": 3, "epochs": 4, "lam": 0.3, "limit": 0}.items():
        parser.add_argument(f"--{flag}", type=type(default), default=default)
    args = parser.parse_args()
    settings = {**SETTINGS, "pairs": args.pairs, "limit": args.limit}
    tables, starts, stamp = {"DPO": [], "Sr-DPO": []}, [], time.strftime("%Y%m%d-%H%M%S")
    for seed in range(1, args.seeds + 1):
        pairs = common.load_pairs(args.pairs, args.limit)
        prompts = [m["content"] for pair in pairs for m in pair["prompt"]]
        tokenizer = make_tokenizer(prompts + [pair["chosen"] for pair in pairs])
        sizes = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 6}
        sizes |= {"vocab_size": len(tokenizer), "max_position_embeddings": 1024, "tie_word_embeddings": True}
        ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
        torch.manual_seed(seed)
        policy = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **ends)).eval()
        one = sr_dpo.Args(**settings, seed=seed)
        (pairs,), held_out = common.split_rows(policy, tokenizer, sr_dpo.make_pairs(policy, tokenizer, pairs, one), one)
        supervise(policy, pairs, args.epochs, seed)
        starts.append((per_token(policy, held_out, "prompt_ids"), per_token(policy, held_out, "refined_ids")))
        print(f"seed {seed}: {policy.num_parameters():,} parameters, nats per token {starts[-1]}")
        common.save_policy(policy, tokenizer, folder := f"runs/real-{stamp}-s{seed}")
        for method, lam in zip(tables, (0.0, args.lam), strict=True):
            run = {"model": folder, "lam": lam, "name": f"real-{stamp}-{method.lower()}-s{seed}"}
            tables[method].append(sr_dpo.main(sr_dpo.Args(**settings, **run, seed=seed))[-1])
    plain, refined = map(list, zip(*starts, strict=True))
    print(f"\nnats per token of held-out chosen answers: {mean(plain):.3f} behind x, {mean(refined):.3f} behind p + x")
    print(f"{'':<22}" + "".join(f"{method:>20}" for method in tables))
    figures = {method: {name: [row[name] for row in rows] for name in MEASURES} for method, rows in tables.items()}
    for name in MEASURES:
        cells = (f"{mean(v[name]):.3g} ± {stdev(v[name]) if len(v[name]) > 1 else 0:.2g}" for v in figures.values())
        print(f"{name:<22}" + "".join(f"{cell:>20}" for cell in cells))
    words = [Path(word).name if word == args.pairs else word for word in sys.argv[1:]]  # no path
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    result = {"command": shlex.join(["python", "tests/real_text.py", *words]), "date": time.strftime("%Y-%m-%d")}
    result |= {"where": f"{measure.cpu()}, {torch.get_num_threads()} threads; {versions}", "seeds": args.seeds}
    result |= {"parameters": policy.num_parameters(), "pairs": len(pairs), "held out": len(held_out)}
    result |= {"figures": figures, "start, nats per token": {"behind x": plain, "behind p + x": refined}}
    measure.write("real_text", result)


if __name__ == "__main__":
    main()
