"""Counts of the whole global batch before its first backward pass (`--moe-global-aux-mode exact`).

The global-batch loss of a micro-batch needs how often each expert is chosen in the global batch.
The paper's running estimate knows the micro-batches so far; the exact mode runs all micro-batches
forward once without gradients and only counts, so that the balance gradient does not depend on how
the batch is cut. One micro-batch needs no such pass: its counts, summed over ranks, are the global
ones.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from megatron_ext.moe.router import Router


def global_routers(chunks: Sequence[nn.Module]) -> list[Router]:
    """The routers of this rank that want exact counts, in the order that all ranks of a stage
    share.
    """
    modules = (module for chunk in chunks for module in chunk.modules())
    return [
        module for module in modules if isinstance(module, Router) and module.wants_exact_counts
    ]


@contextlib.contextmanager
def counting(chunks: Sequence[nn.Module], num_micro_batches: int) -> Iterator[None]:
    """Forward passes inside only count; on the way out every router knows its counts of the global
    batch.

    Random states are restored, so that dropout in the real pass repeats what was counted.
    """
    from megatron.core.tensor_parallel.random import _fork_rng

    routers = global_routers(chunks)
    for router in routers:
        router.begin_counting()
    try:
        with torch.no_grad(), _fork_rng():
            yield
    finally:
        _sum_over_ranks(routers, num_micro_batches)


def _sum_over_ranks(routers: Sequence[Router], num_micro_batches: int) -> None:
    """One all-reduce per group of routers with equal groups (all of a pipeline stage)."""
    if not routers:
        return
    counts = torch.stack([router.counted_E for router in routers])
    torch.distributed.all_reduce(counts, group=routers[0].tp_dp_cp_group)
    for router, total in zip(routers, counts):
        router.end_counting(total / num_micro_batches)


def forget(chunks: Sequence[nn.Module]) -> None:
    """Drop the counts after the step."""
    for router in global_routers(chunks):
        router.end_counting(None)
