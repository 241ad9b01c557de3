"""How heads are cut into parts, for the strategies that exchange sequence for heads."""

from __future__ import annotations


def can_cut(num_heads: int, num_groups: int, num_parts: int) -> bool:
    """Can N query heads with G key/value heads be cut into equal parts? Whole key/value heads per
    part, or whole parts per key/value head (which is then sent to each of them)."""
    if num_heads % num_parts:
        return False
    return num_groups % num_parts == 0 or num_parts % num_groups == 0


def head_slices(num_heads: int, num_groups: int, num_parts: int) -> tuple[tuple[slice, slice], ...]:
    """Per part: its query heads and the key/value heads that they read.

    (8, 4, 2) -> (0:4, 0:2), (4:8, 2:4);   (8, 2, 4) -> (0:2, 0:1), (2:4, 0:1), (4:6, 1:2), ...
    """
    assert can_cut(num_heads, num_groups, num_parts), (
        f"{num_heads} heads with {num_groups} key/value heads do not cut into {num_parts} parts"
    )
    width, per_group = num_heads // num_parts, num_heads // num_groups
    return tuple(
        (
            slice(part * width, (part + 1) * width),
            slice(part * width // per_group, ((part + 1) * width - 1) // per_group + 1),
        )
        for part in range(num_parts)
    )
