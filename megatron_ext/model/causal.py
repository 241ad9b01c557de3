"""Causal attention on a CPU as batched matrix products over blocks of queries.

torch's flash kernel for the CPU multiplies small tiles in loops of its own; here every product is
one `bmm` over many heads, and a block of queries meets only the keys up to its end, so that most of
the upper triangle is never computed:

    for each block of query positions [i, j):   p = softmax(q[i:j] k[:j]^T),   out[i:j] = p v[:j]

Grouped queries need no copies of keys: the r query heads that share a key head are r rows of one
product, ordered by position, so that a block of positions is a block of rows.

Shapes: M = micro-batch x key/value heads of this rank, S positions, r query heads per key head,
D head, Dv value head. `q` comes scaled. Naive reference: `F.scaled_dot_product_attention`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ext.costs.cpu_blocks import TILE_NUMBERS, block_length
from megatron_ext.native import loops

ROUNDED_SUMS = 8
"""Up to this many blocks the gradients of keys and values are summed in their own dtype."""


@dataclass(frozen=True)
class Tile:
    """Heads `first`:`last` of M and query positions `start`:`end`; the keys are 0:`end`."""

    first: int
    last: int
    start: int
    end: int

    def rows(self, r: int) -> slice:
        """The rows of its queries."""
        return slice(self.start * r, self.end * r)

    @property
    def heads(self) -> slice:
        return slice(self.first, self.last)


def tiles(m: int, s: int, r: int) -> Iterator[Tile]:
    """Group of heads by group of heads, the last queries first: they see every key, so that their
    products fill the gradients to which the others add.
    """
    block = block_length(s, r)
    together = max(1, min(m, TILE_NUMBERS // (block * r * s)))
    for first in range(0, m, together):
        for start in reversed(range(0, s, block)):
            yield Tile(first, min(m, first + together), start, min(s, start + block))


def upper_triangle(length: int, r: int, like: Tensor) -> Tensor:
    """[length * r, length]: -inf where a key comes after the query, else 0."""
    triangle = like.new_full((length, length), float("-inf")).triu_(1)
    return triangle if r == 1 else triangle.repeat_interleave(r, dim=0)


def _mask(q: Tensor, s: int, r: int) -> Tensor | None:
    """What the scores of a tile need before torch's softmax; None where the softmax is causal."""
    return None if loops.serves(q) else upper_triangle(block_length(s, r), r, q)


def _probabilities(q: Tensor, k: Tensor, tile: Tile, r: int, triangle: Tensor | None) -> Tensor:
    """[heads of the tile, rows of its queries, its keys]; `triangle` as `_mask` gives it."""
    p = torch.bmm(q[tile.heads, tile.rows(r)], k[tile.heads, : tile.end].transpose(1, 2))
    if triangle is None:
        return loops.causal_softmax(p, tile.start, r)
    length = tile.end - tile.start
    p[:, :, tile.start :].add_(triangle[: length * r, :length])
    return torch.softmax(p, dim=-1, out=p)


def attend(q: Tensor, k: Tensor, v: Tensor, out: Tensor, *, keep: bool) -> list[Tensor]:
    """q [M, S * r, D], k [M, S, D], v [M, S, Dv]; fills out [M, S, r, Dv], which may have any
    strides. Returns the probabilities of every tile where `keep`, else an empty list.
    """
    (m, s, _), r = k.shape, q.shape[1] // k.shape[1]
    triangle = _mask(q, s, r)
    kept = []
    for tile in tiles(m, s, r):
        p = _probabilities(q, k, tile, r, triangle)
        product = torch.bmm(p, v[tile.heads, : tile.end])
        out[tile.heads, tile.start : tile.end] = product.unflatten(1, (-1, r))
        if keep:
            kept.append(p)
    return kept


def attend_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, kept: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """grad [M, S * r, Dv] -> gradients of q, k and v. Without `kept` the probabilities are computed
    again.
    """
    (m, s, _), r = k.shape, q.shape[1] // k.shape[1]
    triangle = None if kept else _mask(q, s, r)
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    in_fp32 = -(-s // block_length(s, r)) > ROUNDED_SUMS and q.dtype != torch.float32
    sums = _Sums(dk, dv, in_fp32)
    for index, tile in enumerate(tiles(m, s, r)):
        heads, rows = tile.heads, tile.rows(r)
        p = kept[index] if kept else _probabilities(q, k, tile, r, triangle)
        g = grad[heads, rows]
        dp = torch.bmm(g, v[heads, : tile.end].transpose(1, 2))
        torch.ops.aten._softmax_backward_data.out(dp, p, -1, p.dtype, grad_input=dp)
        dq[heads, rows] = torch.bmm(dp, k[heads, : tile.end])
        sums.add(tile, dp.transpose(1, 2), q[heads, rows], p.transpose(1, 2), g)
    return dq, dk, dv


class _Sums:
    """dk += dp^T q and dv += p^T g over the blocks of queries, in place or by way of fp32."""

    def __init__(self, dk: Tensor, dv: Tensor, in_fp32: bool) -> None:
        self.targets = (dk, dv)
        self.in_fp32 = in_fp32
        self.totals: tuple[Tensor, ...] = ()

    def add(self, tile: Tile, dp_t: Tensor, q: Tensor, p_t: Tensor, g: Tensor) -> None:
        is_first = tile.end == self.targets[0].shape[1]
        heads = tile.heads
        if is_first:
            self.totals = tuple(
                target[heads].float() if self.in_fp32 else target[heads] for target in self.targets
            )
        for total, left, right in zip(self.totals, (dp_t, p_t), (q, g)):
            if is_first:
                total.copy_(torch.bmm(left, right))
            elif self.in_fp32:
                total[:, : tile.end].add_(torch.bmm(left, right))
            else:
                total[:, : tile.end].baddbmm_(left, right)
        if self.in_fp32 and tile.start == 0:
            for target, total in zip(self.targets, self.totals):
                target[heads] = total
