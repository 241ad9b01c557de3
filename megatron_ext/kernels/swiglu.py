"""silu(gate) * up * probability, forward and backward, one pass over memory each way.

Saved for the backward pass are the gate and up projections and the probabilities only. The backward
kernel writes d(gate, up), the probability's gradient, and, where asked, the output once more: it
has every factor of it in registers, so the product behind it need not keep it (`routed.py`).
In fp32 inside, rounded once. `used` [n] int32: its last value is where the rows end that an expert
has; the ones behind it (dropped assignments) are not read and give zeros.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_ext.kernels.launch import rows_contiguous

BLOCK_F = 1024
"""Columns of a pass over a row; the row's sum (the probability's gradient) depends on it alone."""


@triton.jit
def _forward(hidden, probs, out, used, F, LIMITED: tl.constexpr, BLOCK: tl.constexpr):
    """One row and one block of F a program."""
    row = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    readable = F
    if LIMITED:
        readable = tl.where(row < tl.load(used), F, 0)
    gate = tl.load(hidden + row * 2 * F + f, mask=f < readable, other=0.0).to(tl.float32)
    up = tl.load(hidden + row * 2 * F + F + f, mask=f < readable, other=0.0).to(tl.float32)
    prob = tl.load(probs + row).to(tl.float32)
    value = gate * tl.sigmoid(gate) * up * prob
    tl.store(out + row * F + f, value.to(out.dtype.element_ty), mask=f < F)


@triton.jit
def _backward(
    hidden,
    probs,
    grad,
    grad_hidden,
    grad_probs,
    out,
    used,
    F,
    grad_stride,
    LIMITED: tl.constexpr,
    AGAIN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row a program."""
    row = tl.program_id(0).to(tl.int64)
    prob = tl.load(probs + row).to(tl.float32)
    readable = F
    if LIMITED:
        readable = tl.where(row < tl.load(used), F, 0)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, F, BLOCK):
        f = start + tl.arange(0, BLOCK)
        inside = f < readable
        gate = tl.load(hidden + row * 2 * F + f, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(hidden + row * 2 * F + F + f, mask=inside, other=0.0).to(tl.float32)
        upstream = tl.load(grad + row * grad_stride + f, mask=inside, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        total += upstream * silu * up
        upstream *= prob
        grad_up = upstream * silu
        grad_gate = upstream * up * (sigmoid + silu * (1.0 - sigmoid))
        kind = grad_hidden.dtype.element_ty
        tl.store(grad_hidden + row * 2 * F + f, grad_gate.to(kind), mask=f < F)
        tl.store(grad_hidden + row * 2 * F + F + f, grad_up.to(kind), mask=f < F)
        if AGAIN:
            tl.store(out + row * F + f, (silu * up * prob).to(kind), mask=f < F)
    tl.store(grad_probs + row, tl.sum(total, axis=0).to(grad_probs.dtype.element_ty))


def _block(width: int) -> dict[str, int]:
    """Launch options of a row of `width`."""
    block = min(BLOCK_F, triton.next_power_of_2(width))
    return {"BLOCK": block, "num_warps": max(1, block // 256)}


def _last(used: Tensor | None) -> Tensor | None:
    """A view of the last value, no read."""
    return None if used is None else used[-1:]


def swiglu_forward(hidden_R2F: Tensor, probs_R: Tensor, used: Tensor | None = None) -> Tensor:
    """silu(gate) * up * prob [R, F]; hidden is contiguous, gate first."""
    num_rows, _, width = hidden_R2F.shape
    out_RF = hidden_R2F.new_empty(num_rows, width)
    options = _block(width)
    if num_rows:
        grid = (num_rows, triton.cdiv(width, options["BLOCK"]))
        _forward[grid](
            hidden_R2F, probs_R, out_RF, _last(used), width, LIMITED=used is not None, **options
        )
    return out_RF


def swiglu_backward(
    hidden_R2F: Tensor,
    probs_R: Tensor,
    grad_RF: Tensor,
    *,
    used: Tensor | None = None,
    again: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(gradient of hidden [R, 2, F], of the probabilities [R], the forward's output if `again`)."""
    num_rows, _, width = hidden_R2F.shape
    grad_RF = rows_contiguous(grad_RF)
    grad_hidden, grad_probs = torch.empty_like(hidden_R2F), torch.empty_like(probs_R)
    out_RF = hidden_R2F.new_empty(num_rows, width) if again else None
    if num_rows:
        _backward[(num_rows,)](
            hidden_R2F,
            probs_R,
            grad_RF,
            grad_hidden,
            grad_probs,
            out_RF,
            _last(used),
            width,
            grad_RF.stride(0),
            LIMITED=used is not None,
            AGAIN=again,
            **_block(width),
        )
    return grad_hidden, grad_probs, out_RF


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_R2F, probs_R):
        hidden_R2F, probs_R = hidden_R2F.contiguous(), probs_R.contiguous()
        ctx.save_for_backward(hidden_R2F, probs_R)
        return swiglu_forward(hidden_R2F, probs_R)

    @staticmethod
    def backward(ctx, grad_RF):
        return swiglu_backward(*ctx.saved_tensors, grad_RF)[:2]


def swiglu(hidden_R2F: Tensor, probs_R: Tensor) -> Tensor:
    """silu(gate) * up * prob [R, F]; `reference.swiglu`."""
    return _SwiGLU.apply(hidden_R2F, probs_R)
