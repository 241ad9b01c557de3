"""Sums of squares: of gradients (their norm over all ranks), in few large pieces."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import torch
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer
from torch import Tensor

from megatron_ext.device import current_device

ROW = 1 << 12
"""Elements that are summed in fp32."""


def runs(tensors: Sequence[Tensor]) -> Iterator[Tensor]:
    """Flat views over contiguous tensors; those that lie side by side in a storage become one.

    Storages come in the order of `tensors`, not of their addresses, which change from run to run
    and with them the last bit of a sum.
    """
    storages: dict[int, int] = {}
    for one in tensors:
        storages.setdefault(one.untyped_storage().data_ptr(), len(storages))
    placed = sorted(
        tensors, key=lambda one: (storages[one.untyped_storage().data_ptr()], one.storage_offset())
    )
    first: Tensor | None = None
    count = 0
    for one in placed:
        assert one.is_contiguous(), f"not contiguous: {one.shape}, strides {one.stride()}"
        if first is not None and _follows(one, first, count):
            count += one.numel()
            continue
        if first is not None:
            yield first.detach().as_strided((count,), (1,))
        first, count = one, one.numel()
    if first is not None:
        yield first.detach().as_strided((count,), (1,))


def _follows(one: Tensor, first: Tensor, count: int) -> bool:
    return (
        one.dtype == first.dtype
        and one.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        and one.storage_offset() == first.storage_offset() + count
    )


def _row_norms(run: Tensor) -> Iterator[Tensor]:
    """fp32 norms of the rows of a flat tensor, then of the rest. No BLAS: with a lower matmul
    precision torch takes oneDNN's product for `dot` (5x slower, in bf16 on some hosts).
    """
    if run.dtype != torch.float32:
        for block in run.split(64 * ROW):
            yield from _row_norms(block.float())
        return
    whole = run.numel() // ROW * ROW
    yield torch.linalg.vector_norm(run[:whole].view(-1, ROW), dim=1)
    if whole < run.numel():
        yield torch.linalg.vector_norm(run[whole:])[None]


def sum_of_squares(tensors: Sequence[Tensor]) -> Tensor:
    """float64 scalar over all of fp32 or 16-bit `tensors`; fp32 within a row only."""
    if not tensors:
        return torch.zeros((), dtype=torch.float64, device=current_device())
    if tensors[0].device.type != "cpu":
        norms = torch.stack(torch._foreach_norm(list(tensors), dtype=torch.float32))
    else:
        norms = torch.cat([part for run in runs(tensors) for part in _row_norms(run)])
    return norms.double().square().sum()


def _total(leaves: Iterable[MegatronOptimizer], group) -> float:
    """Sum of squares of the leaves' gradients over the ranks of `group` (None: all ranks)."""
    gradients = [grad for leaf in leaves for grad in leaf.get_main_grads_for_grad_norm()]
    total = sum_of_squares(gradients)
    if torch.distributed.get_world_size(group) > 1:
        torch.distributed.all_reduce(total, group=group)
    return float(total)


class Chain(ChainedOptimizer):
    """megatron-core's chain of optimizers (dense and expert parameters) with this norm."""

    @torch.no_grad()
    def get_grad_norm(self) -> float:
        """The L2 norm of the gradients of the whole model, each element once; the same on all
        ranks. Optimizers whose statistics are summed over the same ranks share one all-reduce.
        """
        leaves = self.chained_optimizers
        if not leaves:
            return 0.0
        if self.grads_states_parallel_group_is_shared():
            return math.sqrt(_total(leaves, leaves[0].get_grad_stats_parallel_group()))
        return math.sqrt(sum(_total([one], one.get_grad_stats_parallel_group()) for one in leaves))
