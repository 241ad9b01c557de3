"""Rows of tokens to the places of their experts and back, each direction one gather.

    spread    rows[p] = x[source of p]                       gradient: dx[a's source] = sum of rows
    collect   y[t] = sum over t's assignments a of weight[a] * rows[place of a]
              gradient: d rows[p] = weight * dy[t of p],  d weight[a] = <rows[place of a], dy[t]>

No scatter in either direction and no [T, E] map: sums run over the rows that a token reads
(`embedding_bag`, in fp32 inside). Padded places get a zero gradient.

Suffixes: T tokens, A assignments sorted by token, P places, H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ext.moe.places import Places
from megatron_ext.native import loops


@dataclass(frozen=True)
class TokenRows:
    """Which rows a token has: `places`, the token of each assignment and of each place, and the
    first assignment of each token.
    """

    places: Places
    tokens_A: Tensor
    tokens_P: Tensor
    starts_T: Tensor


def token_rows(places: Places, tokens_A: Tensor, starts_T: Tensor) -> TokenRows:
    """Assignments are sorted by token; those of token t begin at starts[t]."""
    return TokenRows(places, tokens_A, tokens_A.index_select(0, places.sources_P), starts_T)


def _sums(rows_PH: Tensor, rows: TokenRows, weights_A: Tensor | None) -> Tensor:
    """[T, H]: the weighted sum of each token's rows."""
    if loops.serves(rows_PH):
        return loops.collect(rows_PH, rows.places.places_A, rows.starts_T, weights_A)
    if weights_A is not None:
        weights_A = weights_A.to(rows_PH.dtype)
    return torch._embedding_bag_forward_only(
        rows_PH.contiguous(), rows.places.places_A, rows.starts_T, False, 0, False, weights_A
    )[0]


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TH, rows):
        ctx.rows = rows
        return x_TH.index_select(0, rows.tokens_P)

    @staticmethod
    def backward(ctx, grad_PH):
        return _sums(grad_PH, ctx.rows, None), None


class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows_PH, weights_A, rows):
        ctx.rows = rows
        ctx.save_for_backward(rows_PH, weights_A)
        return _sums(rows_PH, rows, weights_A)

    @staticmethod
    def backward(ctx, grad_TH):
        rows_PH, weights_A = ctx.saved_tensors
        rows, places = ctx.rows, ctx.rows.places
        if loops.serves(grad_TH, rows_PH):
            grad_PH = rows_PH.new_empty(rows_PH.shape).index_fill_(0, places.padding, 0)
            given = (grad_TH, rows_PH, places.places_A, rows.starts_T, weights_A)
            dots_A = loops.collect_backward(*given, grad_PH)
            return grad_PH, dots_A.to(weights_A.dtype), None
        grad_PH = grad_TH.index_select(0, rows.tokens_P)
        dots_P = torch.linalg.vecdot(grad_PH, rows_PH)
        weights_P = weights_A.new_zeros(len(rows_PH)).scatter_(0, places.places_A, weights_A)
        grad_PH.mul_(weights_P.to(grad_PH.dtype).unsqueeze(1))
        return grad_PH, dots_P.index_select(0, places.places_A).to(weights_A.dtype), None


class _Sort(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_AH, places):
        ctx.places = places
        return x_AH.index_select(0, places.sources_P)

    @staticmethod
    def backward(ctx, grad_PH):
        return grad_PH.index_select(0, ctx.places.places_A), None


class _Unsort(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows_PH, places):
        ctx.places = places
        return rows_PH.index_select(0, places.places_A)

    @staticmethod
    def backward(ctx, grad_AH):
        grad_PH = grad_AH.index_select(0, ctx.places.sources_P)
        return grad_PH.index_fill_(0, ctx.places.padding, 0), None


def spread(x_TH: Tensor, rows: TokenRows) -> Tensor:
    """[T, H] tokens -> [P, H] rows by expert."""
    return _Spread.apply(x_TH, rows)


def collect(rows_PH: Tensor, weights_A: Tensor, rows: TokenRows) -> Tensor:
    """[P, H] rows by expert and the weight of every assignment -> [T, H] tokens."""
    return _Collect.apply(rows_PH, weights_A, rows)


def sort_rows(x_AH: Tensor, places: Places) -> Tensor:
    """[A, H] rows in any order -> [P, H] rows by expert."""
    return _Sort.apply(x_AH, places)


def unsort_rows(rows_PH: Tensor, places: Places) -> Tensor:
    """[P, H] rows by expert -> [A, H] in the order of `sort_rows`' input."""
    return _Unsort.apply(rows_PH, places)


def reference_spread(x_TH: Tensor, rows: TokenRows) -> Tensor:
    """What `spread` must equal in the places that are used, gradients included."""
    return x_TH[rows.tokens_P]


def reference_collect(rows_PH: Tensor, weights_A: Tensor, rows: TokenRows) -> Tensor:
    """What `collect` must equal, gradients included."""
    weighted_AH = rows_PH[rows.places.places_A] * weights_A.unsqueeze(1)
    zeros_TH = weighted_AH.new_zeros(len(rows.starts_T), rows_PH.shape[1])
    return zeros_TH.index_add(0, rows.tokens_A, weighted_AH)
