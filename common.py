"""What the scripts share: arguments, log-probs, data, models, generation, judges.

Each section depends only on those above it, so that any of them can be copied out:

    1. Arguments and the run folder    a dataclass -> command line; bad input -> one line and exit code 2
    2. Log-probs                       token_logps, response_logps: sums over response tokens, EOS in, float32
    3. Data                            prompts from a file or the built-in digits; chat template -> token ids
    4. Models                          load_policy, save_policy, and how the built-in `tiny` is made
    5. Generation                      generate: K samples per prompt from a KV cache whose rows are refilled
    6. Judges                          preference matrices prefs[b, i, j] = P(y_i > y_j)
    7. In the scripts' main            sampling under Args, tables

Shapes: B sequences, K samples per prompt, T tokens, V vocabulary, D hidden, N response tokens, S rows ("slots") of
the generator. Log-probs are in nats. A prompt is a list of chat messages, {"role", "content"}, before it is token ids.
"""

import argparse
import contextlib
import gzip
import hashlib
import json
import logging
import os
import random
import re
import shutil
import sys
import time
import zlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache, HfArgumentParser
from transformers.cache_utils import Cache, CacheLayerMixin

transformers.logging.set_verbosity_error()  # their notices are about things decided here on purpose
logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # a hub that is away is one line, not eleven
if not sys.stderr.isatty():
    transformers.logging.disable_progress_bar()
# cuDNN's attention gives NaN gradients in bf16 at some lengths on Hopper GPUs (pytorch issue 196678).
torch.backends.cuda.enable_cudnn_sdp(False)


# ------------------------------------------------------------------------------------------------------------------
# 1. Arguments and the run folder
# ------------------------------------------------------------------------------------------------------------------


class InputError(ValueError):
    """What the user gave cannot be used. The message names the flag and the remedy; a script ends with exit code 2."""


def require(condition, message):
    """Raise InputError(message) unless `condition` holds."""
    if not condition:
        raise InputError(message)


# What a number may be: flag -> (test, words). NaN fails every test.
COUNT = (lambda v: 1 <= v <= 10**7, "at least 1 and at most ten million")
POSITIVE = (lambda v: 0 < v <= 10**6, "a positive number of at most a million")
LIMITS = {
    **dict.fromkeys(("n_eval", "max_prompt_tokens", "iterations", "max_new_tokens", "slots"), COUNT),
    **dict.fromkeys(("epochs", "batch_size", "micro_tokens"), COUNT),
    **dict.fromkeys(("eta", "max_grad_norm"), POSITIVE),
    "learning_rate": (lambda v: 0 < v <= 1, "in (0, 1]"),
    "temperature": (lambda v: 0.01 <= v <= 100, "in [0.01, 100]"),
    "limit": (lambda v: 0 <= v <= 10**6, "between 0 (all) and a million"),
    "k": (lambda v: 2 <= v <= 1024, "at least 2, to have something to compare with, and at most 1024"),
    "top_p": (lambda v: 0 < v <= 1, "in (0, 1]"),
    "warmup_ratio": (lambda v: 0 <= v < 1, "in [0, 1)"),
    "seed": (lambda v: 0 <= v < 2**63, "between 0 and 2^63"),
}


def check_args(args):
    """Raise InputError for a value outside LIMITS, a device that is not there, or a name that is no plain file name."""
    for name, value in vars(args).items():
        test, words = LIMITS.get(name, (lambda _: True, ""))
        require(test(value), f"--{name} {value}: must be {words}")
    require(args.device != "cuda" or torch.cuda.is_available(), "--device cuda: no CUDA GPU here; use --device cpu")
    plain = not args.name or re.fullmatch(r"(?!tiny-)[A-Za-z0-9][A-Za-z0-9._+-]{0,99}", args.name)
    require(plain, f"--name {args.name!r}: letters, digits and . _ + - make a name, and it may not begin with tiny-")


def pick_device(args):
    """The device that --device means: for "auto" CUDA if there is one, else the CPU."""
    return ("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device


class _Parser(HfArgumentParser):
    def error(self, message):  # argparse would print the whole usage in front of the line that matters
        self.exit(2, f"{self.prog}: error: {message} (--help lists the flags)\n")


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    pass


def cli(main, args_class, recipes, description, argv=None):
    """Parse the command line into `args_class`, call `main(args)`, and end the process.

    The values of `recipes[args.model]` (`recipes["other"]` for a model that has none) become the defaults, so a flag on
    the command line always wins over the recipe. InputError ends in one line on stderr and exit code 2.
    """
    first_look = _Parser((), add_help=False, allow_abbrev=False)
    first_look.add_argument("--model", default=args_class.model)
    model = first_look.parse_known_args(argv)[0].model
    names = "".join(f"\n  {alias:<14} {name}" for alias, name in MODELS.items())
    description += f"\n\nshort names for --model, which takes any folder or hub id of a causal LM as well:{names}"
    parser = _Parser(args_class, description=description, formatter_class=_Help, allow_abbrev=False)
    parser.set_defaults(**recipes.get(model, recipes["other"]))
    with contextlib.suppress(AttributeError):
        sys.stdout.reconfigure(errors="replace")  # a terminal without ± is no reason to lose a run
    try:
        main(args_class(**vars(parser.parse_args(argv))))
    except InputError as error:
        parser.exit(2, f"{parser.prog}: error: {' '.join(str(error).split())}\n")
    except KeyboardInterrupt:
        parser.exit(130, f"\n{parser.prog}: interrupted\n")


def run_folder(args, script):
    """The folder of this run, checked but not yet made: runs/NAME, by default named after script, model, seed and time.

    Raises InputError when it is taken, since a run never overwrites another, or when it could not be written.
    """
    model, stamp = re.sub(r"[^A-Za-z0-9._+]+", "-", Path(args.model).name)[:60], time.strftime("%Y%m%d-%H%M%S")
    folder = Path("runs") / (args.name or f"{script}-{model}-s{args.seed}-{stamp}")
    require(not folder.exists(), f"--name {folder.name}: {folder} is taken; a run never overwrites another")
    root = folder.parent if folder.parent.exists() else Path(".")
    writable = root.is_dir() and os.access(root, os.W_OK)
    require(writable, f"{root.resolve()}: cannot be written; start from a folder where runs/ can be made")
    return folder


def start_run(folder, args, **facts):
    """Make the run folder and write config.json: every effective value, `facts`, and the versions."""
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise InputError(f"{folder}: cannot be made: {error.strerror}") from None
    versions = {"python": sys.version.split()[0], "torch": torch.__version__, "transformers": transformers.__version__}
    write_json(folder / "config.json", {**vars(args), **facts, "versions": versions})


@contextlib.contextmanager
def aside(path):
    """A path beside `path` to write to; it takes the place of `path` only if the block ends well: whole or absent."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield temporary
        if path.is_dir():
            shutil.rmtree(path)
        os.replace(temporary, path)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        temporary.unlink(missing_ok=True)


def write_json(path, value):
    """Write one JSON file."""
    with aside(path) as file:
        file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_jsonl(path, rows):
    """Write one JSON object per line."""
    with aside(path) as file:
        file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


# ------------------------------------------------------------------------------------------------------------------
# 2. Log-probs
# ------------------------------------------------------------------------------------------------------------------

CHUNK = 1024  # rows of logits alive at a time: CHUNK x V float32, 0.5 GB at V = 128k


def head_logits(hidden, weight, bias=None, scale=1.0, softcap=0.0):
    """Vocabulary logits in float32 or better: hidden (N, D), weight (V, D), bias (V,) or None -> (N, V)."""
    # bf16 logits would be off by up to 0.06 nats a token, so bf16 is widened before the product.
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    logits = F.linear(hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)) * scale
    return torch.tanh(logits / softcap) * softcap if softcap else logits


def token_logps(hidden, weight, targets, *, bias=None, scale=1.0, softcap=0.0):
    """Log-probability of each target token under the head: log softmax(head(hidden))[target].

    hidden (N, D) and weight (V, D), targets (N,) int64, bias (V,) or None; logits are multiplied by `scale` (Cohere,
    Granite), then soft-capped (Gemma). Returns (N,) float32 (float64 for float64 inputs), nats, differentiable in
    hidden, weight and bias. At most CHUNK x V logits are alive: where N is larger, backward computes them again.
    Raises ValueError when the shapes do not fit.

    >>> hidden, weight = torch.zeros(1, 2), torch.zeros(4, 2)  # four equal logits
    >>> round(token_logps(hidden, weight, torch.tensor([3])).item(), 6)  # log(1/4)
    -1.386294
    """
    fits = hidden.ndim == weight.ndim == 2 and hidden.shape[1] == weight.shape[1] and targets.shape == hidden.shape[:1]
    if not fits:
        shapes = [tuple(x.shape) for x in (hidden, weight, targets)]
        raise ValueError(f"token_logps wants hidden (N, D), weight (V, D), targets (N,), got {shapes}")

    def chunk_logps(hidden, targets):
        logits = head_logits(hidden, weight, bias, scale, softcap)  # (n, V)
        return logits.gather(1, targets[:, None])[:, 0] - logits.logsumexp(1)

    if len(targets) <= CHUNK:
        return chunk_logps(hidden, targets)
    pieces = zip(hidden.split(CHUNK), targets.split(CHUNK), strict=True)
    return torch.cat([checkpoint(chunk_logps, h, t, use_reentrant=False) for h, t in pieces])


def lm_head(policy):
    """The head of a causal LM as keyword arguments of token_logps and head_logits."""
    config, head = policy.config.get_text_config(), policy.get_output_embeddings()
    return {
        "weight": head.weight,
        "bias": getattr(head, "bias", None),
        "scale": (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0),
        "softcap": getattr(config, "final_logit_softcapping", None) or 0.0,
    }


def response_logps(policy, prompts, responses):
    """log pi(y|x) of each response: the sum over its tokens, EOS included, prompt and padding excluded.

    prompts, responses: B lists of token ids, none empty. Returns (B,) float32, nats, differentiable. Rows are padded on
    the right without an attention mask: under causal attention no token sees the padding behind it. Prompt tokens never
    reach the head. Call policy.eval() first (load_policy does): dropout would make a log-ratio noise.
    Raises ValueError for an empty prompt or response.
    """
    if not len(prompts) == len(responses) > 0 or not all(map(len, prompts)) or not all(map(len, responses)):
        raise ValueError("response_logps wants as many responses as prompts, each of at least one token")
    device = policy.get_input_embeddings().weight.device
    rows = [torch.tensor([*x, *y]) for x, y in zip(prompts, responses, strict=True)]
    ids = pad_sequence(rows, batch_first=True).to(device)  # (B, T); any pad id will do, so 0
    starts = torch.tensor([len(x) for x in prompts], device=device)[:, None]
    ends = torch.tensor([len(row) for row in rows], device=device)[:, None]
    position = torch.arange(ids.shape[1], device=device)
    response_mask = (starts <= position) & (position < ends)  # (B, T), from lengths: pad may be EOS
    hidden = policy.base_model(input_ids=ids, use_cache=False).last_hidden_state  # (B, T, D)
    # The token at position t is predicted by the hidden state at t - 1.
    logps = token_logps(hidden[:, :-1][response_mask[:, 1:]], targets=ids[response_mask], **lm_head(policy))  # (N,)
    row_of_token = response_mask.nonzero()[:, 0]
    return logps.new_zeros(len(rows)).index_add(0, row_of_token, logps)


def micro_batches(lengths, max_tokens):
    """Group rows of similar length so that a group, padded, has at most `max_tokens` tokens; a longer row goes alone.

    >>> micro_batches([3, 9, 4, 8], max_tokens=18)
    [[0, 2], [3, 1]]
    """
    batches = []
    for row in sorted(range(len(lengths)), key=lambda row: lengths[row]):
        if not batches or (len(batches[-1]) + 1) * lengths[row] > max_tokens:  # sorted: this row is the longest so far
            batches.append([])
        batches[-1].append(row)
    return batches


@torch.no_grad()
def score(policy, prompts, responses, max_tokens, desc="scoring"):
    """response_logps of any number of rows, without gradients, `max_tokens` at a time: (B,) float32 on the CPU."""
    logps = torch.empty(len(prompts))
    with tqdm(total=len(prompts), desc=desc, unit="row", leave=False, disable=None) as bar:
        for rows in micro_batches([len(x) + len(y) for x, y in zip(prompts, responses, strict=True)], max_tokens):
            logps[rows] = response_logps(policy, [prompts[i] for i in rows], [responses[i] for i in rows]).cpu()
            bar.update(len(rows))
    return logps


# ------------------------------------------------------------------------------------------------------------------
# 3. Data
# ------------------------------------------------------------------------------------------------------------------


def digit_prompts(n, seed):
    """n different strings of 4 to 8 digits as prompts. The right answer to each is its digits, sorted."""
    rng = random.Random(f"digits {seed}")
    seen = {}
    while len(seen) < n:
        seen["".join(rng.choices("0123456789", k=rng.randint(4, 8)))] = None
    return [[{"role": "user", "content": text}] for text in seen]


def _read_prompt(row, where):
    """One row of a prompt file -> a list of messages; InputError says where and what was wrong."""
    require(isinstance(row, dict), f'{where}: expected {{"prompt": ...}}, found {type(row).__name__}')
    require("prompt" in row, f"{where}: no key 'prompt'; keys found: {', '.join(row) or 'none'}")
    prompt = row["prompt"]
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    fits = isinstance(prompt, list) and prompt
    fits = fits and all(
        isinstance(m, dict) and {type(m.get(key)) for key in ("role", "content")} == {str} for m in prompt
    )
    require(fits, f"{where}: 'prompt' must be text or a list of {{'role', 'content'}} messages")
    require(prompt[-1]["role"] == "user", f"{where}: the last message of a prompt must be the user's")
    require(prompt[-1]["content"].strip(), f"{where}: the prompt is empty")
    half = re.search("[\ud800-\udfff]", "".join(message["content"] for message in prompt))
    require(not half, f"{where}: half of a surrogate pair, which is no character")
    return prompt


def load_prompts(source, limit=0, seed=0):
    """Prompts from `source`: "digits" (built in) or a .jsonl or .jsonl.gz file of {"prompt": text or messages}.

    Returns a list of prompts, each a list of {"role", "content"} messages, without repetitions, at most `limit` (0: all
    of a file, 5,632 digits). Raises InputError naming the line and the keys found.
    """
    if source == "digits":
        return digit_prompts(limit or 5632, seed)
    require(os.path.isfile(source), f"--prompts {source}: no such file; give 'digits' or a .jsonl or .jsonl.gz file")
    require(source.endswith((".jsonl", ".jsonl.gz")), f"--prompts {source}: only .jsonl and .jsonl.gz are read")
    prompts, rows = {}, 0
    try:
        with (gzip.open if source.endswith(".gz") else open)(source, "rt", encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if line.strip() and (not limit or len(prompts) < limit):
                    where = f"--prompts {source}, line {number}"
                    try:
                        row = json.loads(line)
                    except (ValueError, RecursionError) as error:
                        raise InputError(f"{where}: not JSON ({error})") from None
                    prompt = _read_prompt(row, where)
                    prompts[json.dumps(prompt)] = prompt
                    rows += 1
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise InputError(f"--prompts {source}: cannot be read ({error})") from None
    require(prompts, f"--prompts {source}: holds no prompt")
    if rows > len(prompts):
        print(f"{source}: {rows - len(prompts)} repeated prompts left out")
    return list(prompts.values())


def split_prompts(prompts, iterations, n_eval, seed):
    """Shuffle, hold out `n_eval` (at most a quarter), cut the rest in equal parts: (parts, held_out), all disjoint."""
    prompts = random.Random(f"split {seed}").sample(prompts, len(prompts))
    n_eval = min(n_eval, len(prompts) // 4)
    size = (len(prompts) - n_eval) // iterations
    enough = n_eval >= 2 and size >= 1
    require(enough, f"--prompts: {len(prompts)} left, too few for {iterations} iterations and a held-out part")
    held_out, rest = prompts[:n_eval], prompts[n_eval:]
    parts = [rest[i * size : (i + 1) * size] for i in range(iterations)]
    texts = [{json.dumps(p["prompt"]) for p in part} for part in [held_out, *parts]]
    assert len(set.union(*texts)) == sum(map(len, texts)), "the splits share a prompt"
    return parts, held_out


def render(tokenizer, messages):
    """The text that the model reads, up to where its answer begins; without a chat template just the contents."""
    if not tokenizer.chat_template:
        return "\n\n".join(message["content"] for message in messages)
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # jinja2 raises whatever a template wants it to
        if messages[0]["role"] != "system" or len(messages) < 2:
            raise InputError(f"--prompts: the chat template of this model rejects a prompt ({error})") from None
        first, second, *rest = messages  # templates that know no system role get it in front of the first user turn
        folded = {"role": second["role"], "content": f"{first['content']}\n\n{second['content']}"}
        return render(tokenizer, [folded, *rest])


def encode(tokenizer, messages):
    """Token ids of the rendered prompt. What users wrote stays text, even where it spells a special token."""
    contents = [message["content"] for message in messages]
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    if not any(token in content for token in special for content in contents):
        return tokenizer(render(tokenizer, messages), add_special_tokens=False).input_ids
    # Render with a mark in place of each content, then tokenise the template's pieces and the contents apart.
    marks = {f"\ue000{i}\ue001": content for i, content in enumerate(contents)}
    marked = [{**message, "content": mark} for message, mark in zip(messages, marks, strict=True)]
    ids = []
    for piece in filter(None, re.split("(\ue000[0-9]+\ue001)", render(tokenizer, marked))):
        text = marks.get(piece, piece)
        ids += tokenizer(text, add_special_tokens=False, split_special_tokens=piece in marks).input_ids
    return ids


def encode_prompts(tokenizer, prompts, max_tokens):
    """Render and tokenise: a list of {"prompt", "prompt_ids"}; prompts over `max_tokens` are left out and counted.

    The tokenizer adds no special tokens of its own, so that there is exactly one BOS for a model that wants one,
    whether its template writes it or not.
    """
    if not tokenizer.chat_template:
        print("this model has no chat template: prompts are given to it as plain text")
    bos = tokenizer.bos_token_id
    wants_bos = bos is not None and tokenizer("a").input_ids[0] == bos
    kept = []
    for messages in prompts:
        ids = encode(tokenizer, messages)
        if wants_bos and ids[:1] != [bos]:
            ids = [bos, *ids]
        if 0 < len(ids) <= max_tokens:
            kept.append({"prompt": messages, "prompt_ids": ids})
    if len(kept) < len(prompts):
        print(f"{len(prompts) - len(kept)} of {len(prompts)} prompts left out: over --max_prompt_tokens {max_tokens}")
    require(kept, f"--max_prompt_tokens {max_tokens}: no prompt is that short")
    return kept


# ------------------------------------------------------------------------------------------------------------------
# 4. Models
# ------------------------------------------------------------------------------------------------------------------

MODELS = {
    "tiny": "built in: 0.46 M parameters, made on the spot in seconds",
    "mistral-7b": "mistralai/Mistral-7B-Instruct-v0.2",
    "llama-3-8b": "meta-llama/Meta-Llama-3-8B-Instruct",
    "gemma-2-9b": "google/gemma-2-9b-it",
    "zephyr-7b-sft": "alignment-handbook/zephyr-7b-sft-full",
    "pythia-2.8b": "EleutherAI/pythia-2.8b",
    "qwen2.5-0.5b": "Qwen/Qwen2.5-0.5B-Instruct",
    "smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct",
}


def load_policy(name, device="cpu", context=0):
    """Load a causal LM and its tokenizer: (policy, tokenizer), policy in eval mode on `device`.

    name: a key of MODELS, a folder, or a hub id. float32 on the CPU, bf16 on CUDA. safetensors only, no remote code.
    Raises InputError when it cannot be loaded, has fewer than `context` positions, no EOS, or a head that token_logps
    would get wrong.
    """
    path = tiny_policy() if name == "tiny" else MODELS.get(name, name)
    dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
    try:
        config = AutoConfig.from_pretrained(path)
        softcap = getattr(config.get_text_config(), "attn_logit_softcapping", None)
        attention = {"attn_implementation": "eager"} if softcap else {}  # sdpa cannot cap the scores (Gemma-2)
        tokenizer = AutoTokenizer.from_pretrained(path)
        settings = {"dtype": dtype, "use_safetensors": True, "output_loading_info": True, **attention}
        policy, report = AutoModelForCausalLM.from_pretrained(path, **settings)
    except Exception as error:  # OSError, ValueError, KeyError, SafetensorError, ...: the remedy is the same
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        where = "" if os.path.exists(path) else " (a local folder works without a network)"
        raise InputError(f"--model {name}: cannot be loaded as a causal LM: {reason}{where}") from None
    missing = min(report["missing_keys"], default="")  # transformers fills these with random numbers
    require(not missing, f"--model {name}: its files lack {missing}, so it is not, or not all of, a causal LM")
    policy.to(device).eval()  # eval for good: dropout has no place in any log-prob here, training included
    require(tokenizer.eos_token_id is not None, f"--model {name}: its tokenizer has no EOS, so no answer could end")
    positions = getattr(config.get_text_config(), "max_position_embeddings", None) or context
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":  # beyond these, the angles of a row would depend on its batch mates
        positions = rope.get("original_max_position_embeddings", positions)
    too_long = f"--max_prompt_tokens and --max_new_tokens add up to {context}, but {name} has {positions} positions"
    require(context <= positions, too_long)
    rows = policy.get_input_embeddings().weight.shape[0]
    require(len(tokenizer) <= rows, f"--model {name}: its tokenizer has {len(tokenizer)} tokens, the model only {rows}")
    linear = policy.base_model is not policy and policy.get_output_embeddings() is not None and _head_fits(policy)
    require(linear, f"--model {name}: its head is more than a linear layer with scale and soft-cap: not supported")
    return policy, tokenizer


@torch.no_grad()
def _head_fits(policy):
    """Whether lm_head describes all that this model does after its last hidden state; found by trying."""
    ids = torch.arange(4, device=policy.device)[None] % len(policy.get_input_embeddings().weight)
    hidden = policy.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
    mine, theirs = head_logits(hidden, **lm_head(policy)), policy(input_ids=ids, use_cache=False).logits[0]
    return (mine - theirs).abs().max() <= 0.02 * theirs.abs().max()


def stop_ids(policy, tokenizer):
    """All token ids that end an answer: the tokenizer's EOS and those of the model's generation config."""
    more = policy.generation_config.eos_token_id if policy.generation_config else None
    more = [] if more is None else more if isinstance(more, list) else [more]
    return sorted({tokenizer.eos_token_id, *more})


def save_policy(policy, tokenizer, folder):
    """Write weights and tokenizer to `folder`, which AutoModelForCausalLM.from_pretrained(folder) then loads."""
    with aside(folder) as part:
        policy.save_pretrained(part)
        tokenizer.save_pretrained(part)


TINY = {  # the recipe of `tiny`; it is also the key of its cache, so that a changed recipe is a new model
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "intermediate_size": 256,
    "noise": 0.28,  # each digit of a supervised answer is replaced with this probability
    "steps": 200,
    "batch_size": 96,
    "learning_rate": 4e-3,
    "seed": 0,
}


def tiny_tokenizer():
    """Printable ASCII, one token a character, and a chat template: "<s>" + question + "=" -> answer + "</s>"."""
    from tokenizers import Tokenizer, decoders, models

    tokens = ["<s>", "</s>", "<unk>", *map(chr, range(32, 127))]  # printable ASCII
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges=[], unk_token="<unk>"))
    tokenizer.decoder = decoders.Fuse()
    template = (
        "{{ bos_token }}{% for m in messages %}{{ m['content'] }}"
        "{{ '=' if m['role'] == 'user' else eos_token }}{% endfor %}"
    )
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template, **special)


def tiny_policy(cache="runs"):
    """The folder of `tiny`, a MistralForCausalLM supervised on NOISY sorted digits; made if missing or damaged."""
    key = hashlib.sha256(json.dumps([TINY, torch.__version__]).encode()).hexdigest()[:12]
    folder = Path(cache) / f"tiny-{key}"
    with contextlib.suppress(OSError, UnicodeDecodeError):
        if (folder / "sha256").read_text() == _checksum(folder):
            return folder
    tokenizer, rng = tiny_tokenizer(), random.Random(f"tiny {TINY['seed']}")
    config = transformers.MistralConfig(
        **{name: TINY[name] for name in ("hidden_size", "num_hidden_layers", "intermediate_size")},
        vocab_size=len(tokenizer),
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        sliding_window=None,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(TINY["seed"])
        policy = transformers.MistralForCausalLM(config)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=TINY["learning_rate"], betas=(0.9, 0.98), weight_decay=0.0)
    steps, digits = TINY["steps"], "0123456789"
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, TINY["learning_rate"], total_steps=steps, pct_start=0.1)
    for _ in tqdm(range(steps), desc="making the tiny model", unit="step", leave=False, disable=None):
        prompts, responses = [], []
        for _ in range(TINY["batch_size"]):
            question = "".join(rng.choices(digits, k=rng.randint(4, 8)))
            answer = "".join(rng.choice(digits) if rng.random() < TINY["noise"] else d for d in sorted(question))
            prompts.append(tokenizer(f"<s>{question}=").input_ids)
            responses.append(tokenizer(f"{answer}</s>").input_ids)
        loss = -response_logps(policy, prompts, responses).sum() / sum(map(len, responses))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    with aside(folder) as part:
        policy.save_pretrained(part)
        tokenizer.save_pretrained(part)
        (part / "sha256").write_text(_checksum(part))
    return folder


def _checksum(folder):
    files = sorted(path for path in folder.iterdir() if path.name != "sha256")
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


# ------------------------------------------------------------------------------------------------------------------
# 5. Generation
# ------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Response:
    """One sampled answer: its token ids, EOS included, and whether it ended or was cut at max_new_tokens."""

    ids: list[int]
    finished: bool


class SlotLayer(CacheLayerMixin):
    """Keys and values of one layer, (S, heads, capacity, head_dim): each row is a sequence at its own position."""

    is_sliding = False  # windows are in the masks; below, the methods that transformers calls or wants to be there

    def __init__(self, slots, prefilled, slot_cache):
        super().__init__()
        self.slot_cache = slot_cache
        self.keys, self.values = (
            x.new_zeros(slots, x.shape[1], slot_cache.capacity, x.shape[3]) for x in (prefilled.keys, prefilled.values)
        )
        self.is_initialized = True

    def lazy_initialization(self, key_states, value_states):
        pass

    def update(self, key_states, value_states, *args, **kwargs):
        cache = self.slot_cache
        self.keys[cache.rows, :, cache.pos] = key_states[:, :, 0]  # (S, heads, head_dim)
        self.values[cache.rows, :, cache.pos] = value_states[:, :, 0]
        return self.keys[:, :, : cache.view], self.values[:, :, : cache.view]

    def get_mask_sizes(self, query_length):
        return self.slot_cache.view, 0

    def get_seq_length(self):
        return self.slot_cache.view - 1

    def get_max_length(self):
        return self.slot_cache.capacity


class SlotCache(Cache):
    """A KV cache of S rows. pos (S,): where each row writes its next token; the keys [0, view) are what layers see."""

    def __init__(self, slots, capacity, prefilled, device):
        self.capacity, self.view = capacity, 1
        self.rows = torch.arange(slots, device=device)
        self.pos = torch.zeros(slots, dtype=torch.long, device=device)
        super().__init__(layers=[SlotLayer(slots, layer, self) for layer in prefilled.layers])

    def fork(self, rows, prefilled, sources, lengths):
        """Give each of `rows` a copy of a prefilled prompt: row rows[i] continues prompt sources[i] of `prefilled`."""
        for mine, theirs in zip(self.layers, prefilled.layers, strict=True):
            n = theirs.keys.shape[2]
            mine.keys[rows, :, :n] = theirs.keys[sources]
            mine.values[rows, :, :n] = theirs.values[sources]
        self.pos[rows] = lengths

    def keep(self, rows):
        """Shrink to these rows."""
        for layer in self.layers:
            layer.keys, layer.values = layer.keys[rows], layer.values[rows]
        self.pos, self.rows = self.pos[rows], self.rows[: len(rows)]


def attention_masks(policy, pos, view):
    """Which keys [0, view) the query of each row, at pos (S,), may see: (S, 1, 1, view), or a dict by layer type."""
    config = policy.config.get_text_config()
    types = set(getattr(config, "layer_types", None) or [])
    window = getattr(config, "sliding_window", None)
    key = torch.arange(view, device=pos.device)
    full = (key <= pos[:, None])[:, None, None]
    near = full if window is None else full & (key > pos[:, None] - window)[:, None, None]
    masks = {"full_attention": full, "sliding_attention": near}  # the same without a window
    if config._attn_implementation == "eager":  # adds the mask to the scores
        lowest = torch.finfo(policy.dtype).min
        masks = {name: torch.zeros_like(m, dtype=policy.dtype).masked_fill(~m, lowest) for name, m in masks.items()}
    if len(types) > 1:
        return masks
    return masks[types.pop() if types else "sliding_attention"]


def sample_tokens(logits, uniform, temperature, top_p):
    """One token per row by inverting the CDF: logits (S, V), uniform (S,) in [0, 1) -> (S,). Temperature 0: greedy."""
    if temperature == 0:
        return logits.argmax(-1)
    probs = (logits.double() / temperature).softmax(-1)  # float64: a cumsum over 128k float32 would lose the tail
    order = None
    if top_p < 1:  # the smallest set of tokens whose probability reaches top_p
        probs, order = probs.sort(-1, descending=True)
        probs = probs.masked_fill(probs.cumsum(-1) - probs >= top_p, 0.0)
    cdf = probs.cumsum(-1)
    token = torch.searchsorted(cdf, uniform[:, None].double() * cdf[:, -1:], right=True)
    return (token if order is None else order.gather(-1, token))[:, 0]


def uniforms(seed, prompt, sample, n):
    """n numbers in [0, 1) that depend on (seed, prompt ids, sample index) alone: the random numbers of one sample."""
    digest = hashlib.blake2b(repr((seed, list(prompt), sample)).encode(), digest_size=8).digest()
    return torch.rand(n, generator=torch.Generator().manual_seed(int.from_bytes(digest, "little", signed=True)))


def _check_generate(prompts, k, max_new_tokens, temperature, top_p, slots=1):
    if not prompts or not all(map(len, prompts)):
        raise ValueError("generate wants at least one prompt, and at least one token in each")
    if k < 1 or max_new_tokens < 1 or slots < 1 or temperature < 0 or not 0 < top_p <= 1:
        raise ValueError("generate wants k, max_new_tokens, slots >= 1, temperature >= 0 and top_p in (0, 1]")


@torch.no_grad()
def generate_plain(policy, prompts, *, k, max_new_tokens, temperature=1.0, top_p=1.0, eos_ids, seed=0, progress=None):
    """`generate` without a cache: for architectures whose cache is not keys and values; tests compare with it."""
    _check_generate(prompts, k, max_new_tokens, temperature, top_p)
    head, device, out = lm_head(policy), policy.device, []
    for prompt in prompts:
        noise = torch.stack([uniforms(seed, prompt, j, max_new_tokens) for j in range(k)]).to(device)
        ids = torch.tensor([prompt] * k, device=device)
        done = torch.zeros(k, dtype=torch.bool, device=device)
        for n in range(max_new_tokens):
            hidden = policy.base_model(input_ids=ids, use_cache=False).last_hidden_state[:, -1]
            token = sample_tokens(head_logits(hidden, **head), noise[:, n], temperature, top_p)
            ids = torch.cat([ids, token[:, None]], 1)
            done |= torch.isin(token, torch.tensor(eos_ids, device=device))
            if done.all():
                break
        out.append([cut_response(row, eos_ids) for row in ids[:, len(prompt) :].tolist()])
        if progress is not None:
            progress.update(k)
    return out


def cut_response(ids, eos_ids):
    """Token ids up to and including the first EOS -> Response.

    >>> cut_response([5, 6, 2, 9], eos_ids=[2])
    Response(ids=[5, 6, 2], finished=True)
    """
    for n, token in enumerate(ids, 1):
        if token in eos_ids:
            return Response(ids[:n], True)
    return Response(list(ids), False)


@torch.no_grad()
def generate(
    policy, prompts, *, k, max_new_tokens, temperature=1.0, top_p=1.0, eos_ids, seed=0, slots=64, progress=None
):
    """Sample k responses to each prompt (a list of token ids): list[list[Response]], in the order of `prompts`.

    Every prompt is prefilled once and its keys and values copied to its k samples. `slots` rows decode together; a row
    whose response ends takes the next sample at once. A sample depends on (seed, prompt, sample index) alone, up to the
    rounding of a matmul, not on `slots` or on its batch mates. temperature 0 is greedy. eos_ids end a response and stay
    in it. `seed` may be a number or a text. Raises ValueError for an empty prompt or a setting out of range.
    """
    _check_generate(prompts, k, max_new_tokens, temperature, top_p, slots)
    if not fits_slots(policy):
        sampling = {"temperature": temperature, "top_p": top_p, "seed": seed, "progress": progress}
        return generate_plain(policy, prompts, k=k, max_new_tokens=max_new_tokens, eos_ids=eos_ids, **sampling)
    head, device = lm_head(policy), policy.device
    eos = torch.tensor(eos_ids, device=device)
    slots = min(slots, len(prompts) * k)
    capacity = max(map(len, prompts)) + max_new_tokens
    out = [[None] * k for _ in prompts]
    todo = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))  # prompts to prefill, shortest last
    prefilled, waiting = None, []  # a few prompts' keys and values; those of their samples that have no row yet
    owner, idle = {}, list(range(slots))  # row -> (prompt index, sample index); the rows that have no sample
    tokens = torch.zeros(slots, max_new_tokens, dtype=torch.long, device=device)
    noise = torch.zeros(slots, max_new_tokens, device=device)  # the random numbers of the row's sample
    count = torch.ones(slots, dtype=torch.long, device=device)  # tokens that the row has so far
    cache = None

    def finish(i, j, ids):
        out[i][j] = Response(ids, ids[-1] in eos_ids)
        if progress is not None:
            progress.update()

    while todo or waiting or owner:
        # 1. Prefill enough prompts for all rows, once no earlier one waits, and draw all their samples' first tokens.
        if todo and idle and not waiting:
            group = [todo.pop() for _ in range(min(len(todo), max(1, slots // k)))]
            rows = [torch.tensor(prompts[i]) for i in group]
            last = torch.tensor([len(row) - 1 for row in rows], device=device)
            ids = pad_sequence(rows, batch_first=True).to(device)  # right padding, no mask: causal
            prefilled = DynamicCache()
            hidden = policy.base_model(input_ids=ids, past_key_values=prefilled, use_cache=True).last_hidden_state
            hidden = hidden[torch.arange(len(group), device=device), last].repeat_interleave(k, 0)  # (G k, D)
            samples = [(i, j) for i in group for j in range(k)]
            uniform = torch.stack([uniforms(seed, prompts[i], j, max_new_tokens) for i, j in samples]).to(device)
            token = sample_tokens(head_logits(hidden, **head), uniform[:, 0], temperature, top_p)
            for n, ((i, j), first) in enumerate(zip(samples, token.tolist(), strict=True)):
                if first in eos_ids or max_new_tokens == 1:
                    finish(i, j, [first])
                else:
                    waiting.append({"sample": (i, j), "source": n // k, "token": first, "noise": uniform[n]})
        # 2. Idle rows take samples that wait, each with a copy of its prompt's keys and values.
        rows, taken = idle[: len(waiting)], waiting[: len(idle)]
        idle, waiting = idle[len(taken) :], waiting[len(taken) :]
        if taken:
            cache = cache or SlotCache(slots, capacity, prefilled, device)
            lengths = torch.tensor([len(prompts[s["sample"][0]]) for s in taken], device=device)
            cache.fork(rows, prefilled, [s["source"] for s in taken], lengths)
            tokens[rows, 0] = torch.tensor([s["token"] for s in taken], device=device)
            noise[rows] = torch.stack([s["noise"] for s in taken])
            owner.update(zip(rows, [s["sample"] for s in taken], strict=True))
        if not owner:
            continue
        # 3. Nothing waits and half of the rows are idle: go on with the others only.
        if not todo and not waiting and len(idle) >= len(owner):
            rows = list(owner)
            cache.keep(rows)
            tokens, noise, count = tokens[rows], noise[rows], count[rows]
            owner, idle = dict(enumerate(owner.values())), []
        # 4. One token for every row; an idle row repeats its position 0, which nobody reads.
        cache.view = int(cache.pos.max()) + 1
        hidden = policy.base_model(
            input_ids=tokens.gather(1, count[:, None] - 1),
            position_ids=cache.pos[:, None],
            attention_mask=attention_masks(policy, cache.pos, cache.view),
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state[:, -1]
        uniform = noise.gather(1, count[:, None])[:, 0]
        token = sample_tokens(head_logits(hidden, **head), uniform, temperature, top_p)
        tokens.scatter_(1, count[:, None], token[:, None])
        rows = list(owner)
        cache.pos[rows] += 1
        count[rows] += 1
        # 5. A row whose response ended hands it over and is idle.
        ended = (torch.isin(token, eos) | (count == max_new_tokens)).tolist()
        for row in rows:
            if ended[row]:
                finish(*owner.pop(row), tokens[row, : count[row]].tolist())
                cache.pos[row], count[row] = 0, 1
                idle.append(row)
    return out


def fits_slots(policy):
    """Whether the slot cache gives this architecture's own numbers; found by trying, once per model, else a notice."""
    if not hasattr(policy, "_fits_slots"):
        try:
            policy._fits_slots = _slots_agree(policy)
        except Exception:  # whatever an unknown architecture raises on an unknown cache
            policy._fits_slots = False
        if not policy._fits_slots:
            print(f"{type(policy).__name__}: its cache is not plain keys and values; generating without a cache (slow)")
    return policy._fits_slots


def _slots_agree(policy):
    """Two prompts prefilled together and a token of each decoded in slots: hidden states as without a cache?

    The probe is six tokens long; windows longer than that are right by attention_masks, which knows two layer types.
    """
    config = policy.config.get_text_config()
    types = getattr(config, "layer_types", None) or getattr(config, "attention_layers", None)  # GPT-Neo: the latter
    if set(types or []) - {"full_attention", "sliding_attention"}:
        return False
    rows = [[1, 2, 3, 4, 5, 6], [3, 2, 1]]
    device = policy.device
    ids = torch.tensor([rows[0][:-1], rows[1][:-1] + [0] * 3], device=device)
    prefilled = DynamicCache()
    policy.base_model(input_ids=ids, past_key_values=prefilled, use_cache=True)
    cache = SlotCache(2, 8, prefilled, device)
    cache.fork([0, 1], prefilled, [0, 1], torch.tensor([5, 2], device=device))
    cache.view = 6
    last = torch.tensor([[row[-1]] for row in rows], device=device)
    masks = attention_masks(policy, cache.pos, cache.view)
    mine = policy.base_model(
        input_ids=last, position_ids=cache.pos[:, None], attention_mask=masks, past_key_values=cache, use_cache=True
    ).last_hidden_state[:, 0]
    true = [policy.base_model(input_ids=torch.tensor([r], device=device), use_cache=False) for r in rows]
    true = torch.stack([o.last_hidden_state[0, -1] for o in true])
    return (mine - true).float().norm() <= 0.05 * true.float().norm()


# ------------------------------------------------------------------------------------------------------------------
# 6. Judges
# ------------------------------------------------------------------------------------------------------------------


class DigitsJudge:
    """Prefers the answer that is closer to the digits of the prompt, sorted: P(y > y') = sigmoid(10 (q(y) - q(y'))).

    q is the share of right positions, less the difference in length as a share of the right length (at most 1).
    A judge is any object that is called like this one, with up to 64 prompts and any K; `metrics` is optional and goes
    into the table. JUDGES makes it without arguments.
    """

    def quality(self, prompts, responses):
        """prompts: B lists of messages; responses: B lists of K texts -> q (B, K) float32 in [-1, 1]."""
        quality = []
        for messages, texts in zip(prompts, responses, strict=True):
            right = "".join(sorted(re.findall("[0-9]", messages[-1]["content"])))
            n = max(1, len(right))
            for text in map(str.strip, texts):
                hits = sum(a == b for a, b in zip(text, right, strict=False))
                quality.append(hits / n - min(1.0, abs(len(text) - len(right)) / n))
        return torch.tensor(quality).view(len(prompts), -1)

    def __call__(self, prompts, responses):
        """prompts: B lists of messages; responses: B lists of K texts -> prefs (B, K, K)."""
        quality = self.quality(prompts, responses)
        return torch.sigmoid(10 * (quality[:, :, None] - quality[:, None, :]))

    def metrics(self, prompts, responses):
        """Figures for the table: the share of responses that are right to the last digit."""
        return {"exact_match": (self.quality(prompts, responses) == 1).float().mean().item()}


JUDGES = {"digits": DigitsJudge}


def load_judge(name, prompts):
    """The judge called `name`, a key of JUDGES, for the prompts called `prompts`. Raises InputError."""
    require(name in JUDGES, f"--judge {name}: unknown; the judges are {', '.join(JUDGES)}")
    if name == "digits" and prompts != "digits":
        print("--judge digits prefers the digits of a prompt, sorted, and where there are none the empty answer;")
        print("it only shows that the model runs: to train for something, add a judge to JUDGES in common.py")
    return JUDGES[name]()


def judge_prefs(judge, prompts, responses, finished, desc="judging"):
    """Ask the judge, check its answer, and let unfinished responses lose: prefs (B, K, K) float32.

    prompts: B lists of messages; responses: B lists of K texts; finished: B lists of K bools. A response that the
    length limit cut loses against every finished one (a judge may not see that its end is missing) and ties with other
    cut ones. Raises InputError when the judge does not return probabilities with P + P^T = 1.
    """
    prefs = []
    for i in tqdm(range(0, len(prompts), 64), desc=desc, unit="batch", leave=False, disable=None):
        prefs.append(torch.as_tensor(judge(prompts[i : i + 64], responses[i : i + 64]), dtype=torch.float32))
    prefs = torch.cat(prefs)
    k = len(responses[0])
    require(prefs.shape == (len(prompts), k, k), f"--judge: wanted prefs (B, K, K), got {tuple(prefs.shape)}")
    sound = ((prefs + prefs.mT - 1).abs() < 1e-4).all() and ((prefs >= 0) & (prefs <= 1)).all()  # False for NaN, too
    require(sound, "--judge: its preferences are not probabilities with P(a > b) + P(b > a) = 1")
    finished = torch.tensor(finished).float()  # (B, K)
    rank = finished[:, :, None] - finished[:, None, :]  # 1: only the first ended, -1: only the second
    both_cut = (1 - finished[:, :, None]) * (1 - finished[:, None, :])
    return torch.where(rank != 0, (rank + 1) / 2, torch.where(both_cut > 0, 0.5, prefs))


# ------------------------------------------------------------------------------------------------------------------
# 7. In the scripts' main
# ------------------------------------------------------------------------------------------------------------------


def sample_responses(policy, tokenizer, prompts, k, seed, args, desc="sampling"):
    """`generate` under the settings of `args`: for each encoded prompt a list of k {"ids", "text", "finished"}."""
    with tqdm(total=k * len(prompts), desc=desc, unit="response", leave=False, disable=None) as bar:
        sampled = generate(
            policy,
            [prompt["prompt_ids"] for prompt in prompts],
            k=k,
            max_new_tokens=args.max_new_tokens,
            temperature=args.temperature,
            top_p=args.top_p,
            eos_ids=stop_ids(policy, tokenizer),
            seed=seed,
            slots=args.slots,
            progress=bar,
        )
    text = partial(tokenizer.decode, skip_special_tokens=True)
    return [[{"ids": r.ids, "text": text(r.ids), "finished": r.finished} for r in row] for row in sampled]


def attach(name, rows, values):
    """Give every row, a dict, its number out of a tensor of as many."""
    for row, value in zip(rows, values.tolist(), strict=True):
        row[name] = value


def alpaca_outputs(prompts, answers, generator):
    """Rows as the alpaca_eval package reads them: {"instruction", "output", "generator"}."""
    texts = ["\n\n".join(m["content"] for m in prompt["prompt"]) for prompt in prompts]
    rows = zip(texts, answers, strict=True)
    return [{"instruction": text, "output": answer["text"], "generator": generator} for text, answer in rows]


def number(value):
    """Three digits, or all of a number of at least 1,000."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def show(metrics, columns, examples=()):
    """Print an iterate's metrics on one line, and for each example its best and worst response with their win rates."""
    parts = []
    for name, title in columns.items():
        if name in metrics:
            error = f" ± {metrics[f'{name}_se']:.2g}" if f"{name}_se" in metrics else ""
            parts.append(f"{title} {number(metrics[name])}{error}")
    print(f"iterate {metrics['iteration']}: {' | '.join(parts)}")
    for example in examples:
        texts = [f"{r['text']!r:.60} (win rate {r['win_rate']:.2f})" for r in example["responses"]]
        print(f"    samples for {example['prompt'][-1]['content']!r:.60}: best {texts[0]}, worst {texts[-1]}")


def show_table(table, columns, best):
    """Print the closing table, a row per iterate; the best one, which final/ holds, has a star."""
    titles = ["iterate", *columns.values()]
    rows = [[f"{'* ' if m['iteration'] == best else ''}{m['iteration']}", *(m.get(n) for n in columns)] for m in table]
    print()
    for row in [titles, *rows]:
        cells = ["" if cell is None else cell if isinstance(cell, str) else number(cell) for cell in row]
        print("  ".join(f"{cell:>{len(title)}}" for cell, title in zip(cells, titles, strict=True)))
