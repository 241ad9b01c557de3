"""The experts of one rank on Triton's kernels; the same parameters, checkpoints and groups."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_ext.kernels.order import Order
from megatron_ext.kernels.routed import TRITON, routed_experts, sorted_experts
from megatron_ext.moe.experts import GroupedExperts


class DeviceExperts(GroupedExperts):
    """GroupedExperts whose plain SwiGLU runs as one function (`kernels.routed`) for the two kinds
    of input that `DeviceDispatcher` gives; any other goes the way of its base class.
    """

    on_device = True
    products = TRITON
    rows_RH: Tensor | None = None

    def _show(self, rows_RH: Tensor) -> None:
        self.rows_RH = rows_RH

    def forward(self, x: Tensor, tokens_per_expert: Order | Tensor, probs: Tensor | None):
        """(tokens [T, H], their order, routing weights [T, K]) -> their sums [T, H]; or (rows by
        expert [P, H], rows of each expert [e], None) -> [P, H], not weighted.
        """
        fc1, fc2 = self.fc1_weight, self.fc2_weight
        if isinstance(tokens_per_expert, Order):
            self.rows_RH = None
            show = self._show if self._forward_hooks else None
            out = routed_experts(x, probs, fc1, fc2, tokens_per_expert, self.products, show)
            return out, None
        if probs is None:
            ends = torch.cumsum(tokens_per_expert, 0, dtype=torch.int32)
            return sorted_experts(x, fc1, fc2, ends, self.products), None
        return super().forward(x, tokens_per_expert, probs)

    def outputs_by_expert(self, inputs: tuple, output: tuple) -> tuple[Tensor, Tensor]:
        """The rows of before their sum where tokens came in: only they show which expert it was.
        Those of dropped assignments are zero.
        """
        if not isinstance(inputs[1], Order):
            return super().outputs_by_expert(inputs, output)
        ends_E, rows_RH = inputs[1].ends_E.long(), self.rows_RH
        is_dropped_R = torch.arange(rows_RH.shape[0], device=rows_RH.device) >= ends_E[-1]
        rows_RH = rows_RH.masked_fill(is_dropped_R.unsqueeze(1), 0)
        return rows_RH, torch.diff(ends_E, prepend=ends_E.new_zeros(1))
