"""The house rules as pure functions: a syntax tree or a text in, one line for each violation out.

`test_rules.py` shows that each finds a planted violation, `test_house.py` applies them.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

LONGEST_FILE = 400
LONGEST_FUNCTION = 60
DEEPEST_NESTING = 3
FORBIDDEN_NAMES = frozenset({"utils", "util", "common", "helpers", "helper", "misc", "stuff"})
OURS = ("megatron_ext", "data", "tests", "launch", "pretrain_moe")

LAYER = {
    "errors": 0,
    "packages": -1,
    "owned": -1,
    "ulimits": -1,
    "native": 0,
    "ranges": 0,
    "state_files": 0,
    "command": 1,
    "config": 1,
    "device": 1,
    "mesh": 2,
    "costs": 3,
    "kernels": 3,
    "moe": 4,
    "context": 3,
    "model": 5,
    "pipeline": 6,
    "optim": 6,
    "checkpoint": 7,
    "observe": 7,
    "resilience": 7,
    "train": 8,
    "planner": 8,
    "preflight": 9,
    "generate": 9,
    "parity": 9,
    "replay": 9,
    "hf": 10,
    "upcycle": 11,
}
"""ARCHITECTURE.md's layers; a package of megatron_ext imports lower ones and itself."""

READS_DATA = 8
"""From this layer on a package may import data/."""

WITHOUT_TORCH = (
    "megatron_ext.errors",
    "megatron_ext.ranges",
    "megatron_ext.state_files",
    "megatron_ext.command",
    "megatron_ext.config",
    "megatron_ext.costs",
)
READ_BY_LAUNCHERS = (
    "megatron_ext.ulimits",
    "megatron_ext.preflight",
    *(f"megatron_ext.mesh.{name}" for name in ("attempt", "limits", "signals")),
    "megatron_ext.checkpoint.identity",
    "megatron_ext.checkpoint.starting",
    *(f"megatron_ext.resilience.{name}" for name in ("clocks", "diagnose", "hang", "heartbeat")),
)
"""Modules of higher layers that work without torch."""
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
BLOCKS = (ast.If, ast.For, ast.AsyncFor, ast.While, ast.Try)


def imported(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything that a module imports, wherever it does."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level:
            yield node.lineno, "." * node.level
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def _layer_of(module: str) -> int | None:
    parts = module.split(".")
    return LAYER.get(parts[1]) if parts[0] == "megatron_ext" and len(parts) > 1 else None


def wrong_imports(module: str, tree: ast.Module) -> list[str]:
    """Imports that go up, sideways or out of the layers."""
    found = []
    for line, name in imported(tree):
        problem = _import_problem(module, name)
        if problem:
            found.append(f"{module}:{line} imports {name}: {problem}")
    return found


def _import_problem(module: str, name: str) -> str | None:
    if name.startswith("."):
        return "relative imports hide the package"
    is_light = module.startswith((*WITHOUT_TORCH, *READ_BY_LAUNCHERS, "launch"))
    if is_light and name.split(".")[0] in ("torch", "megatron"):
        return "this package works without torch"
    if name.split(".")[0] not in OURS or module == "pretrain_moe":
        return None
    if module.startswith("launch"):
        allowed = name.startswith(("launch", *WITHOUT_TORCH, *READ_BY_LAUNCHERS))
        is_warm = module == "launch.warm"  # imports the program in order to fork it
        return None if allowed or is_warm else "launchers work without torch"
    if module.split(".")[0] == "data":
        allowed = name.startswith(("data", "megatron_ext.errors", "megatron_ext.command"))
        return None if allowed else "data/ knows of megatron_ext only errors and command"
    return _layer_problem(module, name)


def _layer_problem(module: str, name: str) -> str | None:
    layer = _layer_of(module)
    if layer is None:
        return None if module == "megatron_ext" else "this package has no layer in rules.LAYER"
    if name.split(".")[0] == "data":
        return None if layer >= READS_DATA else f"only layers from {READS_DATA} on read data/"
    target = _layer_of(name)
    if target is None:
        return "it has no layer"
    if name.split(".")[:2] == module.split(".")[:2] or target < layer:
        return None
    return f"layer {target} is not below layer {layer}"


def long_file(path: Path, text: str) -> list[str]:
    """A file of more than 400 lines."""
    count = len(text.splitlines())
    return [f"{path}: {count} lines, {LONGEST_FILE} at most"] if count > LONGEST_FILE else []


def _functions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, FUNCTIONS):
            yield node


def long_functions(path: Path, tree: ast.Module) -> list[str]:
    """Functions of more than 60 lines, their docstring not counted."""
    found = []
    for node in _functions(tree):
        first = node.body[0]
        is_documented = ast.get_docstring(node, clean=False) is not None
        docstring = first.end_lineno - first.lineno + 1 if is_documented else 0
        count = node.end_lineno - node.lineno + 1 - docstring
        if count > LONGEST_FUNCTION:
            text = f"{path}:{node.lineno} {node.name}: {count} lines"
            found.append(f"{text}, {LONGEST_FUNCTION} at most")
    return found


def _adds_depth(node: ast.AST) -> bool:
    """False for a loop or branch that holds nothing but another: `for a: for b: if c:` is one."""
    if not isinstance(node, BLOCKS):
        return False
    is_alone = len(node.body) == 1 and isinstance(node.body[0], (ast.If, ast.For))
    return not is_alone or isinstance(node, ast.Try) or bool(node.orelse)


def _depth(node: ast.AST, is_else: bool = False) -> int:
    """Branches, loops and tries inside each other; an elif is not inside its if, and a nested
    function starts anew.
    """
    deepest = 0
    for name, value in ast.iter_fields(node):
        children = value if isinstance(value, list) else [value]
        is_elif = isinstance(node, ast.If) and name == "orelse" and len(children) == 1
        for child in (c for c in children if isinstance(c, ast.AST)):
            if not isinstance(child, FUNCTIONS):
                deepest = max(deepest, _depth(child, is_elif))
    return deepest + (_adds_depth(node) and not (is_else and isinstance(node, ast.If)))


def deep_nesting(path: Path, tree: ast.Module) -> list[str]:
    """Functions with more than three branches, loops or tries inside each other."""
    depths = [(node, max(map(_depth, node.body))) for node in _functions(tree)]
    return [
        f"{path}:{node.lineno} {node.name}: {depth} blocks deep, {DEEPEST_NESTING} at most"
        for node, depth in depths
        if depth > DEEPEST_NESTING
    ]


def hidden_state(path: Path, tree: ast.Module) -> list[str]:
    """`global`, and get_args()."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Global):
            found.append(f"{path}:{node.lineno} global {', '.join(node.names)}")
        elif isinstance(node, ast.Name) and node.id == "get_args":
            found.append(f"{path}:{node.lineno} get_args")
    return found


def swallowed_errors(path: Path, tree: ast.Module) -> list[str]:
    """`except:` without a type, and handlers that do nothing."""
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.ExceptHandler):
            continue
        if node.type is None:
            found.append(f"{path}:{node.lineno} except without a type")
        if all(isinstance(child, ast.Pass) for child in node.body):
            found.append(f"{path}:{node.lineno} the error is swallowed with pass")
    return found


def vague_name(path: Path) -> list[str]:
    """Files and folders called utils, common, helpers or misc."""
    words = [part.partition(".")[0] for part in path.parts]
    named = {piece for word in words for piece in word.split("_")} & FORBIDDEN_NAMES
    return [f"{path}: '{name}' says nothing" for name in sorted(named)]


def left_for_later(path: Path, text: str) -> list[str]:
    """Comments that promise work."""
    lines = text.splitlines()
    pattern = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b")
    return [f"{path}:{n} {line.strip()}" for n, line in enumerate(lines, 1) if pattern.search(line)]


def undocumented(path: Path, tree: ast.Module) -> list[str]:
    """Modules, public classes and public functions of a module without a docstring."""
    found = [] if ast.get_docstring(tree) else [f"{path}:1 the module has no docstring"]
    for node in tree.body:
        is_public = isinstance(node, (*FUNCTIONS, ast.ClassDef)) and node.name[0] != "_"
        if is_public and not ast.get_docstring(node):
            found.append(f"{path}:{node.lineno} {node.name} has no docstring")
    return found


def fields_without_help(path: Path, tree: ast.Module) -> list[str]:
    """Fields of a dataclass that no string follows."""
    found = []
    for made in (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)):
        for field, after in zip(made.body, [*made.body[1:], None]):
            is_documented = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            if isinstance(field, ast.AnnAssign) and not is_documented:
                found.append(f"{path}:{field.lineno} {made.name}.{ast.unparse(field.target)}")
    return found
