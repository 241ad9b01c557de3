"""The order of the sorted rows: which assignment stands in which row, found on the device.

Worked example, T = 3 tokens, K = 2, E = 4: experts [[2, 0], [0, 3], [2, 3]] has slots 0..5. Sorted
by expert: slots [1, 2, 0, 4, 3, 5]; rows (its inverse) [[2, 0], [1, 4], [3, 5]]; ends [2, 2, 4, 6].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Order:
    """slots_R int32: the slot t x K + k of each sorted row; rows_TK int32: its inverse; ends_E
    int32: where each expert's rows end.
    """

    slots_R: Tensor
    rows_TK: Tensor
    ends_E: Tensor


def sort_key_dtype(num_experts: int) -> torch.dtype:
    """The narrowest key: a radix sort on the device makes one pass for every few bits."""
    return (
        torch.uint8 if num_experts <= 256 else torch.int16 if num_experts < 2**15 else torch.int32
    )


def order_of(experts_TK: Tensor, counts_E: Tensor) -> Order:
    """Stable order of the slots by expert; `counts` is how often each expert is in `experts`.

    An expert of E stands for a dropped assignment: its row is -1 and lies behind ends[-1].
    """
    flat = experts_TK.reshape(-1).to(sort_key_dtype(counts_E.shape[0] + 1))
    slots = torch.sort(flat, stable=True).indices
    rows = torch.empty(slots.shape, dtype=torch.int32, device=slots.device)
    rows[slots] = torch.arange(slots.shape[0], dtype=torch.int32, device=slots.device)
    ends = torch.cumsum(counts_E, 0, dtype=torch.int32)
    rows = rows.view(experts_TK.shape).masked_fill_(experts_TK == counts_E.shape[0], -1)
    return Order(slots.to(torch.int32), rows, ends)


def experts_of_map(map_TE: Tensor, probs_TE: Tensor, topk: int) -> tuple[Tensor, Tensor, Tensor]:
    """(experts [T, K] with E for what was dropped, probs [T, K], counts [E]) of a bool map with at
    most K experts for a token; no value is read by the host, as `nonzero` would.
    """
    kept_TK, experts_TK = map_TE.to(torch.int8).topk(topk, dim=1)
    probs_TK = probs_TE.gather(1, experts_TK)
    counts_E = map_TE.sum(dim=0)
    return experts_TK.masked_fill(kept_TK == 0, map_TE.shape[1]), probs_TK, counts_E
