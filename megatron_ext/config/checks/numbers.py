"""The nearest values that work, as text for an error message."""

from __future__ import annotations

from collections.abc import Iterable

SHOWN = 6
"""Most alternatives that a message lists."""


def divisors(number: int) -> list[int]:
    """All divisors, ascending; of 0: none."""
    small = [d for d in range(1, int(number**0.5) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


def multiples_near(number: int, base: int) -> list[int]:
    """The multiples of ``base`` below and above ``number``, zero excluded."""
    below = number // base * base
    return [m for m in (below, below + base) if m > 0]


def one_of(values: Iterable[object], near: int | None = None) -> str:
    """``1, 2, 3 or 6``; with ``near``, only the closest ones to it."""
    kept = list(values)
    if near is not None and len(kept) > SHOWN:
        kept = sorted(sorted(kept, key=lambda v: abs(v - near))[:SHOWN])  # type: ignore[operator]
    words = [str(v) for v in kept]
    if not words:
        return "nothing (change the other sizes)"
    return " or ".join([", ".join(words[:-1]), words[-1]] if words[1:] else words)
