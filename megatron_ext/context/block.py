"""Attention of a block of queries on a block of keys, and how partial results become one.

Every strategy cuts causal attention into blocks. A block gives (out, lse): the attention over its
keys alone and the log of its softmax denominator. Two results for the same queries merge exactly:

    lse = log(e^lse_a + e^lse_b)      out = out_a e^(lse_a - lse) + out_b e^(lse_b - lse)

and the backward pass of one block is exact when it is given the GLOBAL (out, lse):
P = e^(S - lse), dS = P (dP - rowsum(dout out)). Dao 2023, FlashAttention-2, arXiv:2307.08691, 3.1.

A row that sees no key of a block has lse = -inf and out = 0, and weighs nothing in a merge.
Shapes: B micro-batch, N query heads, G key/value heads (N a multiple of G), s queries, t keys,
D head, Dv value head; lse is fp32 [B, N, s].
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

_CPU = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_CPU_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
_CUDA = torch.ops.aten._scaled_dot_product_flash_attention
_CUDA_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_backward
CUDA_MAX_HEAD = 256
CUDA_HEAD_MULTIPLE = 8


def merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """One (out, lse) in fp32 from two over disjoint keys."""
    lse = torch.logaddexp(lse_a, lse_b)
    finite = torch.where(lse == float("-inf"), torch.zeros_like(lse), lse)
    weight_a, weight_b = torch.exp(lse_a - finite), torch.exp(lse_b - finite)
    return out_a.float() * weight_a[..., None] + out_b.float() * weight_b[..., None], lse


def forward(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool, allowed: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """q [B, N, s, D], k [B, G, t, D], v [B, G, t, Dv] -> out [B, N, s, Dv], lse [B, N, s].

    `causal`: s == t and query i sees keys up to i. `allowed`, bool [1 or B, 1, s, t], replaces it
    where documents or a window cut into the block. `out` is in q's dtype from a kernel, fp32 from
    the plain path.
    """
    if allowed is not None or not _has_kernel(q, v):
        return _plain_forward(q, k, v, scale, _seen(q, k, causal, allowed))
    width = v.shape[-1]
    q, k, v = _same_width(q, k, v)
    if q.device.type == "cpu":
        out, lse = _CPU(q, k, v, 0.0, causal, scale=scale)
    else:
        out, lse = _CUDA(q, k, v, 0.0, causal, False, scale=scale)[:2]
    return out[..., :width], lse


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    scale: float,
    causal: bool,
    allowed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) of one block, given out and lse over ALL keys of these queries."""
    if allowed is not None or not _has_kernel(q, v):
        return _plain_backward(dout, q, k, v, out, lse, scale, _seen(q, k, causal, allowed))
    widths = q.shape[-1], v.shape[-1]
    q, k, v, out, dout = _same_width(q, k, v, out, dout)
    if q.device.type == "cpu":
        dq, dk, dv = _CPU_BACKWARD(dout, q, k, v, out, lse, 0.0, causal, scale=scale)
    else:
        unused = torch.zeros((), dtype=torch.int64, device=q.device)
        lengths = (None, None, q.shape[2], k.shape[2])
        dq, dk, dv = _CUDA_BACKWARD(
            dout, q, k, v, out, lse.contiguous(), *lengths, 0.0, causal, unused, unused, scale=scale
        )
    return dq[..., : widths[0]], dk[..., : widths[0]], dv[..., : widths[1]]


def _has_kernel(q: Tensor, v: Tensor) -> bool:
    """Is there a fused kernel for this device, dtype and head?"""
    if q.device.type == "cpu":
        return q.dtype in (torch.float32, torch.float64, torch.bfloat16)
    half = q.dtype in (torch.float16, torch.bfloat16)
    return q.device.type == "cuda" and half and max(q.shape[-1], v.shape[-1]) <= CUDA_MAX_HEAD


def _same_width(*tensors: Tensor) -> tuple[Tensor, ...]:
    """All heads zero-padded to the widest (and on CUDA to a multiple of 8): a zero column adds
    nothing to a score, and a zero value column is cut off again."""
    width = max(x.shape[-1] for x in tensors)
    if tensors[0].device.type == "cuda":
        width = -(-width // CUDA_HEAD_MULTIPLE) * CUDA_HEAD_MULTIPLE
    return tuple(x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1])) for x in tensors)


def _seen(q: Tensor, k: Tensor, causal: bool, allowed: Tensor | None) -> Tensor | None:
    if allowed is not None or not causal:
        return allowed
    shape = (q.shape[2], k.shape[2])
    return torch.ones(shape, dtype=torch.bool, device=q.device).tril()[None, None]


def _scores(q: Tensor, k: Tensor, scale: float, seen: Tensor | None) -> tuple[Tensor, Tensor]:
    """fp32 (scores [B, G, N/G, s, t], queries [B, G, N/G, s, D]); -inf where a key is not seen."""
    grouped = q.float().unflatten(1, (k.shape[1], -1))
    scores = torch.matmul(grouped, k.float().unsqueeze(2).transpose(-1, -2)) * scale
    if seen is not None:
        scores = scores.masked_fill(~seen.unsqueeze(2), float("-inf"))
    return scores, grouped


def _plain_forward(q, k, v, scale: float, seen: Tensor | None) -> tuple[Tensor, Tensor]:
    scores, _ = _scores(q, k, scale, seen)
    lse = torch.logsumexp(scores, dim=-1)
    probs = torch.exp(scores - _finite(lse)[..., None])
    out = torch.matmul(probs, v.float().unsqueeze(2))
    return out.flatten(1, 2), lse.flatten(1, 2)


def _plain_backward(dout, q, k, v, out, lse, scale: float, seen: Tensor | None):
    groups = (k.shape[1], -1)
    scores, grouped = _scores(q, k, scale, seen)
    probs = torch.exp(scores - _finite(lse).unflatten(1, groups)[..., None])
    delta = (dout.float() * out.float()).sum(dim=-1, keepdim=True).unflatten(1, groups)
    dout = dout.float().unflatten(1, groups)
    dprobs = torch.matmul(dout, v.float().unsqueeze(2).transpose(-1, -2))
    dscores = probs * (dprobs - delta) * scale
    dq = torch.matmul(dscores, k.float().unsqueeze(2)).flatten(1, 2)
    dk = torch.matmul(dscores.transpose(-1, -2), grouped).sum(dim=2)
    dv = torch.matmul(probs.transpose(-1, -2), dout).sum(dim=2)
    return dq, dk, dv


def _finite(lse: Tensor) -> Tensor:
    """lse with 0 for rows that see nothing, so that e^(-inf - lse) is 0 there and not nan."""
    return torch.where(lse == float("-inf"), torch.zeros_like(lse), lse)
