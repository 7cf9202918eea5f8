"""What the README says of copying out of common.py: a section needs those above it alone, and its recipes work."""

import ast
import builtins
import dis
import re

import pytest
import torch
from conftest import ROOT

import common

SOURCE = (ROOT / "common.py").read_text(encoding="utf-8")
LINES, TREE = SOURCE.splitlines(), ast.parse(SOURCE)
README = (ROOT / "README.md").read_text(encoding="utf-8")
HEADERS = [number for number, line in enumerate(LINES, 1) if re.match(r"# \d\. ", line)]


def names_of(node):
    """What a statement at the top of common.py defines or imports."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    if isinstance(node, ast.Import | ast.ImportFrom):
        return [alias.asname or alias.name.partition(".")[0] for alias in node.names]
    targets = getattr(node, "targets", [])
    return [name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)]


def globals_read(code):
    """Names that compiled code reads from its module, in the functions and classes within as well."""
    steps = dis.get_instructions(code)
    names = {step.argval for step in steps if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    return names.union(*(globals_read(inner) for inner in code.co_consts if hasattr(inner, "co_code")))


def compiled(*nodes):
    return compile(ast.Module(list(nodes), []), "common.py", "exec")


DEFINED = {name: node for node in TREE.body for name in names_of(node) if node.lineno > HEADERS[0]}


def test_a_section_depends_on_those_above_it_and_on_nothing_below():
    def section(node):
        return sum(header <= node.lineno for header in HEADERS)

    assert len(HEADERS) == 9
    for name, node in DEFINED.items():
        for needed in globals_read(compiled(node)) & DEFINED.keys():
            assert section(DEFINED[needed]) <= section(node), f"{name} needs {needed}, which is further down"


# The README's recipes: what is copied, from the definition of the first name to that of the second; other definitions
# of common.py that it takes; and the names that are imported.
TRITON = {"triton", "tl", "constexpr"}
RECIPES = {
    "token_logps": (("CHUNK", "token_logps"), set(), {"torch", *TRITON}),
    "response_logps": (("CHUNK", "shares_prompts"), set(), {"torch", "itertools", "pad_sequence", *TRITON}),
    "generate": (
        ("Response", "_slots_agree"),
        {"_wide_mm", "head_logits", "lm_head", "attention_masks", "only_plain_attention"},
        {"torch", "hashlib", "weakref", "dataclass", "pad_sequence", "DynamicCache", "Cache", "CacheLayerMixin"},
    ),
    "SplitMaster": (("SLICE", "update_master_triton"), {"_jit"}, {"torch", *TRITON}),
    "PairRM": (
        ("PAIRRM", "score_prefs"),
        {"InputError", "require", "not_loaded"},
        {"torch", "itertools", "re", "os", "pad_sequence", "AutoTokenizer", "DebertaV2Config", "DebertaV2Model"}
        | {"DebertaV2PreTrainedModel", "GatedRepoError", "HFValidationError", "LocalEntryNotFoundError"}
        | {"OfflineModeIsEnabled", "RepositoryNotFoundError"},
    ),
    "LLMJudge": (
        ("RUBRIC", "LLMJudge"),
        {"InputError", "require", "writing", "plain_text"},
        {"torch", "collections", "contextlib", "hashlib", "json", "math", "os", "random", "re", "sys", "threading"}
        | {"time", "FIRST_EXCEPTION", "ThreadPoolExecutor", "wait", "parsedate_to_datetime", "Path", "InferenceClient"}
        | {"get_session", "InferenceTimeoutError", "SafetensorError"},
    ),
}


def copied(name):
    """The module that a recipe makes."""
    (start, end), helpers, imported = RECIPES[name]
    first, last = (TREE.body.index(DEFINED[limit]) for limit in (start, end))
    head = [node for node in TREE.body if node.lineno < HEADERS[0]]
    imports = [node for node in head if isinstance(node, ast.Try) or imported & set(names_of(node))]
    others = [node for node in TREE.body if helpers & set(names_of(node)) and node.lineno > HEADERS[0]]
    body = TREE.body[first : last + 1]
    module = {"__name__": "copied"}
    exec(compiled(*imports, *others, *body), module)
    own = {name for node in [*others, *body] for name in names_of(node)}
    own |= {*dir(builtins), "__name__", "__qualname__", "__annotations__"}
    needed = globals_read(compiled(*others, *body)) - own
    assert needed == imported, f"{needed - imported} is not mentioned, or {imported - needed} not needed"
    return module


@pytest.mark.parametrize("name", RECIPES)
def test_the_readme_says_what_to_copy(name):
    (start, end), helpers, _ = RECIPES[name]
    told = README.split(f"- `{name}`" if name != "PairRM" else "- `judge_prefs`")[1].split("\n- `")[0]
    assert "to copy" in told
    section = sum(header <= DEFINED[start].lineno for header in HEADERS)
    assert f"section {section}" in told
    for word in [*(start, end) * (f"section {section} from" in told), *helpers]:
        assert f"`{word}`" in told or word == name, word
    copied(name)


def test_copied_log_probs_and_samples_are_the_same(tiny_cache):
    policy, _ = common.load_policy(str(common.tiny_policy("tiny", tiny_cache)))
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(5, 4), torch.randn(7, 4), torch.tensor([0, 6, 3, 3, 1])
    assert torch.equal(
        copied("token_logps")["token_logps"](hidden, weight, targets), common.token_logps(hidden, weight, targets)
    )
    rows = [[5, 6, 7], [5, 6, 7], [9]], [[8, 1], [4], [2, 2, 1]]
    assert torch.equal(copied("response_logps")["response_logps"](policy, *rows), common.response_logps(policy, *rows))
    settings = {"k": 2, "max_new_tokens": 5, "eos_ids": [1]}
    mine = copied("generate")["generate"](policy, rows[0][1:], **settings)
    assert [[r.ids for r in row] for row in mine] == [
        [r.ids for r in row] for row in common.generate(policy, rows[0][1:], **settings)
    ]


def test_the_copied_optimiser_takes_the_same_step():
    weights = []
    for module in (copied("SplitMaster"), vars(common)):
        p = torch.nn.Parameter(torch.linspace(-1, 1, 8).bfloat16())
        p.grad = torch.linspace(1, -2, 8).bfloat16()
        module["SplitMaster"]([p], lr=1e-3).step()
        weights.append(module["join_master"](p.data, p.master_remainder))
    assert torch.equal(*weights)


def test_copied_judges_refuse_what_is_no_judge(tmp_path, monkeypatch):
    module = copied("PairRM")
    with pytest.raises(module["InputError"], match="--judge"):
        module["PairRM"](str(tmp_path / "nothing"))
    monkeypatch.chdir(tmp_path)
    module = copied("LLMJudge")
    judge = module["LLMJudge"]("name", "http://localhost:9", max_failures=0.0)
    with pytest.raises(module["InputError"], match="cannot be reached"):
        judge(["hello"], [["a", "b"]])
    assert module["read_points"]('{"id0_score": 3}', 1) == [3]
