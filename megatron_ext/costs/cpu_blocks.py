"""Sizes that training chooses on a CPU and a plan must know: the rows of an expert's block, the
queries of a block of attention, what is kept for the backward pass.

Experts: a product of a row count that was not seen before costs oneDNN 0.9-3 ms against 0.06-0.12
ms (bf16, 256 rows), so blocks are padded to a multiple; where the padding costs less than the calls
that it saves, all blocks have the same rows and go into one batched product.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

ROW_MULTIPLE, ROW_STEPS = 32, 16
"""An expert's block on a CPU is rounded up to a multiple of ROW_MULTIPLE rows, a long one of a
ROW_STEPSth of the next power of two: oneDNN keeps a compiled kernel, about 250 KB, for each row
count of each product."""

BLOCKS, SMALLEST_BLOCK, TILE_NUMBERS = 4, 64, 1 << 22
"""Blocks of queries where they fit (4 compute 5/8 of the square), and scores at a time: 8 MB in
bf16, which a last-level cache holds."""

KEPT_LENGTH = 1024
"""Up to this length attention keeps its probabilities for the backward pass."""

KEPT_SOFTMAX_CPU, KEPT_SOFTMAX = 256 << 20, 2 << 30
"""Bytes of a micro-batch's softmax up to which the loss keeps it, on a CPU and elsewhere."""

CALL_FLOPS = 8e6
"""Work that costs as much as one more call of a product: about 20 us at 400 GFLOP/s."""


def row_multiple(count: int) -> int:
    """What a block of `count` rows is rounded up to a multiple of."""
    return max(ROW_MULTIPLE, (1 << max(count - 1, 0).bit_length()) // ROW_STEPS)


def rounded(count: int) -> int:
    """Rows of the block of an expert with `count` tokens; 0 for none."""
    multiple = row_multiple(count)
    return -(-count // multiple) * multiple


def block_rows(counts: Sequence[int], flops_per_row: float) -> list[int]:
    """Rows of each expert's block: rounded up each by itself, or equal for all where the padding
    costs less than the calls that it saves.
    """
    rows = [rounded(count) for count in counts]
    most = max(rows)
    calls = sum(1 for count in rows if count)
    if calls > 1 and (most * len(rows) - sum(rows)) * flops_per_row < 2 * calls * CALL_FLOPS:
        return [most] * len(rows)
    return rows


def expected_rows(num_rows: int, num_experts: int, flops_per_row: float) -> int:
    """Rows of all blocks together, expected for `num_rows` that fall on experts at random: half a
    multiple more for each, or the fullest (mean + sqrt(2 ln E mean)) for all.
    """
    mean = num_rows / num_experts
    fullest = mean + math.sqrt(2 * math.log(max(num_experts, 2)) * mean)
    rows = block_rows([math.ceil(fullest)] + [int(mean)] * (num_experts - 1), flops_per_row)
    if len(set(rows)) == 1:
        return sum(rows)
    return num_rows + num_experts * (row_multiple(math.ceil(mean)) // 2)


def block_length(s: int, r: int) -> int:
    """Query positions of a block of causal attention over `s`; `r` queries share a key head."""
    fitting = max(1, TILE_NUMBERS // (s * r))
    return min(s, max(SMALLEST_BLOCK, min(-(-s // BLOCKS), fitting)))
