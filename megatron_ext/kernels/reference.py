"""What the kernels compute, in plain torch: loops and masks, nothing fused, differentiable."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def permute(
    x_TH: Tensor, probs_TK: Tensor, slots_R: Tensor, rows_TK: Tensor
) -> tuple[Tensor, Tensor]:
    """(x[slot // K] [R, H], probs[slot] [R]); a row whose slot is -1 is zero."""
    kept = slots_R >= 0
    slots = slots_R.long().clamp(min=0)
    x_RH = x_TH[slots // probs_TK.shape[1]] * kept[:, None].to(x_TH.dtype)
    return x_RH, probs_TK.flatten()[slots] * kept


def unpermute(
    y_RH: Tensor, slots_R: Tensor, rows_TK: Tensor, weights_TK: Tensor | None = None
) -> Tensor:
    """out[t] = sum over k of weights[t, k] * y[rows[t, k]] [T, H], summed in fp32; a row -1 adds
    nothing.
    """
    weights = torch.ones_like(rows_TK, dtype=torch.float32) if weights_TK is None else weights_TK
    weights = weights.float() * (rows_TK >= 0)
    return (y_RH.float()[rows_TK.long().clamp(min=0)] * weights[..., None]).sum(1).to(y_RH.dtype)


def grouped_gemm(
    x_RK: Tensor, weight_ENK: Tensor, ends_E: Tensor, source_R: Tensor | None = None
) -> Tensor:
    """y[r] = weight[expert of r] @ x[r] [R, N]; `source` says which row of x stands at r.
    Rows beyond the last end are zero.
    """
    if source_R is not None:
        x_RK = x_RK[source_R.long()]
    ends = ends_E.tolist()
    pieces = [
        x_RK[start:end] @ weight.t()
        for start, end, weight in zip([0, *ends[:-1]], ends, weight_ENK)
    ]
    rest = x_RK.new_zeros(x_RK.shape[0] - ends[-1], weight_ENK.shape[1])
    return torch.cat([*pieces, rest])


def swiglu(hidden_R2F: Tensor, probs_R: Tensor) -> Tensor:
    """silu(gate) * up * prob [R, F], in fp32, rounded once to the dtype of the hidden state."""
    gate, up = hidden_R2F.float().unbind(1)
    return (F.silu(gate) * up * probs_R.float()[:, None]).to(hidden_R2F.dtype)


def routed_experts(
    x_TH: Tensor, probs_TK: Tensor, fc1_E2FH: Tensor, fc2_EHF: Tensor, experts_TK: Tensor
) -> Tensor:
    """The whole of it, expert by expert, in fp32: [T, H]."""
    out = torch.zeros_like(x_TH, dtype=torch.float32)
    for expert, (fc1, fc2) in enumerate(zip(fc1_E2FH.float(), fc2_EHF.float())):
        prob_T = (probs_TK.float() * (experts_TK == expert)).sum(dim=1, keepdim=True)
        gate, up = (x_TH.float() @ matrix.t() for matrix in fc1)
        out = out + (F.silu(gate) * up * prob_T) @ fc2.t()
    return out
