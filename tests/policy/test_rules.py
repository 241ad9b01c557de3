"""Each house rule finds a planted violation and leaves the clean version alone."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.policy import rules

PATH = Path("data/example.py")


@pytest.mark.parametrize(
    ("module", "line", "is_wrong"),
    [
        ("megatron_ext.mesh.a", "from megatron_ext.model import gpt", True),
        ("megatron_ext.mesh.a", "from megatron_ext import train", True),
        ("megatron_ext.mesh.a", "import megatron_ext.train.loop", True),
        ("megatron_ext.mesh.a", "def f():\n    from megatron_ext.train import loop", True),
        ("megatron_ext.mesh.a", "from . import layout", True),
        ("megatron_ext.config.a", "from megatron_ext.device import start", True),
        ("megatron_ext.config.a", "import torch", True),
        ("megatron_ext.costs.a", "from megatron.core import parallel_state", True),
        ("megatron_ext.model.a", "from data import build_tokenizer", True),
        ("megatron_ext.newroom.a", "from megatron_ext.mesh import layout", True),
        ("megatron_ext.mesh.a", "from megatron_ext.newroom import x", True),
        ("data.a", "from megatron_ext.config import parse", True),
        ("launch.local", "from megatron_ext.train import loop", True),
        ("launch.local", "import torch", True),
        ("launch.local", "from megatron_ext.errors import Fatal", False),
        ("megatron_ext.mesh.a", "from megatron_ext.config import parse", False),
        ("megatron_ext.mesh.a", "from megatron_ext.mesh import grid", False),
        ("megatron_ext.train.a", "from data import build_tokenizer", False),
        ("megatron_ext.model.a", "import torch", False),
        ("data.a", "from megatron_ext.errors import DataError", False),
        ("pretrain_moe", "from megatron_ext.train import loop", False),
    ],
)
def test_imports(module, line, is_wrong):
    assert bool(rules.wrong_imports(module, ast.parse(line))) == is_wrong


def _function(num_lines: int, docstring: str = "") -> ast.Module:
    return ast.parse("def f():\n" + docstring + "    x = 1\n" * (num_lines - 1))


def test_sizes():
    assert rules.long_file(PATH, "x\n" * 401) and not rules.long_file(PATH, "x\n" * 400)
    assert rules.long_functions(PATH, _function(61))
    assert not rules.long_functions(PATH, _function(60))
    assert not rules.long_functions(PATH, _function(60, '    """One.\n\n    Two.\n    """\n'))


DEEP = """
def f():
    for a in b:
        x = 1
        if a:
            x = 2
            while x:
                x = 3
                {last}
"""


@pytest.mark.parametrize(
    ("last", "is_deep"), [("if x: y = 1", True), ("x = [i for i in x if i]", False)]
)
def test_nesting(last, is_deep):
    assert bool(rules.deep_nesting(PATH, ast.parse(DEEP.format(last=last)))) == is_deep


def test_chains_are_not_deep():
    """elif, and loops that hold nothing but a loop."""
    chain = "def f():\n    if a: x = 1\n" + "    elif a: x = 2\n" * 6
    assert not rules.deep_nesting(PATH, ast.parse(chain))
    product = "def f():\n for a in b:\n  for c in d:\n   for e in g:\n    for h in i:\n     x = 1\n"
    assert not rules.deep_nesting(PATH, ast.parse(product))


@pytest.mark.parametrize(
    ("rule", "bad", "good"),
    [
        (rules.hidden_state, "def f():\n    global x", "def f():\n    x = 1"),
        (rules.hidden_state, "args = get_args()", "args = parse()"),
        (rules.swallowed_errors, "try: x()\nexcept: y()", "try: x()\nexcept OSError: y()"),
        (rules.swallowed_errors, "try: x()\nexcept OSError: pass", "try: x()\nexcept OSError: y()"),
        (rules.undocumented, "x = 1", '"""Doc."""'),
        (rules.undocumented, '"""Doc."""\ndef f(): ...', '"""Doc."""\ndef _f(): ...'),
        (rules.undocumented, '"""Doc."""\nclass C: ...', '"""Doc."""\nclass C:\n    """Doc."""'),
        (rules.fields_without_help, "class C:\n    x: int = 1", 'class C:\n    x: int\n    "x"'),
        (
            rules.fields_without_help,
            'class C:\n    x: int = 1\n    y: int = 2\n    "y"',
            'class C:\n    """Doc."""',
        ),
    ],
)
def test_rules_of_one_file(rule, bad, good):
    assert rule(PATH, ast.parse(bad))
    assert not rule(PATH, ast.parse(good))


def test_names_and_promises():
    for name in ("data/utils.py", "megatron_ext/common/a.py", "data/io_helpers.py"):
        assert rules.vague_name(Path(name)), name
    assert not rules.vague_name(Path("data/storage.py"))
    assert rules.left_for_later(PATH, "x = 1  # TODO: later\n")
    assert not rules.left_for_later(PATH, "x = 1  # to do it later would cost more\n")
