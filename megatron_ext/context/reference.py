"""Attention on the whole sequence by the textbook, in fp32: what every strategy must equal.

S sequence, B micro-batch, N query heads, G key/value heads, D head, Dv value head.
"""

from __future__ import annotations

import torch
from torch import Tensor


def visible(
    seq_length: int, window: int | None = None, document_ids_BS: Tensor | None = None
) -> Tensor:
    """bool [1 or B, 1, S, S]: may query i look at key j? Causal, at most `window` tokens back, in
    its own document."""
    row, col = torch.arange(seq_length)[:, None], torch.arange(seq_length)[None, :]
    allowed = col <= row
    if window is not None:
        allowed = allowed & (col >= row - window)
    allowed = allowed[None, None]
    if document_ids_BS is not None:
        same = document_ids_BS[:, :, None] == document_ids_BS[:, None, :]
        allowed = allowed & same[:, None]
    return allowed


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    window: int | None = None,
    document_ids_BS: Tensor | None = None,
    sink_N: Tensor | None = None,
) -> Tensor:
    """query [S, B, N, D], key [S, B, G, D], value [S, B, G, Dv] -> [S, B, N * Dv] in query's dtype.

    `sink_N`: one more logit per head in the denominator of the softmax, with a value of zero.
    """
    repeats = query.shape[2] // key.shape[2]
    k, v = (x.float().repeat_interleave(repeats, dim=2) for x in (key, value))
    scores = torch.einsum("sbnd,tbnd->bnst", query.float(), k) * scale
    allowed = visible(query.shape[0], window, document_ids_BS)
    scores = scores.masked_fill(~allowed, float("-inf"))
    if sink_N is not None:
        column = sink_N.float().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        probs = torch.softmax(torch.cat((scores, column), dim=-1), dim=-1)[..., :-1]
    else:
        probs = torch.softmax(scores, dim=-1)
    return torch.einsum("bnst,tbnd->sbnd", probs, v).flatten(2).to(query.dtype)
