"""common.py as a house: its sections stand on those above them, and its parts work in a file of their own."""

import ast
import re
import types

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT

import common
import sppo
import test_pairrm
from test_generate import make

toy = test_pairrm.toy
TEXT = (ROOT / "common.py").read_text(encoding="utf-8")
TREE = ast.parse(TEXT)
TITLE = re.compile(r"^# (\d)\. (.*?) -+$", re.M)


def names_of(node):
    """The names that a top-level statement defines."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else []
    return [name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)]


def sections():
    """{number: (title, first line, line after the last)}"""
    starts = [(match[1], match[2], TEXT[: match.start()].count("\n") + 1) for match in TITLE.finditer(TEXT)]
    ends = [line for _, _, line in starts[1:]] + [TEXT.count("\n") + 1]
    return {number: (title, start, end) for (number, title, start), end in zip(starts, ends, strict=True)}


def section_of(line):
    return max((int(n) for n, (_, start, _) in sections().items() if start <= line), default=0)


def test_a_section_depends_only_on_those_above_it():
    where = {name: section_of(node.lineno) for node in TREE.body for name in names_of(node)}
    for node in TREE.body:
        names = [name for name in ast.walk(node) if isinstance(name, ast.Name)]
        own = {arg.arg for arg in ast.walk(node) if isinstance(arg, ast.arg)}
        own |= {name.id for name in names if isinstance(name.ctx, ast.Store)} - set(names_of(node))
        used = {name.id for name in names if name.id in where} - own
        later = {name for name in used if where[name] > section_of(node.lineno)}
        assert not later, f"{names_of(node)} of section {section_of(node.lineno)} uses {later}"


def test_the_head_lists_the_sections_with_their_line_counts():
    listed = re.findall(r"^    (\d)\. (.*?)  +(\d+)  ", ast.get_docstring(TREE, clean=False), re.M)
    assert listed == [(n, title, str(end - start)) for n, (title, start, end) in sections().items()]


def test_only_cli_exits_reads_the_command_line_and_touches_the_streams():
    found = set()
    for node in TREE.body:
        for x in ast.walk(node):
            if isinstance(x, ast.Attribute) and isinstance(x.value, ast.Name) and x.value.id == "sys":
                found |= {(name, x.attr) for name in names_of(node)}
    assert found - {("start_run", name) for name in ("version", "modules")} == {
        ("cli", name) for name in ("argv", "exit", "stdout", "stderr")
    }
    assert all("SystemExit" not in ast.dump(node) for node in TREE.body)


def test_a_notebook_survives(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for call in (
        lambda: common.PairRM("/nowhere"),
        lambda: common.load_policy("nowhere"),
        lambda: sppo.main(sppo.Args(judge="?", name="x")),
    ):
        with pytest.raises(common.UserError, match="give"):
            call()


# Parts that are copied ------------------------------------------------------------------------------------------------


def copied(*wanted, script="common"):
    """The namespace of a file that holds these functions of common.py and what they need, and nothing else."""
    text = (ROOT / f"{script}.py").read_text(encoding="utf-8")
    body = ast.parse(text).body
    imports = [node for node in body if isinstance(node, (ast.Import, ast.ImportFrom, ast.Try))]
    imports = [node for node in imports if getattr(node, "module", "") != "common"]
    defined, todo = {name: node for node in body for name in names_of(node)}, list(wanted)
    needed = set()
    while todo:
        node = defined[todo.pop()]
        if node not in needed:
            needed.add(node)
            todo += [x.id for x in ast.walk(node) if isinstance(x, ast.Name) and x.id in defined]
    source = "\n".join(ast.get_source_segment(text, node) for node in imports)
    for node in body:
        if node in needed:
            decorators = "".join(f"@{ast.unparse(x)}\n" for x in getattr(node, "decorator_list", []))
            source += "\n" + decorators + ast.get_source_segment(text, node)
    module = types.ModuleType("mine")
    module.lines = source.count("\n") + 1
    exec(compile(source, "mine.py", "exec"), module.__dict__)
    return module


def test_token_logps():
    mine = copied("token_logps")
    hidden, head = torch.randn(2, 5, 16), torch.nn.Linear(16, 50, bias=False).requires_grad_(False)
    targets = torch.randint(50, (2, 5))
    targets[0, :2] = -100
    right = -F.cross_entropy(head(hidden).flatten(0, 1), targets.flatten(), reduction="none").view(2, 5)
    torch.testing.assert_close(mine.token_logps(hidden, head.weight, targets), right)
    with torch.autocast("cpu", torch.bfloat16):
        logps = mine.token_logps(hidden.requires_grad_(), head.weight, targets)
        torch.testing.assert_close(logps, right)
        with torch.profiler.profile() as profile:
            logps.sum().backward()
    products = [event for event in profile.events() if event.name == "aten::mm"]
    assert len(products) == 1, "none for the frozen head"
    (grad,) = torch.autograd.grad(
        F.cross_entropy(head(hidden).flatten(0, 1), targets.flatten(), reduction="sum"), hidden
    )
    torch.testing.assert_close(-hidden.grad, grad)
    assert not hidden.grad[0, :2].any()


def test_split_master():
    mine = copied("SplitMaster")
    policy = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 1)).bfloat16()
    groups = [{"params": layer.parameters(), "lr": lr} for layer, lr in zip(policy, (1e-3, 1e-5), strict=True)]
    optimizer, losses = mine.SplitMaster(groups, 1e-4), []
    for _ in range(50):
        loss = (policy(torch.ones(8, 3).bfloat16()).float() - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


def test_generate():
    mine, policy = copied("generate"), make("llama")
    own = policy.config._attn_implementation
    (samples,) = mine.generate(policy, [[5, 9, 40]], k=3, max_new_tokens=8, temperature=0, eos_ids=[2])
    right = policy.generate(
        torch.tensor([[5, 9, 40]]), max_new_tokens=8, do_sample=False, eos_token_id=2, pad_token_id=0
    )
    assert samples == [right[0, 3:].tolist()] * 3 and policy.config._attn_implementation == own
    with pytest.raises(ValueError, match="generate wants"):
        mine.generate(policy, [[]], k=3, max_new_tokens=8, eos_ids=[2])


def test_pairrm(toy):
    mine = copied("PairRM")
    judge = mine.PairRM(str(toy))
    prefs = judge(["light?", [{"role": "user", "content": "light?"}]], [["river", "code", "good"]] * 2)
    assert torch.equal(prefs[0], prefs[1]) and prefs.shape == (2, 3, 3)
    with pytest.raises(ValueError, match=r"equally many responses to each prompt, got \[2, 3\]"):
        judge(["a", "b"], [["x", "y", "z"], ["x", "y"]])
    with pytest.raises(mine.UserError, match="/nowhere: no PairRM like"):
        mine.PairRM("/nowhere")


def test_sppo_loss():
    one = torch.ones(2, 3)
    assert (
        copied("sppo_loss", script="sppo").sppo_loss(-2 * one, -3 * one, 0.75 * one, eta=8.0).tolist() == one.tolist()
    )


@pytest.mark.parametrize(
    ("part", "most"), [("token_logps", 180), ("SplitMaster", 110), ("generate", 330), ("PairRM", 220)]
)
def test_a_part_drags_little_along(part, most):
    assert copied(part).lines <= most
