"""Autograd of causal attention in blocks, on separate q, k, v or on the whole qkv projection.

    mixed [S, B, G * (r + 2) * D] -> rotate q and k into [M, S, r, D] and [M, S, D], copy v
                                  -> model/causal.py -> [S, B, N * D]

The gradient of the projection is written in its own layout: no slice, concatenation or transposed
copy of it is made. Shapes: S positions, B micro-batch, G key/value heads and N = G * r query heads
of this tp rank, D head, Dv value head, M = B * G.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from megatron_ext.costs.cpu_blocks import KEPT_LENGTH
from megatron_ext.model.causal import attend, attend_backward
from megatron_ext.model.rotary import Rotation, rotate


@dataclass(frozen=True)
class Form:
    """What an attention call is beside its tensors: `groups` is G, `scale` that of the scores.

    With `turns`, queries and keys are rotated by the first and the second, and the first carries
    the scale. `keep`: the probabilities are kept for the backward pass.
    """

    groups: int
    scale: float
    turns: tuple[Rotation, Rotation] | None = None
    keep: bool = False


def keeps_probabilities(s: int) -> bool:
    """Whether a forward pass over `s` positions may keep what its backward pass reads: S * S
    numbers a head, little beside the rest of a layer while S is short.
    """
    return torch.is_grad_enabled() and s <= KEPT_LENGTH


def by_heads(x: Tensor, m: int) -> Tensor:
    """x [S, B, h, D] -> view (a copy where its strides forbid) [M, S, B * h / M, D]."""
    return x.reshape(x.shape[0], m, -1, x.shape[-1]).transpose(0, 1)


def _rows(x: Tensor) -> Tensor:
    """[M, S, r, D] contiguous -> [M, S * r, D]."""
    return x.flatten(1, 2)


def _forward(ctx, form: Form, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q [M, S, r, D], k [M, S, 1, D], v [M, S, 1, Dv] in any strides -> [S, M, r, Dv]."""
    m, s, r, _ = q.shape
    fresh = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v)]
    if form.turns is None:
        torch.mul(q, form.scale, out=fresh[0])
        fresh[1].copy_(k)
    else:
        rotate(q, form.turns[0], fresh[0])
        rotate(k, form.turns[1], fresh[1])
    fresh[2].copy_(v)
    rows = [_rows(x) for x in fresh]
    out = torch.empty(s, m, r, v.shape[-1], dtype=v.dtype, device=v.device)
    kept = attend(*rows, out.transpose(0, 1), keep=form.keep)
    ctx.form = form
    ctx.save_for_backward(*rows, *kept)
    return out


def _backward(ctx, grad: Tensor, dq: Tensor, dk: Tensor, dv: Tensor) -> None:
    """grad [S, B, N * Dv]; fills dq [M, S, r, D], dk [M, S, 1, D] and dv [M, S, 1, Dv]."""
    form: Form = ctx.form
    q, k, v, *kept = ctx.saved_tensors
    m, s = k.shape[:2]
    grad_rows = _rows(grad.reshape(s, m, -1, v.shape[-1]).transpose(0, 1).contiguous())
    grads = attend_backward(grad_rows, q, k, v, kept)
    rows_q, rows_k, rows_v = (x.view(y.shape) for x, y in zip(grads, (dq, dk, dv)))
    if form.turns is None:
        torch.mul(rows_q, form.scale, out=dq)
        dk.copy_(rows_k)
    else:
        rotate(rows_q, form.turns[0], dq, back=True)
        rotate(rows_k, form.turns[1], dk, back=True)
    dv.copy_(rows_v)


class BlockwiseAttention(Function):
    """q [S, B, N, D], k [S, B, G, D], v [S, B, G, Dv] -> [S, B, N * Dv]."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, form: Form) -> Tensor:
        m = k.shape[1] * form.groups
        ctx.shapes = q.shape, k.shape, v.shape
        out = _forward(ctx, form, *(by_heads(x, m) for x in (q, k, v)))
        return out.view(*q.shape[:2], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        m = ctx.shapes[1][1] * ctx.form.groups
        found = [torch.empty(shape, dtype=grad.dtype, device=grad.device) for shape in ctx.shapes]
        _backward(ctx, grad, *(by_heads(x, m) for x in found))
        return *found, None


class ProjectedAttention(Function):
    """mixed [S, B, G * (r + 2) * D], per key head its r query heads, key and value -> [S, B, N * D]

    The same as BlockwiseAttention on the parts of the projection.
    """

    @staticmethod
    def forward(ctx, mixed: Tensor, head_width: int, form: Form) -> Tensor:
        parts = _parts(mixed, head_width, form.groups)
        out = _forward(ctx, form, *parts)
        ctx.head_width = head_width
        return out.view(*mixed.shape[:2], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        groups, width = ctx.form.groups, ctx.head_width
        per_group = grad.shape[-1] // width // groups + 2
        found = grad.new_empty(*grad.shape[:2], groups * per_group * width)
        _backward(ctx, grad, *_parts(found, width, groups))
        return found, None, None


def _parts(mixed: Tensor, head_width: int, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """Views of q [M, S, r, D], k and v [M, S, 1, D]."""
    s, b, _ = mixed.shape
    heads = mixed.view(s, b * groups, -1, head_width).transpose(0, 1)
    return heads[:, :, :-2], heads[:, :, -2:-1], heads[:, :, -1:]
