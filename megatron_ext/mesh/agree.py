"""Errors that all ranks learn of together, so that one rank's bad file does not leave the others
waiting.

    datasets = agree(lambda: open_datasets(...))   # every rank tries; one failure ends all
    folder = first_rank(lambda: prepare(folder))   # rank 0 does it, all get its result or error
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from megatron_ext.errors import Fatal

T = TypeVar("T")


class FailedElsewhere(Fatal):
    """Another rank failed and prints why; this one only leaves with the same exit code."""

    def __init__(self, code: int, what: str) -> None:
        super().__init__(what)
        self.code = code

    def lines(self) -> list[str]:
        return []


def agree(action: Callable[[], T]) -> T:
    """Run `action` on this rank; raise on every rank if it raised a Fatal on any.

    The first failing rank raises its own error, the others FailedElsewhere with its code.
    Collective: all ranks call.
    """
    value: T | None = None
    failure: Fatal | None = None
    try:
        value = action()
    except Fatal as error:
        failure = error
    verdicts: list = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(verdicts, failure and (failure.code, str(failure)))
    failed = [rank for rank, verdict in enumerate(verdicts) if verdict]
    if not failed:
        return value
    if failure is not None and torch.distributed.get_rank() == failed[0]:
        raise failure
    raise FailedElsewhere(*verdicts[failed[0]])


def first_rank(action: Callable[[], T]) -> T:
    """Rank 0 runs `action`; every rank returns its (picklable) result or fails with it."""
    box: list = [None]

    def run() -> None:
        if torch.distributed.get_rank() == 0:
            box[0] = action()

    agree(run)
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]
