"""Permute with probabilities and unpermute, forward and backward, as two Triton kernels.

    spread:   out[r] = scale[slot r] * x[slot r // K]            (permute, unpermute's dY)
    collect:  out[t] = sum over k of weight[t, k] * y[row t, k]  (unpermute, permute's dX),
              optionally with dot[t, k] = <y[row t, k], other[t]> (the weights' gradient)

Both read through an index and write once, without atomics: `slots` and `rows` are inverse to each
other, so each direction has its gather. Sums over K are in fp32 and in the order of k. A slot or
row of -1 (padding, a dropped assignment) reads nothing and gives zeros. Bytes are the floor:
permute reads and writes R x H, unpermute reads R x H and writes T x H.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_ext.kernels.launch import rows_contiguous, tuned

_CONFIGS = [
    triton.Config({"BLOCK_H": block}, num_warps=warps)
    for block, warps in ((1024, 4), (512, 2), (2048, 8))
]


@tuned(_CONFIGS, key=["H", "K"])
@triton.jit
def _spread(
    x,
    weights,
    slots,
    out,
    out_weights,
    H,
    x_stride,
    K: tl.constexpr,
    SCALED: tl.constexpr,
    COPIED: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """One row r a program: SCALED multiplies it by weights[slot], COPIED writes that weight."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row).to(tl.int64)
    kept = slot >= 0
    token = tl.where(kept, slot, 0) // K
    weight = 1.0
    if SCALED or COPIED:
        weight = tl.load(weights + slot, mask=kept, other=0.0)
    if COPIED:
        tl.store(out_weights + row, weight)
    readable = tl.where(kept, H, 0)
    for start in range(0, H, BLOCK_H):
        h = start + tl.arange(0, BLOCK_H)
        value = tl.load(x + token * x_stride + h, mask=h < readable, other=0.0)
        if SCALED:
            value = value.to(tl.float32) * weight.to(tl.float32)
        tl.store(out + row * H + h, value.to(out.dtype.element_ty), mask=h < H)


@tuned(_CONFIGS, key=["H", "K"])
@triton.jit
def _collect(
    y,
    weights,
    rows,
    out,
    H,
    y_stride,
    K: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """One token and one block of H a program: the weighted sum of its K rows."""
    token = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    total = tl.zeros((BLOCK_H,), dtype=tl.float32)
    for k in tl.static_range(K):
        row = tl.load(rows + token * K + k).to(tl.int64)
        readable = tl.where(row >= 0, H, 0)
        value = tl.load(y + row * y_stride + h, mask=h < readable, other=0.0).to(tl.float32)
        if WEIGHTED:
            value *= tl.load(weights + token * K + k).to(tl.float32)
        total += value
    tl.store(out + token * H + h, total.to(out.dtype.element_ty), mask=h < H)


@triton.jit
def _row_dots(
    y, other, rows, out, H, y_stride, other_stride, K: tl.constexpr, BLOCK_H: tl.constexpr
):
    """One slot a program: <y[row], other[token]> in fp32; BLOCK_H is fixed, and so is the order of
    the sum.
    """
    slot = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + slot).to(tl.int64)
    token = slot // K
    readable = tl.where(row >= 0, H, 0)
    total = tl.zeros((BLOCK_H,), dtype=tl.float32)
    for start in range(0, H, BLOCK_H):
        h = start + tl.arange(0, BLOCK_H)
        inside = h < readable
        left = tl.load(y + row * y_stride + h, mask=inside, other=0.0).to(tl.float32)
        right = tl.load(other + token * other_stride + h, mask=inside, other=0.0).to(tl.float32)
        total += left * right
    tl.store(out + slot, tl.sum(total, axis=0).to(out.dtype.element_ty))


def spread(
    x_TH: Tensor,
    slots_R: Tensor,
    topk: int,
    weights_TK: Tensor | None = None,
    copied_TK: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """([R, H] the token of each row, times its weight if given; [R] the copied weights or None)."""
    assert weights_TK is None or copied_TK is None, "one table of weights: scale with it or copy it"
    x_TH = rows_contiguous(x_TH)
    num_rows, hidden = slots_R.shape[0], x_TH.shape[1]
    out_RH = x_TH.new_empty(num_rows, hidden)
    weights = copied_TK if weights_TK is None else weights_TK
    copied_R = None if copied_TK is None else copied_TK.new_empty(num_rows)
    if num_rows:
        _spread[(num_rows,)](
            x_TH,
            None if weights is None else weights.contiguous(),
            slots_R,
            out_RH,
            copied_R,
            hidden,
            x_TH.stride(0),
            topk,
            weights_TK is not None,
            copied_R is not None,
        )
    return out_RH, copied_R


def collect(y_RH: Tensor, rows_TK: Tensor, weights_TK: Tensor | None = None) -> Tensor:
    """[T, H] the sum over k of (weights[t, k] *) y[rows[t, k]]."""
    y_RH = rows_contiguous(y_RH)
    (num_tokens, topk), hidden = rows_TK.shape, y_RH.shape[1]
    out_TH = y_RH.new_empty(num_tokens, hidden)
    if num_tokens:
        _collect[lambda meta: (num_tokens, triton.cdiv(hidden, meta["BLOCK_H"]))](
            y_RH,
            None if weights_TK is None else weights_TK.contiguous(),
            rows_TK,
            out_TH,
            hidden,
            y_RH.stride(0),
            topk,
            weights_TK is not None,
        )
    return out_TH


def row_dots(y_RH: Tensor, other_TH: Tensor, rows_TK: Tensor, dtype: torch.dtype) -> Tensor:
    """[T, K] <y[rows[t, k]], other[t]>."""
    y_RH, other_TH = rows_contiguous(y_RH), rows_contiguous(other_TH)
    out_TK = torch.empty(rows_TK.shape, dtype=dtype, device=y_RH.device)
    if out_TK.numel():
        _row_dots[(out_TK.numel(),)](
            y_RH,
            other_TH,
            rows_TK,
            out_TK,
            y_RH.shape[1],
            y_RH.stride(0),
            other_TH.stride(0),
            rows_TK.shape[1],
            BLOCK_H=1024,
        )
    return out_TK


def by_slot(values_R: Tensor, rows_TK: Tensor) -> Tensor:
    """[T, K] values[rows[t, k]], zero where the assignment has no row."""
    values_TK = values_R.index_select(0, rows_TK.reshape(-1).clamp(min=0)).view(rows_TK.shape)
    return values_TK.masked_fill(rows_TK < 0, 0)


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TH, probs_TK, slots_R, rows_TK):
        ctx.save_for_backward(rows_TK)
        return spread(x_TH, slots_R, rows_TK.shape[1], copied_TK=probs_TK)

    @staticmethod
    def backward(ctx, grad_RH, grad_R):
        (rows_TK,) = ctx.saved_tensors
        return collect(grad_RH, rows_TK), by_slot(grad_R, rows_TK), None, None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y_RH, slots_R, rows_TK, weights_TK):
        kept = (y_RH, weights_TK) if weights_TK is not None else ()
        ctx.save_for_backward(slots_R, rows_TK, *kept)
        return collect(y_RH, rows_TK, weights_TK)

    @staticmethod
    def backward(ctx, grad_TH):
        slots_R, rows_TK, *kept = ctx.saved_tensors
        weights_TK = kept[1] if kept else None
        grad_RH, _ = spread(grad_TH, slots_R, rows_TK.shape[1], weights_TK)
        if not kept or not ctx.needs_input_grad[3]:
            return grad_RH, None, None, None
        return grad_RH, None, None, row_dots(kept[0], grad_TH, rows_TK, kept[1].dtype)


def permute(
    x_TH: Tensor, probs_TK: Tensor, slots_R: Tensor, rows_TK: Tensor
) -> tuple[Tensor, Tensor]:
    """Tokens and routing weights in sorted order: [R, H] and [R]; `reference.permute`."""
    return _Permute.apply(x_TH, probs_TK, slots_R, rows_TK)


def unpermute(
    y_RH: Tensor, slots_R: Tensor, rows_TK: Tensor, weights_TK: Tensor | None = None
) -> Tensor:
    """The (weighted) sum of each token's rows [T, H]; `reference.unpermute`."""
    return _Unpermute.apply(y_RH, slots_R, rows_TK, weights_TK)
