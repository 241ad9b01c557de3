"""Permute, fc1, SwiGLU, fc2 and unpermute of one rank as one differentiable function.

    x [T, H] -gather-> fc1 -> (gate, up) [R, 2F] -swiglu x prob-> fc2 -> y [R, H] -sum-> [T, H]

Saved: x, (gate, up), the probabilities and the order; neither the permuted tokens [R, H], the
activations [R, F] nor y are. The backward pass reads x through the order again, gets the
activations out of the SwiGLU kernel, and the probabilities' gradient as <d activation, silu * up>,
which needs no y: the weight stands before fc2, as megatron-core applies it. With the products of
`TRITON` the gathered rows are not written at all. The idea of saving little this way: SonicMoE (Guo
et al. 2025, arXiv:2512.14080).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_ext.kernels.grouped_gemm import rows_times_weights, weight_gradient
from megatron_ext.kernels.order import Order
from megatron_ext.kernels.rows import by_slot, collect, spread
from megatron_ext.kernels.swiglu import swiglu_backward, swiglu_forward


@dataclass(frozen=True)
class Products:
    """The grouped products with rows that may be gathered.

    rows(a, b_EKN, ends, source)  a[source r] @ b[expert of r] [R, N]
    weights(grad, x, ends, grad_source_R=, x_source_R=)  [E, N, K]
    """

    rows: Callable[..., Tensor]
    weights: Callable[..., Tensor]


def _gathered(matrix: Tensor, source_R: Tensor | None) -> Tensor:
    return matrix if source_R is None else spread(matrix, source_R, 1)[0]


def _torch_rows(a: Tensor, b_EKN: Tensor, ends_E: Tensor, source_R: Tensor | None = None) -> Tensor:
    return F.grouped_mm(_gathered(a, source_R), b_EKN, offs=ends_E)


def _torch_weights(
    grad: Tensor,
    x: Tensor,
    ends_E: Tensor,
    *,
    grad_source_R: Tensor | None = None,
    x_source_R: Tensor | None = None,
) -> Tensor:
    left, right = _gathered(grad, grad_source_R), _gathered(x, x_source_R)
    return F.grouped_mm(left.t(), right, offs=ends_E)


TRITON = Products(rows_times_weights, weight_gradient)
GROUPED_MM = Products(_torch_rows, _torch_weights)
"""torch's products between our kernels; tests and measurements use it."""


class _Experts(torch.autograd.Function):
    """With an order: tokens to tokens; without: sorted rows to sorted rows, not weighted."""

    @staticmethod
    def forward(ctx, x, probs_TK, fc1_E2FH, fc2_EHF, ends_E, order, products, show):
        tokens_R, rows_TK = None, None
        if order is None:
            probs_R = torch.ones(x.shape[0], dtype=torch.float32, device=x.device)
        else:
            rows_TK, tokens_R = order.rows_TK, order.slots_R // probs_TK.shape[1]
            probs_R = probs_TK.reshape(-1).index_select(0, order.slots_R)
        hidden = products.rows(x, fc1_E2FH.flatten(1, 2).transpose(1, 2), ends_E, tokens_R)
        hidden_R2F = hidden.unflatten(1, fc1_E2FH.shape[1:3])
        act_RF = swiglu_forward(hidden_R2F, probs_R, ends_E)
        y_RH = products.rows(act_RF, fc2_EHF.transpose(1, 2), ends_E)
        if show is not None:
            show(y_RH)
        ctx.products, ctx.ends_E, ctx.rows_TK = products, ends_E, rows_TK
        ctx.save_for_backward(x, probs_R, hidden_R2F, fc1_E2FH, fc2_EHF, tokens_R)
        return y_RH if order is None else collect(y_RH, rows_TK)

    @staticmethod
    def backward(ctx, grad):
        x, probs_R, hidden_R2F, fc1_E2FH, fc2_EHF, tokens_R = ctx.saved_tensors
        rows, weights, ends_E = ctx.products.rows, ctx.products.weights, ctx.ends_E
        grad = grad.contiguous()
        grad_act = rows(grad, fc2_EHF, ends_E, tokens_R)
        grad_hidden, grad_probs, act_RF = swiglu_backward(
            hidden_R2F, probs_R, grad_act, used=ends_E, again=True
        )
        grad_fc2 = weights(grad, act_RF, ends_E, grad_source_R=tokens_R)
        grad_hidden = grad_hidden.flatten(1, 2)
        grad_fc1 = weights(grad_hidden, x, ends_E, x_source_R=tokens_R).view(fc1_E2FH.shape)
        grad_x = rows(grad_hidden, fc1_E2FH.flatten(1, 2), ends_E)
        if ctx.rows_TK is None:
            return grad_x, None, grad_fc1, grad_fc2, None, None, None, None
        grad_probs, grad_x = by_slot(grad_probs, ctx.rows_TK), collect(grad_x, ctx.rows_TK)
        return grad_x, grad_probs, grad_fc1, grad_fc2, None, None, None, None


def routed_experts(
    x_TH: Tensor,
    probs_TK: Tensor,
    fc1_E2FH: Tensor,
    fc2_EHF: Tensor,
    order: Order,
    products: Products,
    show: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """[T, H]: sum over k of prob[t, k] * fc2(swiglu(fc1 x[t])) of expert k. Equals
    `reference.routed_experts`. `show` gets the rows [R, H] by expert before their sum; those behind
    the last expert's are not written.
    """
    return _Experts.apply(x_TH, probs_TK, fc1_E2FH, fc2_EHF, order.ends_E, order, products, show)


def sorted_experts(
    x_RH: Tensor, fc1_E2FH: Tensor, fc2_EHF: Tensor, ends_E: Tensor, products: Products
) -> Tensor:
    """[R, H]: fc2(swiglu(fc1 x[r])) of each row's expert, not weighted, for rows sorted by expert:
    what a rank does with rows that came from others.
    """
    return _Experts.apply(x_RH, None, fc1_E2FH, fc2_EHF, ends_E, None, products, None)
