"""Capacity over the whole micro-batch: what is kept, in which order, on which rank."""

import pytest
import torch

from megatron_ext.context import zigzag
from megatron_ext.moe.capacity import (
    expert_capacity,
    in_sequence_order,
    kept,
    own_shard,
)


def _routing(tokens=40, experts=4, topk=2, seed=0):
    torch.manual_seed(seed)
    probs = torch.rand(tokens, experts)
    chosen = torch.zeros(tokens, experts, dtype=torch.bool)
    chosen.scatter_(1, probs.topk(topk, dim=1).indices, True)
    return probs * chosen, chosen


def test_position_keeps_the_first_tokens():
    """Against a plain loop in sequence order (stock 0.16.1 keeps arbitrary ones, see below)."""
    probs, chosen = _routing()
    capacity = 12
    expected, used = torch.zeros_like(chosen), [0] * 4
    for t in range(40):
        for e in range(4):
            if chosen[t, e] and used[e] < capacity:
                expected[t, e] = True
                used[e] += 1
    assert torch.equal(kept(probs, chosen, capacity, "position"), expected)


def test_stock_position_policy_is_not_by_position():
    """The reason for ours: torch.topk over zeros and ones keeps arbitrary tokens."""
    from megatron.core.transformer.moe.moe_utils import apply_router_token_dropping

    differing = 0
    for seed in range(20):
        probs, chosen = _routing(seed=seed)
        ours = kept(probs, chosen, expert_capacity(40, 2, 4, 0.6), "position")
        _, stock = apply_router_token_dropping(probs, chosen, 2, 0.6, drop_policy="position")
        differing += not torch.equal(ours, stock)
    assert differing > 0, "upstream has changed: this correction may go"


def test_probs_keeps_the_likeliest_like_megatron_core():
    from megatron.core.transformer.moe.moe_utils import apply_router_token_dropping

    probs, chosen = _routing()
    ours = kept(probs, chosen, expert_capacity(40, 2, 4, 0.6), "probs")
    _, stock = apply_router_token_dropping(probs, chosen, 2, 0.6, drop_policy="probs")
    assert torch.equal(ours, stock)
    assert ours.sum(dim=0).max() <= expert_capacity(40, 2, 4, 0.6)


def test_large_capacity_drops_nothing():
    probs, chosen = _routing()
    for policy in ("probs", "position"):
        assert torch.equal(kept(probs, chosen, 40, policy), chosen)


@pytest.mark.parametrize(("tp", "cp"), [(1, 1), (2, 1), (1, 2), (2, 2), (4, 1), (1, 4)])
def test_shards_go_and_come_back(tp, cp):
    """[S=16, B=3] tokens cut as megatron-core does: zig-zag over cp, contiguous over tp."""
    seq, batch = 16, 3
    whole = torch.arange(seq * batch * 2).view(seq, batch, 2)
    halves = [zigzag(cp).split(whole, rank, dim=0) for rank in range(cp)]
    shards = [part.reshape(-1, 2) for half in halves for part in half.chunk(tp)]
    joined = in_sequence_order(shards, tp, batch)
    assert torch.equal(joined, whole.reshape(-1, 2))
    for rank, shard in enumerate(shards):
        assert torch.equal(own_shard(joined, rank, tp, cp, batch), shard)
