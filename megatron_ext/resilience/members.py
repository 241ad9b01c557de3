"""Lists of ranks as short text: `0:8` is 0..7, `1:16:4` is 1, 5, 9, 13, anything else is listed."""

from __future__ import annotations

from collections.abc import Sequence

LONGEST = 84
"""Characters that a heartbeat has for the members of a group."""


def shorten(ranks: Sequence[int]) -> str:
    """The text of a group's ranks; "" where it would be too long."""
    ranks = list(ranks)
    if len(ranks) > 1:
        stride = ranks[1] - ranks[0]
        if stride > 0 and list(range(ranks[0], ranks[-1] + stride, stride)) == ranks:
            return f"{ranks[0]}:{ranks[-1] + 1}:{stride}"
    text = ",".join(map(str, ranks))
    return text if len(text) <= LONGEST else ""


def expand(text: str) -> tuple[int, ...]:
    """The ranks of a text of `shorten`; () where it says nothing."""
    if not text:
        return ()
    try:
        if ":" in text:
            return tuple(range(*map(int, text.split(":"))))
        return tuple(map(int, text.split(",")))
    except ValueError:
        return ()
