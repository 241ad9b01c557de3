"""The balance losses of a router as numbers that pull at its distribution.

Every one of them is sum over tokens and experts of distribution * pull, where `pull` is made of
counts and has no gradient: of this micro-batch, of each of its samples, or of the global batch
(Qiu et al. 2025, arXiv:2501.11873). With T tokens and K of E experts for each, an even load gives
pull = 1 / T and a loss of 1 at coefficient 1 (Fedus et al. 2021, arXiv:2101.03961).

Suffixes: B samples, S tokens of each, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor


def loss_strength(
    *, shards: int, dp: int, over_global_batch: bool, exact: bool, tokens: int | None
) -> float:
    """Factor on a balance or z loss so that its gradient has the strength of its coefficient in
    every layout.

    The loss of one rank is its share of a sum over `shards` = tp x cp token shards (and over dp as
    well for the global-batch loss). The data-parallel reduction then averages over dp, which is
    right for per-micro-batch losses and makes the global-batch one 1/dp of its coefficient; `exact`
    undoes that, `exact=False` keeps megatron-core's strength for recipes tuned with it. With
    --calculate-per-token-loss gradients are divided by the number of tokens of the global batch:
    `tokens` of this rank's shard times `shards` restores the loss (0.16.1 leaves out `shards`).
    """
    strength = 1.0
    if over_global_batch and exact:
        strength *= dp
    if tokens is not None:
        strength *= tokens * shards
    return strength


def pull_of(counts: Tensor, *, num_tokens: int, topk: int, num_samples: int = 1) -> Tensor:
    """counts [E] of `num_tokens` tokens, or [B, E] of as many tokens of each of `num_samples`
    samples -> float32 of the same shape; the loss of samples is their mean.
    """
    scale = counts.shape[-1] / (topk * num_tokens * num_tokens * num_samples)
    return counts * scale


def counted_by_sample(experts_TK: Tensor, num_samples: int, num_experts: int) -> Tensor:
    """[B, E] int64: assignments of each sample; token t is of sample t mod B."""
    sample_T = torch.arange(experts_TK.shape[0], device=experts_TK.device) % num_samples
    flat = (sample_T[:, None] * num_experts + experts_TK).flatten()
    zeros = flat.new_zeros(num_samples * num_experts)
    return zeros.scatter_add_(0, flat, torch.ones_like(flat)).view(num_samples, num_experts)


def summed(counts: Tensor, group) -> Tensor:
    """Counts summed over the ranks of `group`; a new tensor where there are several."""
    if group.size() == 1:
        return counts
    counts = counts.clone()
    torch.distributed.all_reduce(counts, group=group)
    return counts


def total_pull(parts: list[tuple[Tensor, float]]) -> Tensor | None:
    """Sum of pull * strength: [E], or [B, E] where one of them is of samples; None without parts
    or without strength.
    """
    total = None
    for pull, strength in parts:
        if strength:
            total = pull * strength if total is None else total + pull * strength
    return total
