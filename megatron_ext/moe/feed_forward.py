"""SwiGLU experts forward and backward by hand, expert by expert, on a CPU.

    forward    h = x fc1^T, y = (silu(gate) * up) fc2^T           keeps x and h
    backward   d = dy fc2, the activation again from h, dh, dx = dh fc1,
               dfc1 = dh^T x, dfc2 = dy^T activation

The rows of one expert stay in the cache between its products: no tensor of all rows' activations
exists in either pass. Where all blocks have the same number of rows, `bmm` takes them all in one
product (see `costs/cpu_blocks.py`). The activation is rounded where autograd's would be.

Suffixes: P places in blocks by expert, E experts of this rank, H hidden, F expert hidden.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from megatron_ext.native import loops

aten = torch.ops.aten


def spans(rows: Sequence[int]) -> Iterator[tuple[int, slice]]:
    """(expert, its rows) of the experts that have rows."""
    start = 0
    for expert, count in enumerate(rows):
        if count:
            yield expert, slice(start, start + count)
        start += count


def _is_batch(rows: Sequence[int]) -> bool:
    return len(rows) > 1 and rows[0] > 0 and len(set(rows)) == 1


def _activation(hidden: Tensor, out: Tensor) -> Tensor:
    """silu(gate) * up of [..., 2F] into `out` [..., F]."""
    if loops.serves(hidden, out):
        return loops.swiglu(hidden, out)
    gate, up = hidden.chunk(2, dim=-1)
    return aten.silu.out(gate, out=out).mul_(up)


def _activation_backward(grad: Tensor, hidden: Tensor, grad_hidden: Tensor, out: Tensor) -> None:
    """d activation `grad` -> d hidden; the activation comes into `out`; `grad` is overwritten."""
    if loops.serves(grad, hidden, grad_hidden, out):
        return loops.swiglu_backward(grad, hidden, grad_hidden, out)
    gate, up = hidden.chunk(2, dim=-1)
    grad_gate, grad_up = grad_hidden.chunk(2, dim=-1)
    aten.silu.out(gate, out=out)
    torch.mul(grad, out, out=grad_up)
    out.mul_(up)
    aten.silu_backward.grad_input(grad.mul_(up), gate, grad_input=grad_gate)


def _batched(x: Tensor, fc1: Tensor, fc2: Tensor) -> tuple[Tensor, Tensor]:
    """(h [E, C, 2F], y [E, C, H]) for blocks of C rows each."""
    hidden = torch.bmm(x, fc1.transpose(1, 2))
    act = _activation(hidden, x.new_empty(*hidden.shape[:2], fc2.shape[2]))
    return hidden, torch.bmm(act, fc2.transpose(1, 2))


def _looped(x: Tensor, fc1: Tensor, fc2: Tensor, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
    """(h [P, 2F], y [P, H])."""
    hidden, out = x.new_empty(len(x), fc1.shape[1]), x.new_empty(len(x), fc2.shape[1])
    act = x.new_empty(max(rows), fc2.shape[2])
    for expert, span in spans(rows):
        h, a = hidden[span], act[: span.stop - span.start]
        torch.mm(x[span], fc1[expert].t(), out=h)
        torch.mm(_activation(h, a), fc2[expert].t(), out=out[span])
    return hidden, out


def _batched_backward(grad, x, hidden, fc1, fc2) -> tuple[Tensor, Tensor, Tensor]:
    grad_act = torch.bmm(grad, fc2)
    act, grad_hidden = torch.empty_like(grad_act), torch.empty_like(hidden)
    _activation_backward(grad_act, hidden, grad_hidden, act)
    grad_fc2 = torch.bmm(grad.transpose(1, 2), act)
    return torch.bmm(grad_hidden, fc1), torch.bmm(grad_hidden.transpose(1, 2), x), grad_fc2


def _looped_backward(grad, x, hidden, fc1, fc2, rows) -> tuple[Tensor, Tensor, Tensor]:
    grad_x, grad_fc1, grad_fc2 = (torch.empty_like(one) for one in (x, fc1, fc2))
    most, width = max(rows), fc2.shape[2]
    act, grad_act = x.new_empty(most, width), x.new_empty(most, width)
    grad_hidden = x.new_empty(most, 2 * width)
    for expert, count in enumerate(rows):
        if not count:
            grad_fc1[expert].zero_()
            grad_fc2[expert].zero_()
    for expert, span in spans(rows):
        count = span.stop - span.start
        a, d, dh, dy = act[:count], grad_act[:count], grad_hidden[:count], grad[span]
        torch.mm(dy, fc2[expert], out=d)
        _activation_backward(d, hidden[span], dh, a)
        torch.mm(dh, fc1[expert], out=grad_x[span])
        torch.mm(dh.t(), x[span], out=grad_fc1[expert])
        torch.mm(dy.t(), a, out=grad_fc2[expert])
    return grad_x, grad_fc1, grad_fc2


class _SwiGLUExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_PH, fc1, fc2, rows):
        ctx.rows = rows
        if _is_batch(rows):
            hidden, out = _batched(x_PH.view(len(rows), rows[0], -1), fc1, fc2)
            out = out.flatten(0, 1)
        else:
            hidden, out = _looped(x_PH, fc1, fc2, rows)
        ctx.save_for_backward(x_PH, hidden, fc1, fc2)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_PH):
        x, hidden, fc1, fc2 = ctx.saved_tensors
        rows, grad = ctx.rows, grad_PH.contiguous()
        if not _is_batch(rows):
            return *_looped_backward(grad, x, hidden, fc1, fc2, rows), None
        shape = (len(rows), rows[0], -1)
        grads = _batched_backward(grad.view(shape), x.view(shape), hidden, fc1, fc2)
        return grads[0].flatten(0, 1), *grads[1:], None


def swiglu_experts(x_PH: Tensor, fc1_E2FH: Tensor, fc2_EHF: Tensor, rows: list[int]) -> Tensor:
    """Rows in blocks of `rows[e]` through their experts: [P, H] -> [P, H], not weighted."""
    return _SwiGLUExperts.apply(x_PH.contiguous(), fc1_E2FH.flatten(1, 2), fc2_EHF, rows)


def reference_swiglu_experts(
    x_PH: Tensor, fc1_E2FH: Tensor, fc2_EHF: Tensor, rows: list[int]
) -> Tensor:
    """What `swiglu_experts` must equal, gradients included."""
    out = []
    for x, (gate, up), fc2 in zip(torch.split(x_PH, rows), fc1_E2FH, fc2_EHF):
        out.append((functional.silu(x @ gate.t()) * (x @ up.t())) @ fc2.t())
    return torch.cat(out)
