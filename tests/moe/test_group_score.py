"""Group-limited choice against a loop over tokens, and against megatron-core's own score."""

import pytest
import torch
from megatron.core.transformer.moe.moe_utils import group_limited_topk

from megatron_ext.moe.group_score import GroupScore


def reference(scores, topk, groups, kept, best):
    """Per token: the kept groups by the sum of their best experts, then the best in them."""
    chosen = []
    for row in scores.tolist():
        size = len(row) // groups
        parts = [row[g * size : (g + 1) * size] for g in range(groups)]
        sums = [sum(sorted(part, reverse=True)[:best]) for part in parts]
        order = sorted(range(groups), key=lambda g: -sums[g])[:kept]
        allowed = [g * size + e for g in order for e in range(size)]
        chosen.append(set(sorted(allowed, key=lambda e: -row[e])[:topk]))
    return chosen


@pytest.mark.parametrize(("topk", "kept", "best"), [(4, 2, 1), (4, 2, 2), (3, 3, 1), (2, 1, 4)])
def test_choice_is_that_of_the_loop(topk, kept, best):
    scores = torch.rand(63, 16, generator=torch.Generator().manual_seed(best))
    values, indices = GroupScore(best).get_replay_topk(scores, topk, 4, kept, None)
    assert [set(row) for row in indices.tolist()] == reference(scores, topk, 4, kept, best)
    assert torch.equal(values, scores.gather(1, indices))


def test_two_of_four_is_megatron_cores_choice():
    scores = torch.rand(63, 16, generator=torch.Generator().manual_seed(0))
    ours = GroupScore(2).get_replay_topk(scores, 4, 4, 2, None)[1]
    theirs = group_limited_topk(scores, 4, 63, 16, 4, 2)[1]
    assert torch.equal(ours.sort(dim=1).values, theirs.sort(dim=1).values)


def test_without_groups_the_default_is_called():
    called = GroupScore(1).get_replay_topk(torch.zeros(1, 2), 1, None, None, lambda *args: args)
    assert called[1:] == (1, None, None)
