"""Numbers that a user may give: how a word becomes one, and the range of each kind.

    seed: Seed = 1234          in a section of config/: `Seed` is both its type and its range
    type=number("Seed")        in the parser of another program (`megatron_ext.command`)

`RANGES` is the whole list. NaN is in no range and infinity in none: no flag means either. Whole
numbers end where the arithmetic behind them does (int32 of a kernel, the 53 bits of a JSON number),
fractions where float32 ends.
"""

from __future__ import annotations

from dataclasses import dataclass

EMPTY = "is empty: an unset variable of the shell?"
"""What is said of a word without a letter, number or not."""

INT32 = 2**31 - 1
INT53 = 2**53
FLOAT32 = 3.4e38
PARTS, LAYERS = 1_000_000, 100_000
_FAR = (INT32, INT53, FLOAT32, PARTS, LAYERS)

Seed = Port = Size = Parts = Layers = Depth = Count = Whole = Integer = Window = SpikeWindow = (
    Minutes
) = int
Share = Chance = Portion = Positive = NotNegative = Real = Seconds = Wait = Factor = float


@dataclass(frozen=True)
class Range:
    """All numbers from `least` to `most`.

    Args:
        base: int or float.
        above, below: True where `least` or `most` itself is outside.
        also: single values outside that have a meaning of their own.
    """

    base: str
    least: float
    most: float
    above: bool = False
    below: bool = False
    also: tuple[float, ...] = ()

    def holds(self, number: float) -> bool:
        """True where the number is inside; never for NaN and infinity."""
        if number in self.also:
            return True
        low = number > self.least if self.above else number >= self.least
        return low and (number < self.most if self.below else number <= self.most)

    def nearest(self, number: float) -> float:
        """A number inside, the end that lies next to `number`."""
        if self.holds(number):
            return number
        if number > self.most:
            return self.most if not self.below else self.least
        return self.least if not self.above else min(1.0, self.most)

    def rule(self, number: float) -> str:
        """The end that `number` is beyond, ``must be at least 1``, or both where both are near."""
        low, high = _shown(self.least), _shown(self.most)
        also = "".join(f", or {_shown(n)}" for n in self.also)
        if self.most not in _FAR:
            start = f"above {low}" if self.above else f"from {low}"
            return f"must be {start} to {'below ' if self.below else ''}{high}{also}"
        if number > self.most or self.least == -self.most:
            finite = "finite, " if self.base == "float" else ""
            return f"must be {finite}at most {high}"
        return f"must be {'above' if self.above else 'at least'} {low}{also}"

    @property
    def example(self) -> str:
        """``use 1 or more``."""
        if self.above:
            return f"use a number above {_shown(self.least)}"
        if self.most in _FAR:
            return f"use {_shown(self.least)} or more"
        return f"use {_shown(self.least)} to {_shown(self.most)}"


def _shown(number: float) -> str:
    return f"{number:g}" if isinstance(number, float) else str(number)


RANGES: dict[str, Range] = {
    "Seed": Range("int", 0, 2**32 - 1),
    "Port": Range("int", 0, 65_535),
    "Size": Range("int", 1, INT32),
    "Parts": Range("int", 1, PARTS),
    "Layers": Range("int", 1, LAYERS),
    "Depth": Range("int", 0, LAYERS),
    "Count": Range("int", 1, INT53),
    "Whole": Range("int", 0, INT53),
    "Integer": Range("int", -INT32, INT32),
    "Window": Range("int", -1, INT32),
    "SpikeWindow": Range("int", 16, INT32),
    "Minutes": Range("int", 1, 10_000_000),
    "Share": Range("float", 0.0, 1.0),
    "Chance": Range("float", 0.0, 1.0, below=True),
    "Portion": Range("float", 0.0, 1.0, above=True),
    "Positive": Range("float", 0.0, FLOAT32, above=True),
    "NotNegative": Range("float", 0.0, FLOAT32),
    "Real": Range("float", -FLOAT32, FLOAT32),
    "Seconds": Range("float", 0.0, 1e9),
    "Wait": Range("float", 0.0, 1e9, above=True),
    "Factor": Range("float", 0.0, FLOAT32, above=True, also=(-1.0,)),
}
"""Name of a type -> its range.

Size, Count, Whole   of a tensor; of steps, samples, bytes; the same from 0
Parts, Layers, Depth ranks, heads, experts; layers of a stack; the same from 0
Port, Window, Factor 0 means any free port; -1 means without end; -1 means off
Seconds, Wait        0 means off or at once; cannot be 0
"""


def whole_number(word: str) -> int:
    """``5``, ``5e5`` or ``500_000``.

    Raises:
        ValueError: with the rule, for a message.
    """
    try:
        return int(word)
    except ValueError:
        number = _number(word, "must be a whole number")
    if not number.is_integer():
        raise ValueError("must be a whole number")
    return int(number)


def real_number(word: str) -> float:
    """A finite or infinite number; ``nan`` is refused. ValueError as `whole_number`."""
    number = _number(word, "must be a number")
    if number != number:  # noqa: PLR0124 - NaN is the only number that differs from itself
        raise ValueError("must be a number, not NaN")
    return number


def _number(word: str, rule: str) -> float:
    try:
        return float(word)
    except ValueError:
        raise ValueError(rule) from None
