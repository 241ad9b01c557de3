"""Which rank a started process plays, when the ranks stand in another order than the processes.

A file holds one slot a line: line n (from 0) is the physical slot of rank n; the planner writes it
(`python -m megatron_ext.planner time --rank-order FILE`).  A process in slot s, which its launcher
calls RANK s, becomes the rank whose line says s.  Rank 0 stays in slot 0, where the store is.

    file 0 2 1 3 on two nodes of 2:   process 1 (node 0) plays rank 2, process 2 (node 1) rank 1
"""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from pathlib import Path

from megatron_ext.errors import ConfigError

RANK_ORDER = "PRETRAIN_MOE_RANK_ORDER"
"""Environment variable: the file; the same on every process."""

APPLIED = "PRETRAIN_MOE_SLOT"
"""Set once RANK has been changed: the slot of this process."""


def read_order(path: str, world_size: int) -> tuple[int, ...]:
    """The slots of a file.

    Raises:
        ConfigError: not each of 0..world_size-1 once, or rank 0 is not in slot 0.
    """
    try:
        order = tuple(int(word) for word in Path(path).read_text(encoding="utf-8").split())
    except (OSError, ValueError) as error:
        raise ConfigError(f"--rank-order: {error}", do="one number a line", path=path) from None
    if sorted(order) != list(range(world_size)) or order[0] != 0:
        raise ConfigError(
            f"--rank-order: {len(order)} lines are not each of 0..{world_size - 1} once, 0 first",
            do="write it with python -m megatron_ext.planner time --rank-order FILE",
            path=path,
        )
    return order


def rank_of_slot(order: Sequence[int], slot: int) -> int:
    """The rank that the process in a physical slot plays."""
    return list(order).index(slot)


def apply(environ: MutableMapping[str, str]) -> None:
    """Change RANK as the file of RANK_ORDER says; nothing without it or the second time."""
    path = environ.get(RANK_ORDER)
    if not path or APPLIED in environ:
        return
    slot, world_size = int(environ["RANK"]), int(environ["WORLD_SIZE"])
    environ["RANK"] = str(rank_of_slot(read_order(path, world_size), slot))
    environ[APPLIED] = str(slot)
