"""One autograd function that runs any program: `context_attention`.

    local q, k, v -> pieces -> for each step: start moves | compute blocks | wait -> local out

Partial results and gradients are added in fp32; what is sent as a sum is sent in fp32, everything
else in the dtype of the model. Saved for the backward pass on each rank: its own q, k, v (or, where
heads were exchanged, what it received), the merged out and its log-sum-exp; never a score.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_ext.context.backward import Backward
from megatron_ext.context.forward import Forward
from megatron_ext.context.worker import Attention


class _ContextAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, sink_N, job: Attention) -> Tensor:
        work = Forward(job, q, k, v, sink_N)
        work.run(work.plan.forward)
        output = work.output(q.shape[2])
        ctx.job, ctx.shapes = job, (q.shape, k.shape, v.shape)
        pieces = [work.saved[piece] for piece in work.plan.saved]
        finals = [work.final(key) for key in work.plan.finals]
        ctx.lengths = [len(tensors) for tensors in (*pieces, *finals)]
        flat = [x for tensors in (*pieces, *finals) for x in tensors]
        ctx.save_for_backward(sink_N, *flat)
        return output

    @staticmethod
    def backward(ctx, dout: Tensor):
        sink_N, *flat = ctx.saved_tensors
        tensors = iter(flat)
        rows = [tuple(next(tensors) for _ in range(length)) for length in ctx.lengths]
        plan = ctx.job.plan
        saved = dict(zip(plan.saved, rows))
        finals = dict(zip(plan.finals, rows[len(plan.saved) :]))
        work = Backward(ctx.job, ctx.shapes, dout, saved, finals)
        work.run(plan.backward)
        dq, dk, dv = (gradient.to(dout.dtype) for gradient in work.gradients)
        dsink = None
        if sink_N is not None and ctx.needs_input_grad[3]:
            dsink = work.sink_gradient(sink_N)
        return dq, dk, dv, dsink, None


def context_attention(
    query: Tensor, key: Tensor, value: Tensor, job: Attention, sink_N: Tensor | None = None
) -> Tensor:
    """Causal attention of the local queries on the whole sequence.

    query [S, B, N, D], key [S, B, G, D], value [S, B, G, Dv] of this rank's chunks (S of all ranks
    alike) -> [S, B, N * Dv]. `sink_N`: one extra logit per head in the denominator, the same on all
    ranks; its gradient is this rank's share. All cp ranks must call it in the same order, forward
    and backward.
    """
    num_chunks = len(job.plan.own)
    assert query.shape[0] % num_chunks == 0, (
        f"{query.shape[0]} local tokens do not cut into {num_chunks} chunks"
    )
    return _ContextAttention.apply(query, key, value, sink_N, job)
