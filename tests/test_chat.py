"""From conversations to token ids and back: what each chat template writes, what it lacks, what is refused."""

import copy
import json
import re
from types import SimpleNamespace

import pytest
from steps import stopped, turns
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, Phi3Config, PreTrainedTokenizerFast

import common
from common import Chat, Refused

TEXT = ["Hello world, how are you? The capital is Paris. Yes, I am fine..\n\nBe brief, user: Hi\n\n\n"] * 20


def tokenizer(template, special=(), plain=(), eos="<eos>", bos=None, sentencepiece=False):
    """As GPT-2's and Llama-3's, or as SentencePiece makes them: a blank in front of a text is part of its first word.

    special and plain: tokens, flagged as control tokens or not. bos: put in front by the tokenizer itself.
    """
    t = Tokenizer(models.BPE(unk_token="<unk>"))
    if sentencepiece:
        t.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        t.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
        alphabet = [*map(chr, range(128)), "▁"]
    else:
        words = pre_tokenizers.Split(Regex(r" ?\p{L}+| ?[^\s\p{L}]+|\s*\n+|\s+"), "isolated")
        t.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(False, use_regex=False)])
        t.decoder, alphabet = decoders.ByteLevel(), pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, special_tokens=["<unk>"])
    t.train_from_iterator([text.replace("\n", " ") if sentencepiece else text for text in TEXT], trainer)
    t.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in (eos, bos, *special) if s])
    t.add_tokens([AddedToken(s, special=False, normalized=False) for s in plain])
    if bos:
        t.post_processor = processors.TemplateProcessing(f"{bos} $A", special_tokens=[(bos, t.token_to_id(bos))])
    return PreTrainedTokenizerFast(tokenizer_object=t, chat_template=template, eos_token=eos, bos_token=bos)


def chat(name, stops=()):
    """Chat of a copy of TOKENIZERS[name], whose policy stops at the token ids `stops` as well."""
    policy = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=list(stops)))
    return Chat(policy, copy.deepcopy(TOKENIZERS[name] if isinstance(name, str) else name))


EACH, END, ASK = "{% for m in messages %}", "{% endfor %}", "{% if add_generation_prompt %}"
TURN, IM = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n", ["<|im_start|>"]
HEADER = ASK + "<|im_start|>assistant\n{% endif %}"
CHATML = EACH + TURN + END + HEADER
RAISES = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
INST = RAISES + "<s>" + EACH + "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %}"
INST += "BLANK{{ m.content }}</s>{% endif %}" + END
HEADS = EACH + "{{ '<bos>' if loop.first }}<h>{{ m.role }}</h>\n\n{{ m.content | trim }}<eos>" + END
HEADS += ASK + "<h>assistant</h>\n\n{% endif %}"
ZEPHYR = EACH + "<|{{ m.role }}|>\n{{ m.content }}<eos>\n" + END + ASK + "<|assistant|>\n{% endif %}"
GEMMA = "<bos>" + RAISES + EACH + "<turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
GEMMA += "{{ m.content | trim }}<end>\n" + END + ASK + "<turn>model\n{% endif %}"
PHI = EACH + "<|{{ m.role }}|>\n{{ m.content }}<|end|>\n" + END
PHI += "{{ '<|assistant|>\n' if add_generation_prompt else '<eos>' }}"
THINK = EACH + "<|im_start|>{{ m.role }}\n{{ '<think>\n\n</think>\n\n' if m.role == 'assistant' and loop.last and "
THINK += "'<think>' not in m.content }}{{ m.content }}<|im_end|>\n" + END + HEADER
SEEK = "<bos>" + EACH + "{% if m.role == 'user' %}User: {{ m.content }}\n\n{% elif m.role == 'assistant' %}Assistant: "
SEEK += "{{ m.content }}<eos>{% else %}{{ m.content }}\n\n{% endif %}" + END + ASK + "Assistant:{% endif %}"
PARTS = CHATML.replace("{{ m.content }}", "{% for part in m.content %}{{ part.text }}{% endfor %}")
SILENT = EACH + "{% if m.role in ['user', 'assistant'] %}" + TURN + "{% endif %}" + END + HEADER
SHORT = "{% if messages | length > 2 %}{{ raise_exception('short') }}{% endif %}" + CHATML
LINES = EACH + "{{ m.role }}: {{ m.content }}\n" + END + ASK + "assistant:{% endif %}"
ASKS, YES = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", "Yes, Paris.<|im_end|>"
BOTH = "«<|im_start|>system\nBe brief<|im_end|>\n»" + ASKS
LLAMA = "<bos>«<h>system</h>\n\nBe brief<eos>»<h>user</h>\n\nHi<eos><h>assistant</h>\n\n"
TOKENIZERS = {
    "chatml": tokenizer(CHATML, IM, eos="<|im_end|>"),
    "chatml, bos": tokenizer(CHATML, IM, eos="<|im_end|>", bos="<s>"),  # which the template does not write
    "llama-3": tokenizer(HEADS, ["<h>", "</h>"], bos="<bos>"),
    "mistral": tokenizer(INST.replace("BLANK", ""), eos="</s>", bos="<s>", sentencepiece=True),
    "mistral, blank, bytes": tokenizer(INST.replace("BLANK", " "), eos="</s>", bos="<s>"),
    "zephyr": tokenizer(ZEPHYR, sentencepiece=True),
    "gemma": tokenizer(GEMMA, ["<turn>", "<end>"], bos="<bos>"),
    "phi-3": tokenizer(PHI, ["<|user|>", "<|assistant|>", "<|system|>", "<|end|>"], sentencepiece=True),
    "qwen3": tokenizer(THINK, IM, ["<think>", "</think>"], eos="<|im_end|>"),
    "deepseek": tokenizer(SEEK, bos="<bos>"),
    "system dropped": tokenizer(SILENT, IM, eos="<|im_end|>"),
    "another eos": tokenizer(CHATML, [*IM, "<|im_end|>"]),
    "none": tokenizer(None),
}
CASES = {  # what "Hi" becomes, and between « and » what "Be brief" adds; what "Yes, Paris." becomes; what is said
    "chatml": (BOTH, YES, ""),
    "chatml, bos": ("<s>" + BOTH, YES, ""),
    "llama-3": (LLAMA, "Yes, Paris.<eos>", ""),
    "mistral": ("<s>[INST] Hi [/INST]", "Yes, Paris.</s>", ""),  # without «»: a system turn is refused
    "mistral, blank, bytes": ("<s>[INST] Hi [/INST]", " Yes, Paris.</s>", ""),
    "zephyr": ("«<|system|>\nBe brief<eos>\n»<|user|>\nHi<eos>\n<|assistant|>\n", "Yes, Paris.<eos>", ""),
    "gemma": ("<bos><turn>user\nHi<end>\n<turn>model\n", "Yes, Paris.<end>", "ends a turn with <end>"),
    "phi-3": ("«<|system|>\nBe brief<|end|>\n»<|user|>\nHi<|end|>\n<|assistant|>\n", "Yes, Paris.<|end|>", "<|end|>"),
    "qwen3": (BOTH, "<think>\n\n</think>\n\n" + YES, ""),
    "deepseek": ("<bos>«Be brief\n\n»User: Hi\n\nAssistant:", " Yes, Paris.<eos>", ""),
    "system dropped": (ASKS, YES, ""),
    "another eos": (BOTH, YES, "ends a turn with <|im_end|>, which is not EOS"),
    "none": ("«Be brief\n\n»Hi", "Yes, Paris.<eos>", "is missing: prompts are plain text"),
}


@pytest.mark.parametrize("name", CASES)
def test_ids_are_those_of_what_the_template_writes(name, capsys):
    (both, answer, said), t, one = CASES[name], TOKENIZERS[name], chat(name)
    lines = capsys.readouterr().out
    assert said in lines if said else "the chat template" not in lines
    prompt, with_system = re.sub("«.*»", "", both, flags=re.DOTALL), re.sub("[«»]", "", both)
    briefly = turns("Hi", system="Be brief")
    if "«" not in both:
        with pytest.raises(Refused, match="with a system turn, which the chat template does not write"):
            one.prompt_ids(briefly)
    for messages, text in ((turns("Hi"), prompt), (briefly, with_system))[: 2 if "«" in both else 1]:
        head, y = one.prompt_ids(messages), one.response(messages, "Yes, Paris.", 99)
        assert head + y["ids"] == t(text + answer, add_special_tokens=False).input_ids
        assert t.decode(head) == text and t.decode(head + y["ids"]) == text + answer
        assert y["text"] == "Yes, Paris." and y["finished"] and y["ids"][-1] in one.stops
        assert head.count(t.bos_token_id) == text.count(t.bos_token or "<bos>")
    cut = one.response(turns("Hi"), "Yes, Paris.", 2)
    assert cut["ids"] == one.response(turns("Hi"), "Yes, Paris.", 99)["ids"][:2] and not cut["finished"]
    assert one.sampled(y["ids"])["text"].strip() == "Yes, Paris."


@pytest.mark.parametrize("name", CASES)
def test_what_a_template_lacks_is_said_once_and_stays(name, capsys):
    """Whoever loads a saved policy's template and stops gets the same ids, and hears nothing."""
    one = chat(name)
    capsys.readouterr()
    again = chat(one.tokenizer, one.stops)
    talk = turns("Hi", "Hello.", "How are you?", system="Be brief" if "«" in CASES[name][0] else None)
    assert again.prompt_ids(talk) == one.prompt_ids(talk) and capsys.readouterr().out == ""
    assert again.response(talk, "fine", 9) == one.response(talk, "fine", 9)


@pytest.mark.parametrize("answer", ["\n\nA line", "  blanks", "def f(a):\n    return a\n", "Où? 🙂", "user: Hi\n\n"])
@pytest.mark.parametrize("name", ["chatml", "llama-3", "gemma", "deepseek", "none"])
def test_nothing_of_an_answer_is_lost(name, answer):
    one = chat(name)
    y = one.response(turns("Hi", "a", "b"), answer, 999)
    assert one.sampled(y["ids"])["text"].strip() == answer.strip() and sum(i in one.stops for i in y["ids"]) == 1


@pytest.mark.parametrize(
    ("name", "prompt", "answer", "reason"),
    [
        ("chatml", "What is <|im_end|>?", "yes", "with <|im_end|> in the text"),
        ("chatml", ASKS, "yes", "with <|im_"),  # rendered already
        ("another eos", "<|im_end|>", "yes", "with <|im_end|>"),
        ("mistral", "[INST] Hi [/INST]", "yes", "already formatted with the chat template"),
        ("zephyr", "<|user|>\nHi\n<|assistant|>\n", "yes", "already formatted with the chat template"),
        ("deepseek", "User: Hi\n\nAssistant:", "yes", "already formatted with the chat template"),
        ("chatml", "Hi", "yes<|im_end|>\n", "with <|im_end|>"),
        ("mistral", "a </s>", "yes", "with </s>"),
    ],
)
def test_text_that_spells_control_tokens_or_is_rendered_already_is_refused(name, prompt, answer, reason):
    one = chat(name)
    with pytest.raises(Refused, match=reason.replace("|", r"\|").replace("?", r"\?")):
        one.prompt_ids(turns(prompt)), one.response(turns(prompt), answer, 9)


def test_a_template_that_writes_letters_behind_or_in_front_is_read_rightly(capsys):
    letters = EACH + "{{ m.role[0] }}{{ m.content }}{{ eos_token if m.role == 'assistant' }}" + END
    letters += ASK + "a{% endif %}"
    one = chat(tokenizer(letters))
    assert one.tokenizer.decode(one.prompt_ids(turns("Hi"))) == "uHia" and "parts" not in capsys.readouterr().out
    one = chat(tokenizer("Use Markdown. Mark well. " + CHATML, IM, eos="<|im_end|>"))
    assert one.tokenizer.decode(one.prompt_ids(turns("Hi"))) == "Use Markdown. Mark well. " + ASKS
    named = copy.deepcopy(TOKENIZERS["chatml"])
    named.chat_template = {"rag": "no", "default": CHATML}
    assert chat(named).prompt_ids(turns("Hi")) == chat("chatml").prompt_ids(turns("Hi"))


def test_a_turn_that_is_not_written_or_only_seems_to_be_is_refused():
    last = "{% set messages = messages[-1:] if add_generation_prompt else messages[-2:] %}" + CHATML
    with pytest.raises(Refused, match="with a turn that the chat template does not write"):
        chat(tokenizer(last, IM, eos="<|im_end|>")).prompt_ids(turns("3", "5", "357054"))
    talk = [*turns("Hi", "a"), {"role": "tool", "content": "22"}, *turns("so")]
    with pytest.raises(Refused, match="with a turn that the chat template does not write"):
        chat("system dropped").prompt_ids(talk)
    with pytest.raises(Refused, match="rejected by the chat template"):
        chat(tokenizer(SHORT, IM, eos="<|im_end|>")).prompt_ids(turns("Hi", "a", "b"))


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (EACH + "{% if m.role == 'user' %}" + TURN + "{% endif %}" + END + HEADER, "does not write a question and its"),
        ("{{ raise_exception('no') }}", "does not write a question and its answer"),
        (EACH + TURN + TURN + END + HEADER, "does not write a question and its answer"),
        (PARTS, "does not write a question and its answer as text"),
        (LINES, "its chat template puts no end token after answers: add {{ eos_token }}"),
        (EACH + TURN + END, "its chat template has no generation prompt: make it append '<|im_start|>assistant\\n'"),
    ],
)
def test_templates_of_no_use_are_refused(template, words, capsys):
    assert words in stopped(capsys, chat, tokenizer(template, IM, eos="<|im_end|>"))


THOUGHT = "<think>\nwell\n</think>\n\n4"


def test_thoughts_are_one_token_each_and_not_for_judges():
    one, think = chat("qwen3"), TOKENIZERS["qwen3"].convert_tokens_to_ids(["<think>", "</think>"])
    y = one.response(turns("Hi"), THOUGHT, 99)
    assert [i for i in y["ids"] if i in think] == think and y["text"] == "4"
    assert one.tokenizer.decode(y["ids"]) == THOUGHT + "<|im_end|>"
    for text, judged in ((THOUGHT, "4"), ("<think>\nwell", ""), ("so </think> 4", "so </think> 4"), ("4", "4")):
        assert one.sampled(one.tokens(text))["text"] == judged
    begun = chat(tokenizer(OPENED, IM, eos="<|im_end|>"))
    assert [begun.sampled(begun.tokens(text))["text"] for text in ("so </think> 4", "so")] == ["4", ""]


OPENED = THINK.replace("assistant\n{% endif", "assistant\n<think>\n{% endif")
HIDDEN = EACH + "<|im_start|>{{ m.role }}\n{{ m.content.split('</think>')[-1] }}<|im_end|>\n" + END
HIDDEN += ASK + "<|im_start|>assistant\n<think>\n{% endif %}"


@pytest.mark.parametrize("template", [OPENED, HIDDEN])
def test_a_thought_that_the_prompt_begins_belongs_to_the_prompt(template):
    one = chat(tokenizer(template, IM, ["<think>", "</think>"], eos="<|im_end|>"))
    y = one.response(turns("Hi"), THOUGHT, 99)
    assert one.tokenizer.decode(one.prompt_ids(turns("Hi")) + y["ids"]) == ASKS + THOUGHT + "<|im_end|>"
    assert y["text"] == "4" and one.sampled(y["ids"])["text"] == "4"
    if template == OPENED:  # an answer without a thought ends the one that was begun
        y = one.response(turns("Hi"), "4", 99)
        assert one.tokenizer.decode(y["ids"]) == "\n</think>\n\n4<|im_end|>" and y["text"] == "4"
    else:
        with pytest.raises(Refused, match="with an answer that the chat template does not write"):
            one.response(turns("Hi"), "4", 99)


GPT_OSS = EACH + "<|start|>{{ m.role }}{{ '<|channel|>final' if m.role == 'assistant' }}<|message|>{{ m.content }}"
GPT_OSS += "{{ '<eos>' if loop.last and not add_generation_prompt else '<|end|>' }}" + END + ASK
GPT_OSS += "<|start|>assistant{% endif %}"
IDEA = "<|channel|>analysis<|message|>idea"


@pytest.mark.parametrize(
    ("template", "tokens", "sample", "judged"),
    [
        (CHATML, ["[THINK]", "[/THINK]"], "[THINK]idea[/THINK]4", "4"),
        (CHATML, ["<seed:think>", "</seed:think>"], "<seed:think>idea</seed:think>4", "4"),
        (GPT_OSS, ["<|channel|>", "<|message|>"], IDEA + "<|end|><|start|>assistant<|channel|>final<|message|>4", "4"),
        (GPT_OSS, ["<|channel|>", "<|message|>"], "<|channel|>final<|message|>4", "4"),
        (GPT_OSS, ["<|channel|>", "<|message|>"], IDEA, ""),
    ],
)
def test_thoughts_of_other_marks_are_not_for_judges(template, tokens, sample, judged, tmp_path, capsys):
    t = tokenizer(template, [*IM, "<|im_end|>", "<|start|>", "<|end|>", *tokens])
    one = chat(t)
    assert one.sampled(one.tokens(sample + one.end))["text"] == judged
    answer = one.response(turns("Hi"), "4", 99)
    assert answer["text"] == "4" and one.sampled(answer["ids"])["text"] == "4"
    common.check_chat(
        SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=one.stops)), saved(t, tmp_path), "m"
    )
    assert f"thoughts, from {tokens[0]}" in capsys.readouterr().out


def saved(t, folder, **config):
    """The tokenizer as it comes back from a folder whose tokenizer_config.json is changed to `config`."""
    t.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
    return AutoTokenizer.from_pretrained(folder)


def test_a_tokenizer_of_a_wrong_class_ends_the_run(tmp_path, capsys):
    policy = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=[]))
    t = tokenizer(CHATML, IM, eos="<|im_end|>")  # whose words are not GPT-2's
    wrong = saved(t, tmp_path, tokenizer_class="GPT2Tokenizer", backend=None)
    said = stopped(capsys, common.check_chat, policy, wrong, "m")
    assert "--model m: GPT2Tokenizer does not tokenize text as its tokenizer.json does; write" in said
    t.backend_tokenizer.enable_truncation(4)
    t.backend_tokenizer.enable_padding(length=64)
    common.check_chat(policy, saved(t, tmp_path, tokenizer_class="PreTrainedTokenizerFast"), "m")


def test_the_end_of_a_turn_may_stand_in_the_next_one():
    glm = "[gMASK]" + EACH + "<|{{ m.role }}|>\n{{ m.content }}" + END + ASK + "<|assistant|>\n{% endif %}"
    t = tokenizer(glm, ["<|user|>", "<|assistant|>", "[gMASK]"])
    one = chat(t, t.convert_tokens_to_ids(["<|user|>"]))
    y = one.response(turns("Hi"), "Hello", 99)
    assert t.decode(one.prompt_ids(turns("Hi")) + y["ids"]) == "[gMASK]<|user|>\nHi<|assistant|>\nHello<|user|>"
    assert y["finished"] and one.sampled(y["ids"]) == y


def test_a_rope_that_changes_with_the_longest_row_allows_its_short_form_alone():
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "max_position_embeddings": 128, "pad_token_id": 0}
    assert common.max_length(Phi3Config(**sizes, original_max_position_embeddings=64, rope_scaling=rope)) == 64
    assert common.max_length(Phi3Config(**sizes)) == 128


def test_rows_are_left_out_and_counted_by_reason(capsys):
    t = copy.deepcopy(TOKENIZERS["mistral"])
    policy = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=None))
    texts = ["Hi", "a </s>", "b </s>", "[INST] [/INST]", "x" * 99, "Hello"]
    golds = ["</s>" if text == "Hello" else "yes" for text in texts]
    rows = [{"prompt": turns(x), "gold": y, "n": n} for n, (x, y) in enumerate(zip(texts, golds, strict=True))]
    args = SimpleNamespace(max_prompt_tokens=50, max_new_tokens=2)
    (kept,) = common.encode_rows(policy, t, rows, args, "--gold", ["gold"])
    assert kept["n"] == 0 and kept["gold"]["text"] == "yes" and len(kept["gold"]["ids"]) == 2
    said = capsys.readouterr().out
    for n, why in ((3, "with </s> in"), (1, "already formatted with the chat template"), (1, "over --max_prompt")):
        assert f"--gold: {n} of 6 skipped: {why}" in said
    said = stopped(capsys, common.encode_rows, policy, t, rows[1:4], args)
    assert "none is left: all are with </s> in the text or already formatted with the chat template" in said
