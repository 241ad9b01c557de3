"""Reads dataclass fields from SOURCE: name, type, default, docstring, without importing it.

``--help`` and ``--print-config`` must be instant, and importing megatron-core costs four seconds
of torch a rank.  So both megatron-core's dataclasses and our own sections are read by `ast`::

    source file -> ClassDef -> AnnAssign + the docstring below it -> Field -> (flags.py) a flag

`metadata={"argparse_meta": {"arg_names": [...], "default": ...}}` is megatron-core's own way to
say that a flag is spelled or defaulted differently; our sections use the same.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

UNREADABLE = object()
"""The default of a field whose default is not plain data (a function, a dtype)."""

_BINARY: dict[type, Callable] = {
    ast.Pow: operator.pow,
    ast.Mult: operator.mul,
    ast.Add: operator.add,
    ast.Sub: operator.sub,
}


@dataclass(frozen=True)
class Field:
    """One field of a dataclass as its source spells it."""

    name: str
    annotation: str
    default: object
    help: str
    owner: str
    meta: dict = field(default_factory=dict)


@lru_cache(maxsize=32)
def _module(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def read_dataclass(path: Path, class_name: str) -> list[Field]:
    """The fields of ``class_name`` in the file, in order, own ones only (no inherited ones).

    Raises:
        LookupError: the file has no such class.
    """
    for node in _module(path).body:
        if isinstance(node, ast.ClassDef) and node.name == class_name:
            return _fields(node)
    raise LookupError(f"{path} has no class {class_name}")


def read_enum(path: Path, class_name: str) -> tuple[str, ...]:
    """The member names of an enum in the file, in order."""
    for node in _module(path).body:
        if isinstance(node, ast.ClassDef) and node.name == class_name:
            assigns = [n for n in node.body if isinstance(n, ast.Assign)]
            return tuple(n.targets[0].id for n in assigns if isinstance(n.targets[0], ast.Name))
    raise LookupError(f"{path} has no enum {class_name}")


def _fields(node: ast.ClassDef) -> list[Field]:
    found = []
    for statement, following in zip(node.body, [*node.body[1:], None], strict=True):
        if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
            continue
        default, meta = _default_and_meta(statement.value)
        found.append(
            Field(
                name=statement.target.id,
                annotation=ast.unparse(statement.annotation),
                default=default,
                help=_docstring(following),
                owner=node.name,
                meta=meta,
            )
        )
    return found


def _docstring(node: ast.stmt | None) -> str:
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        if isinstance(node.value.value, str):
            return " ".join(node.value.value.split())
    return ""


def _default_and_meta(value: ast.expr | None) -> tuple[object, dict]:
    if value is None:
        return UNREADABLE, {}
    if not (isinstance(value, ast.Call) and ast.unparse(value.func).endswith("field")):
        return plain_value(value), {}
    keywords = {k.arg: k.value for k in value.keywords}
    meta: dict = {}
    if "metadata" in keywords:
        meta = ast.literal_eval(keywords["metadata"]).get("argparse_meta", {})
    if "default" in keywords:
        return plain_value(keywords["default"]), meta
    factory = ast.unparse(keywords["default_factory"]) if "default_factory" in keywords else ""
    return {"list": [], "tuple": ()}.get(factory, UNREADABLE), meta


def plain_value(node: ast.expr) -> object:
    """Literals and arithmetic on them; `Enum.member` and `torch.dtype` as the last name's text."""
    if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        return _BINARY[type(node.op)](plain_value(node.left), plain_value(node.right))
    if isinstance(node, ast.Attribute):
        dtype = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
        return dtype.get(node.attr, node.attr)
    try:
        return ast.literal_eval(node)
    except ValueError:
        return UNREADABLE
