"""gloo's slow collectives made of its fast ones; each is asynchronous and gives a `Pending`.

    reduce-scatter  all-to-all, then a local sum in rank order (gloo's own is an all-reduce of
                    everything); 16-bit sums are accumulated in fp32 and rounded once
    all-gather      a send to and a receive from every other rank at once

Two ranks give bit for bit what gloo gives; with more, sums differ in their order, which here is
that of ranks. Shapes: n ranks; [n * P] the whole, [P] a rank's piece, one-dimensional.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch._C._distributed_c10d import AllToAllOptions, ProcessGroup

from megatron_ext.mesh.calls import Pending
from megatron_ext.mesh.host_collectives import sum_in_order

TAG = 0x6A7
"""Of the sends of an all-gather, so that they do not meet others between the same ranks."""


def reduce_scatter(
    stock: Mapping[str, Callable], group: ProcessGroup, output: Tensor, whole: Tensor, divisor: int
) -> Pending:
    """output [P] of rank j = sum over ranks of their whole [n * P], piece j, / divisor."""
    received, options = torch.empty_like(whole), AllToAllOptions()
    options.asyncOp = True
    work = stock["all_to_all_single"](group, received, whole, [], [], options)

    def finish() -> None:
        sum_in_order(output, list(received.chunk(group.size())), divisor)

    return Pending([work], finish)


def all_gather(
    stock: Mapping[str, Callable], group: ProcessGroup, whole: Tensor, piece: Tensor
) -> Pending:
    """whole [n * P], piece i = rank i's `piece` [P], which may lie in its place of `whole`."""
    me, size = group.rank(), group.size()
    targets, works = whole.chunk(size), []
    for step in range(1, size):
        works.append(stock["recv"](group, [targets[me - step]], (me - step) % size, TAG))
    for step in range(1, size):
        works.append(stock["send"](group, [piece], (me + step) % size, TAG))
    if targets[me].data_ptr() != piece.data_ptr():
        targets[me].copy_(piece)
    return Pending(works, lambda: None, keep=(piece, whole))
