"""DPO against Sr-DPO on real text: a small language model, made on the spot from a file of preference pairs.

    python tests/real_text.py FILE.jsonl.gz        half an hour on two CPU cores for 2,300 pairs of HH-RLHF

Any file that `sr_dpo.py --pairs` reads will do; the README's figures are of Anthropic/hh-rlhf, harmless-base, test.
Per seed a Llama of 3 M parameters and a BPE of 4,096 tokens learn the pairs that are not held out: both answers to a
prompt, and behind p (REFINE_PROMPTS["short"]) the chosen one, so that p means something to it, as it does to a model
that has been told to follow instructions. This start is then trained by sr_dpo.py with --lam 0 and with --lam; held-out
pairs are the same for both. It prints mean and standard deviation over seeds, and writes each seed's figures to
tests/claims/results/real_text.json.
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

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common
import sr_dpo
from measure import cpu, write

TEMPLATE = (
    "<s>{% for m in messages %}{{ '\n\nHuman: ' if m['role'] == 'user' else '\n\nAssistant: ' }}{{ m['content'] }}"
    "{{ '' if m['role'] == 'user' else '</s>' }}{% endfor %}{{ '\n\nAssistant:' if add_generation_prompt }}"
)


def make_tokenizer(texts):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=4096, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts, trainer)
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=TEMPLATE, **special)


def supervise(policy, pairs, epochs, seed):
    """Both answers behind x, the chosen one behind p + x."""
    rows = [{"prompt_ids": pair["prompt_ids"], "responses": [y]} for pair in pairs for y in pair["responses"]]
    rows += [{"prompt_ids": pair["refined_ids"], "responses": pair["responses"][:1]} for pair in pairs]
    optimizer = torch.optim.AdamW(policy.parameters(), lr=2e-3, weight_decay=0.1)
    steps = epochs * len(rows) // 32
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
    rng = random.Random(seed)
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
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=4, help="passes of the supervised start")
    parser.add_argument("--lam", type=float, default=0.3)
    parser.add_argument("--limit", type=int, default=0)
    args = parser.parse_args()
    settings = {"pairs": args.pairs, "judge": "", "limit": args.limit, "refine_prompt": "short", "beta": 0.1}
    settings |= {"max_prompt_tokens": 320, "max_new_tokens": 160, "n_eval": 400, "epochs": 1, "learning_rate": 1e-4}
    settings |= {"batch_size": 32, "micro_tokens": 4096, "slots": 64}
    print(f"{args.pairs}, {args.seeds} seeds, lam {args.lam}; torch {torch.__version__}, {time.strftime('%Y-%m-%d')}")
    tables, starts = {"DPO": [], "Sr-DPO": []}, []
    stamp = time.strftime("%Y%m%d-%H%M%S")
    for seed in range(1, args.seeds + 1):
        pairs = sr_dpo.load_pairs(args.pairs, args.limit)
        texts = [m["content"] for pair in pairs for m in pair["prompt"]] + [pair["chosen"] for pair in pairs]
        tokenizer = make_tokenizer(texts)
        torch.manual_seed(seed)
        sizes = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 6}
        ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
        config = transformers.LlamaConfig(
            vocab_size=len(tokenizer), **sizes, **ends, tie_word_embeddings=True, max_position_embeddings=1024
        )
        policy = transformers.LlamaForCausalLM(config).eval()
        one = sr_dpo.Args(**settings, seed=seed)
        parts, held_out = common.split_rows(sr_dpo.make_pairs(policy, tokenizer, pairs, one), one, [])
        begun = time.perf_counter()
        supervise(policy, parts[0], args.epochs, seed)
        starts.append((per_token(policy, held_out, "prompt_ids"), per_token(policy, held_out, "refined_ids")))
        took = time.perf_counter() - begun
        print(f"seed {seed}: {policy.num_parameters():,} parameters, {took:.0f} s, nats per token {starts[-1]}")
        folder = f"runs/real-{stamp}-s{seed}"
        common.save_policy(policy, tokenizer, folder)
        for method, lam in (("DPO", 0.0), ("Sr-DPO", args.lam)):
            name = f"real-{stamp}-{method.lower()}-s{seed}"
            run = sr_dpo.Args(**settings, seed=seed, model=folder, lam=lam, name=name)
            tables[method].append(sr_dpo.main(run)[-1])
    plain, refined = zip(*starts, strict=True)
    print(f"\nnats per token of held-out chosen answers: {mean(plain):.3f} behind x, {mean(refined):.3f} behind p + x")
    print(f"{'':<22}" + "".join(f"{method:>20}" for method in tables))
    measures = ["accuracy", "accuracy_p", "marginal", "marginal_p", "kl", "tokens"]
    figures = {method: {name: [row[name] for row in rows] for name in measures} for method, rows in tables.items()}
    for name in measures:
        columns = [values[name] for values in figures.values()]
        cells = [f"{mean(v):.3g} ± {stdev(v):.2g}" if len(v) > 1 else f"{mean(v):.3g}" for v in columns]
        print(f"{name:<22}" + "".join(f"{cell:>20}" for cell in cells))
    words = [Path(word).name if word == args.pairs else word for word in sys.argv[1:]]  # no path of this machine
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    result = {"command": shlex.join(["python", "tests/real_text.py", *words])}
    result |= {"where": f"{cpu()}, {torch.get_num_threads()} threads; {versions}", "date": time.strftime("%Y-%m-%d")}
    result |= {"seeds": args.seeds, "parameters": policy.num_parameters()}
    result |= {"pairs": len(parts[0]), "held out": len(held_out), "figures": figures}
    result["start, nats per token"] = {"behind x": list(plain), "behind p + x": list(refined)}
    write("real_text", result)


if __name__ == "__main__":
    main()
