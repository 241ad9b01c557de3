"""Where the rows of every expert lie: one sort of the chosen experts, and blocks for its products.

    experts of the A assignments   2 0 1 0 2          (token 0: experts 2, 0; token 1: 1, 0; ...)
    expert_order                   1 3 | 2 | 0 4       assignments sorted by expert, stable
    in_blocks, 4 rows a block      1 3 . . | 2 . . . | 0 4 . .      P = 12 places

On a CPU the blocks are padded (a product of a row count that was not seen before costs oneDNN
0.9-3 ms against 0.06-0.12 ms, bf16, 256 rows); a padded place repeats the last row of its own
expert, so that a number that is not finite stays with its expert. On a device blocks have no
padding and nothing waits for a count.

Suffixes: A assignments (T tokens x K experts of each where none is dropped), E experts, P places.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Places:
    """A source rows <-> P places.

    sources_P  int64: the source row that a place shows
    places_A   int64: the place of each source row
    padding    int64: the places that show a row again; their results are not used
    rows_E     int64: rows of each expert's block, padding included; their sum is P
    """

    sources_P: Tensor
    places_A: Tensor
    padding: Tensor
    rows_E: Tensor


def expert_order(experts_A: Tensor, num_experts: int) -> Tensor:
    """[A] int64: assignments sorted by expert, those of one expert in their own order.

    On a CPU by numpy's radix sort: 7-20 times as fast as torch's for 4,096 to 16,384 assignments.
    """
    if experts_A.device.type != "cpu":
        return torch.argsort(experts_A, stable=True)
    narrow = np.uint8 if num_experts <= 256 else np.uint16 if num_experts <= 65536 else np.int64
    return torch.from_numpy(np.argsort(experts_A.numpy().astype(narrow), kind="stable"))


def chunk_order(rows_SE: Tensor) -> Tensor:
    """Rows that come in chunks, S sources outside and E experts inside -> [A] sorted by expert.

    `rows_SE`: int64 on the CPU, rows of each chunk.
    """
    sizes = rows_SE.numpy()
    starts = (np.cumsum(sizes) - sizes.ravel()).reshape(sizes.shape).T.ravel()
    counts = sizes.T.ravel()
    shift = np.repeat(starts - (np.cumsum(counts) - counts), counts)
    return torch.from_numpy(np.arange(len(shift)) + shift)


def inverse(order_A: Tensor) -> Tensor:
    """[A]: where each row stands in `order`."""
    ranks = torch.arange(len(order_A), device=order_A.device)
    return torch.empty_like(order_A).scatter_(0, order_A, ranks)


def without_blocks(order_A: Tensor, counts_E: Tensor) -> Places:
    """Places without padding; no value of a tensor is read."""
    return Places(order_A, inverse(order_A), order_A.new_empty(0), counts_E)


def in_blocks(order_A: Tensor, counts: Sequence[int], rows: Sequence[int]) -> Places:
    """Places in blocks of `rows[e]` >= `counts[e]` rows (CPU). An empty expert with a block shows
    source row 0.
    """
    order, counts, rows = order_A.numpy(), np.asarray(counts), np.asarray(rows)
    ends, starts = np.cumsum(counts), np.cumsum(rows) - rows
    place_of_rank = np.arange(len(order)) + np.repeat(starts - (ends - counts), counts)
    pads = rows - counts
    padding = np.arange(pads.sum()) + np.repeat(starts + counts - (np.cumsum(pads) - pads), pads)
    sources, places = np.zeros(rows.sum(), np.int64), np.empty(len(order), np.int64)
    if len(order):
        sources[padding] = np.repeat(order[np.maximum(ends - 1, 0)], pads)
    sources[place_of_rank] = order
    places[order] = place_of_rank
    parts = (torch.from_numpy(part) for part in (sources, places, padding, rows))
    return Places(*parts)
