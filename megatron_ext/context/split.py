"""Which rank holds which part of a sequence: the layouts, their split and its inverse.

A sequence of S tokens is cut into equal chunks; an owner table says which rank of the
context-parallel group holds each. The same table slices the batch (tokens, labels, loss mask,
position ids), tells attention which positions a chunk has, and agrees with the rows that
megatron-core's RoPE gives a rank.

    zigzag(4):      chunk 0 1 2 3 4 5 6 7   ->  rank 0 holds chunks 0 and 7, rank 3 chunks 3 and 4:
                    owner 0 1 2 3 3 2 1 0       under a causal mask every rank has the same work
    contiguous(4):  chunk 0 1 2 3 -> owner 0 1 2 3, for strategies that need an unbroken prefix
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """`owners[c]` is the rank that holds chunk c; a rank stores its chunks in ascending order."""

    owners: tuple[int, ...]

    @property
    def num_ranks(self) -> int:
        """Ranks of the context-parallel group."""
        return max(self.owners) + 1

    @property
    def num_chunks(self) -> int:
        """Equal pieces of one sequence."""
        return len(self.owners)

    def chunks(self, rank: int) -> tuple[int, ...]:
        """The chunks of `rank` in the order in which it stores them."""
        return tuple(chunk for chunk, owner in enumerate(self.owners) if owner == rank)

    def split(self, x: Tensor, rank: int, dim: int = 1) -> Tensor:
        """The part of the whole sequence `x` that `rank` holds; `x` itself on one rank."""
        if self.num_ranks == 1:
            return x
        assert x.shape[dim] % self.num_chunks == 0, (
            f"a sequence of {x.shape[dim]} does not cut into {self.num_chunks} equal chunks"
        )
        pieces = x.chunk(self.num_chunks, dim=dim)
        return torch.cat([pieces[chunk] for chunk in self.chunks(rank)], dim=dim)

    def join(self, parts: Sequence[Tensor], dim: int = 1) -> Tensor:
        """The whole sequence from the parts of all ranks, in rank order: the inverse of `split`."""
        assert len(parts) == self.num_ranks, f"{len(parts)} parts for {self.num_ranks} ranks"
        pieces: list[Tensor | None] = [None] * self.num_chunks
        for rank, part in enumerate(parts):
            mine = self.chunks(rank)
            for chunk, piece in zip(mine, part.chunk(len(mine), dim=dim)):
                pieces[chunk] = piece
        return torch.cat(pieces, dim=dim)

    def positions(self, rank: int, seq_length: int) -> Tensor:
        """int64 [S / ranks]: the positions in the sequence of the tokens of `rank`."""
        return self.split(torch.arange(seq_length), rank, dim=0)


def zigzag(cp: int) -> Layout:
    """2*cp chunks; rank r holds chunk r and its mirror 2*cp-1-r (megatron-core's layout)."""
    if cp == 1:
        return Layout((0,))
    return Layout((*range(cp), *reversed(range(cp))))


def contiguous(cp: int) -> Layout:
    """cp chunks; rank r holds chunk r."""
    return Layout(tuple(range(cp)))
