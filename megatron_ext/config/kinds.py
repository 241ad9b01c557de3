"""From an annotation's text to the way a flag's words become a value.

int | None                -> one whole number        Literal["a", "b"]   -> one of a, b
list[str]                 -> one or more words       Union[str, List[str]] -> one word or a list
Union[int, List[int]]     -> a number or a pattern such as ([0]*3+[1]*58), read without eval
Tuple[int, int]           -> (128,0)
Seed, list[Count], ...    -> the numbers of `megatron_ext.ranges`, which end where those say
"""

from __future__ import annotations

import ast
from dataclasses import dataclass

from megatron_ext.config.fields import UNREADABLE
from megatron_ext.config.mcore_fields import enum_members
from megatron_ext.ranges import EMPTY, RANGES, Range, real_number, whole_number

PATTERN_LIMIT = 100_000
"""Longest list a pattern may spell, in entries."""

_SCALARS = {"bool", "int", "float", "str"}
_DTYPES = ("fp32", "fp16", "bf16", "fp8")
_EXACT = {
    "torch.dtype": ("str", None, _DTYPES),
    "AttnBackend": ("enum", None, "AttnBackend"),
    "Union[int, List[int]]": ("pattern", None, None),
    "Union[str, List[str]]": ("str", "fold", None),
    "Union[float, List[float]]": ("float", "fold", None),
    "Union[str, CudaGraphScope, List[str], List[CudaGraphScope]]": ("str", "fold", None),
    "Union[str, list, PipelineParallelLayerLayout]": ("str", None, None),
    "Tuple[int, int]": ("pair", None, None),
}


@dataclass(frozen=True)
class Kind:
    """How words become a value.

    Attributes:
        base: bool, int, float, str, pattern (int or list of int) or pair (two ints).
        many: None one word; "+" one or more; "fold" one or more, where one stays a scalar.
        choices: allowed values, if limited.
        optional: None is a legal value.
        range: of each number; None where there are `choices` or no numbers.
    """

    base: str
    many: str | None = None
    choices: tuple | None = None
    optional: bool = False
    range: Range | None = None

    def convert(self, words: list[str]) -> object:
        """The value that the words spell, in its range or not.

        Raises:
            ValueError: with the rule that they break, for a message.
        """
        if not all(word.strip() for word in words):
            raise ValueError(EMPTY)
        values = [self._one(word) for word in words]
        if self.many is None:
            return values[0]
        return values[0] if self.many == "fold" and len(values) == 1 else values

    def _one(self, word: str) -> object:
        value = _READERS[self.base](word)
        if self.choices and value not in self.choices:
            names = ", ".join(str(c) for c in self.choices)
            raise ValueError(f"must be one of {names}")
        return value


def pattern(word: str) -> int | list[int]:
    """``3``, ``[0,1,1]`` or ``([0]*3+[1]*58)``: sums and repeats of lists of ints, no eval."""
    rule = "must be a whole number or a pattern such as ([0]*3+[1]*58)"
    try:
        value = _pattern_value(ast.parse(word.strip(), mode="eval").body)
    except (SyntaxError, TypeError, RecursionError, MemoryError):
        raise ValueError(rule) from None
    if isinstance(value, list) and not all(type(v) is int for v in value):
        raise ValueError(rule)
    return value


def pair(word: str) -> tuple[int, int]:
    """``(128,0)`` or ``128,0``."""
    numbers = word.strip().strip("()[]").split(",")
    try:
        first, second = (int(n) for n in numbers)
    except ValueError:
        raise ValueError("must be two whole numbers such as (128,0)") from None
    return first, second


def _pattern_value(node: ast.expr) -> int | list[int]:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    if isinstance(node, ast.List | ast.Tuple):
        return [_pattern_value(e) for e in node.elts]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add | ast.Mult):
        left, right = _pattern_value(node.left), _pattern_value(node.right)
        return _combined(left, right, isinstance(node.op, ast.Add))
    raise TypeError


def _combined(left: int | list[int], right: int | list[int], add: bool) -> int | list[int]:
    if not add and isinstance(left, int) and isinstance(right, list):
        left, right = right, left
    if isinstance(left, list) and isinstance(right, int) and len(left) * right > PATTERN_LIMIT:
        raise TypeError
    return left + right if add else left * right  # type: ignore[operator]


_READERS = {
    "bool": lambda word: word,
    "int": whole_number,
    "float": real_number,
    "str": lambda word: word,
    "pattern": pattern,
    "pair": pair,
}


def kind_of(annotation: str) -> Kind | None:
    """The kind of an annotation's text; None where no flag can spell it (functions, objects)."""
    text, optional = _without_none(annotation.replace("typing.", ""))
    if text in _EXACT:
        base, many, choices = _EXACT[text]
        if base == "enum":
            return Kind("str", None, enum_members(str(choices)), optional)
        return Kind(base, many, choices, optional)  # type: ignore[arg-type]
    if text in RANGES or text in _SCALARS:
        limits = RANGES.get(text)
        return Kind(limits.base if limits else text, None, None, optional, limits)
    if text.startswith("Literal["):
        choices = ast.literal_eval(f"({text[len('Literal[') : -1]},)")
        return Kind("int" if isinstance(choices[0], int) else "str", None, choices, optional)
    if text.lower().startswith("list["):
        inner = kind_of(text[len("list[") : -1])
        return inner and Kind(inner.base, "+", inner.choices, optional, inner.range)
    return None


def _without_none(text: str) -> tuple[str, bool]:
    if text.startswith("Optional[") and text.endswith("]"):
        return text[len("Optional[") : -1], True
    if text.endswith(" | None"):
        return text[: -len(" | None")], True
    return text, False


def has_plain_default(default: object) -> bool:
    """False where the source's default is a function or an object."""
    return default is not UNREADABLE
