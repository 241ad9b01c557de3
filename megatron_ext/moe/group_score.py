"""Group-limited choice with another score of a group: the sum of its best n experts.

megatron-core sums the best `topk / kept groups` experts of a group. DeepSeek-V2 (arXiv:2405.04434,
2.2.2) takes the best one (n = 1), DeepSeek-V3 two. An object of this class stands in the place of
megatron-core's `RouterReplay`, the seam through which its top-k goes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class GroupScore:
    """Top-k within the best groups, a group's score being the sum of its best `num_experts`."""

    num_experts: int

    def get_replay_topk(
        self,
        scores_TE: Tensor,
        topk: int,
        num_groups: int | None,
        group_topk: int | None,
        default_compute_topk: Callable,
    ) -> tuple[Tensor, Tensor]:
        """Scores and indices of the chosen experts, both [T, topk]."""
        if not group_topk:
            return default_compute_topk(scores_TE, topk, num_groups, group_topk)
        by_group = scores_TE.unflatten(1, (num_groups, -1))
        group_scores = by_group.topk(self.num_experts, dim=-1).values.sum(dim=-1)
        kept = torch.zeros_like(group_scores, dtype=torch.bool)
        kept.scatter_(1, group_scores.topk(group_topk, dim=1).indices, True)
        allowed = by_group.masked_fill(~kept.unsqueeze(-1), float("-inf"))
        return torch.topk(allowed.flatten(1), k=topk, dim=1)
