"""The rank grid as text: which rank is where, in at most sixteen rows, for any world size.

8 ranks = pp 2 x dp 2 x cp 1 x tp 2 = pp 2 x edp 1 x ep 4 x etp 1
ranks  pp  dp  cp  tp  |  edp  ep  etp
    0   0   0   0   0  |    0   0    0
    1   0   0   0   1  |    0   1    0
...
"""

from __future__ import annotations

from megatron_ext.mesh.layout import Layout

ROWS = 16
"""Most rows; larger worlds show blocks of neighbouring ranks."""

AXES = ("pp", "dp", "cp", "tp", "edp", "ep", "etp")
SUMMARY = ("tp", "cp", "dp", "pp", "ep", "etp", "edp")


def summary(layout: Layout) -> str:
    """The two folds of the world, on one line."""
    dense = " x ".join(f"{a} {layout.size(a)}" for a in AXES[:4])
    expert = " x ".join(f"{a} {layout.size(a)}" for a in ("pp", *AXES[4:]))
    return f"{layout.world_size} ranks = {dense} = {expert}"


def block_size(world_size: int) -> int:
    """Ranks of one row: the smallest divisor of the world that leaves at most `ROWS` rows."""
    least = -(-world_size // ROWS)
    return next(d for d in range(least, world_size + 1) if world_size % d == 0)


def format_grid(layout: Layout) -> str:
    """The summary, at most `ROWS` rows, and one line a kind of group."""
    block = block_size(layout.world_size)
    rows = [_row(layout, first, first + block - 1) for first in range(0, layout.world_size, block)]
    header = ["ranks", *AXES[:4], "|", *AXES[4:]]
    widths = [max(len(r[i]) for r in [header, *rows]) for i in range(len(header))]
    lines = [
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in [header, *rows]
    ]
    return "\n".join([summary(layout), *lines, _group_line(layout)])


def _row(layout: Layout, first: int, last: int) -> list[str]:
    seen = [layout.coordinates(rank) for rank in range(first, last + 1)]
    spans = {a: _span(min(c[a] for c in seen), max(c[a] for c in seen)) for a in AXES}
    cells = [spans[a] for a in AXES]
    return [_span(first, last), *cells[:4], "|", *cells[4:]]


def _span(low: int, high: int) -> str:
    return str(low) if low == high else f"{low}-{high}"


def _group_line(layout: Layout) -> str:
    """The group of rank 0 along each axis of more than one rank."""
    parts = []
    for axis in SUMMARY:
        if layout.size(axis) > 1:
            ranks = layout.group_of(0, axis)
            shown = " ".join(map(str, ranks[:8])) + (" ..." if ranks[8:] else "")
            parts.append(f"{axis}: {shown}")
    return "groups of rank 0: " + ("; ".join(parts) if parts else "none, one rank")
