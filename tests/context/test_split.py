"""The zig-zag split: its inverse, its balance, and the rows that RoPE gives a rank."""

import types

import pytest
import torch
from megatron.core.models.common.embeddings import rotary_pos_embedding

from megatron_ext.context import contiguous, zigzag


@pytest.mark.parametrize("layout", [zigzag, contiguous])
@pytest.mark.parametrize("cp", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("dim", [0, 1])
def test_join_undoes_split(layout, cp, dim):
    cut = layout(cp)
    x = torch.randn(48, 48, 3)
    parts = [cut.split(x, rank, dim) for rank in range(cp)]
    assert torch.equal(cut.join(parts, dim), x)
    assert {part.shape[dim] for part in parts} == {48 // cp}


def test_each_rank_holds_an_early_and_a_late_chunk():
    assert [zigzag(4).chunks(rank) for rank in range(4)] == [(0, 7), (1, 6), (2, 5), (3, 4)]
    assert zigzag(2).positions(1, 8).tolist() == [2, 3, 4, 5]
    assert zigzag(2).positions(0, 8).tolist() == [0, 1, 6, 7]
    causal_pairs = [int((zigzag(4).positions(r, 64) + 1).sum()) for r in range(4)]
    assert len(set(causal_pairs)) == 1


def test_a_length_that_does_not_cut_is_refused():
    with pytest.raises(AssertionError, match="sequence of 12 does not cut into 8 equal chunks"):
        zigzag(4).split(torch.zeros(1, 12), 0)


@pytest.mark.parametrize("cp", [2, 4])
def test_rope_gives_each_rank_the_rows_of_its_tokens(cp):
    """megatron-core's helper, as a CPU run uses it, cuts like ours."""
    rows = torch.arange(32.0).view(32, 1, 1, 1)
    for rank in range(cp):
        group = types.SimpleNamespace(size=lambda: cp, rank=lambda rank=rank: rank)
        got = rotary_pos_embedding.get_pos_emb_on_this_cp_rank(rows, 0, group)
        assert torch.equal(got, zigzag(cp).split(rows, rank, dim=0))
