"""Expert capacity over the whole micro-batch, so that what is dropped does not depend on the
layout.

megatron-core drops on each rank's own token shard (S/tp/cp tokens): another tp or cp drops other
tokens. With `--moe-capacity-scope micro-batch` (the default) the scores of all shards are gathered
([T, E] numbers, no gradient), every rank makes the same choice over the tokens in their order in
the sequence, and keeps its part. `shard` is megatron-core's meaning, and the one that padding to
capacity needs.

Policies: `probs` keeps the tokens with the largest routing weight, `position` the first ones (by
cumulated count; torch.topk on zeros and ones, as 0.16.1 does it, keeps arbitrary ones).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron_ext.context import zigzag


def expert_capacity(num_tokens: int, topk: int, num_experts: int, factor: float) -> int:
    """Tokens that one expert takes: ceil(T * K / E * factor)."""
    return math.ceil(num_tokens * topk / num_experts * factor)


def kept(probs_TE: Tensor, map_TE: Tensor, capacity: int, policy: str) -> Tensor:
    """bool [T, E]: the assignments of `map` that fit; T are all tokens in sequence order."""
    if policy == "position":
        return map_TE & (map_TE.cumsum(dim=0) <= capacity)
    if capacity >= map_TE.shape[0]:
        return map_TE
    scores = probs_TE.masked_fill(~map_TE, -1.0)
    best = torch.topk(scores, k=capacity, dim=0, sorted=False).indices
    return map_TE & torch.zeros_like(map_TE).scatter(0, best, True)


def in_sequence_order(shards: list[Tensor], tp: int, batch: int) -> Tensor:
    """Shards [S/(tp*cp) * B, E] of the ranks of a tp x cp group (tp fastest) -> [S * B, E] in
    sequence order; context-parallel ranks hold zig-zag chunks, tp ranks contiguous pieces of those.
    """
    cp, width = len(shards) // tp, shards[0].shape[-1]
    parts = [torch.cat(shards[i * tp : (i + 1) * tp]).view(-1, batch, width) for i in range(cp)]
    return zigzag(cp).join(parts, dim=0).reshape(-1, width)


def own_shard(whole: Tensor, rank: int, tp: int, cp: int, batch: int) -> Tensor:
    """The rows of rank `rank` of the tp x cp group: the inverse of `in_sequence_order`."""
    rows = whole.view(-1, batch, whole.shape[-1])
    mine = zigzag(cp).split(rows, rank // tp, dim=0)
    return mine.chunk(tp)[rank % tp].reshape(-1, whole.shape[-1])


def kept_of_micro_batch(
    probs_TE: Tensor, map_TE: Tensor, *, batch: int, factor: float, topk: int, policy: str, groups
) -> Tensor:
    """bool [local T, E]: what this rank keeps when the capacity counts the whole micro-batch.

    `groups` has `tp`, `cp`, `tp_cp` (megatron-core's process groups; tp is the fast axis of tp_cp).
    """
    tp, cp = groups.tp.size(), groups.cp.size()
    probs, chosen = probs_TE.detach().float(), map_TE
    if tp * cp > 1:
        both = torch.stack((probs, chosen.float())).contiguous()
        shards = [torch.empty_like(both) for _ in range(tp * cp)]
        torch.distributed.all_gather(shards, both, group=groups.tp_cp)
        probs = in_sequence_order([shard[0] for shard in shards], tp, batch)
        chosen = in_sequence_order([shard[1] for shard in shards], tp, batch).bool()
    capacity = expert_capacity(chosen.shape[0], topk, chosen.shape[1], factor)
    keep = kept(probs, chosen, capacity, policy)
    if tp * cp == 1:
        return keep
    return own_shard(keep, groups.tp_cp.rank(), tp, cp, batch)
