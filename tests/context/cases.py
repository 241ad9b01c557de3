"""Attention problems, and a strategy's answer next to the reference's: outputs, all gradients."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ext.context import Attention, Layout, context_attention, reference
from megatron_ext.context.program import Program

SCALE = 0.37


@dataclass(frozen=True)
class Case:
    """Sizes and mask of one problem."""

    seq: int = 16
    batch: int = 2
    heads: int = 4
    groups: int = 2
    width: int = 8
    value_width: int | None = None
    window: int | None = None
    documents: bool = False
    sink: bool = False
    dtype: torch.dtype = torch.float32
    seed: int = 1

    def tensors(self) -> tuple[list[Tensor], Tensor | None, Tensor | None, Tensor]:
        """([q, k, v] whole, document ids, sink, weights of the loss)."""
        rng = torch.Generator().manual_seed(self.seed)
        value_width = self.value_width or self.width
        shapes = (
            (self.heads, self.width),
            (self.groups, self.width),
            (self.groups, value_width),
        )
        qkv = [
            torch.randn(self.seq, self.batch, *shape, generator=rng).to(self.dtype)
            for shape in shapes
        ]
        ids = None
        if self.documents:
            ends = torch.rand(self.batch, self.seq, generator=rng) < 0.3
            ids = ends.long().cumsum(dim=1)
        sink = torch.randn(self.heads, generator=rng) if self.sink else None
        weights = torch.randn(self.seq, self.batch, self.heads * value_width, generator=rng)
        return qkv, ids, sink, weights.to(self.dtype)

    def reference(self) -> list[Tensor]:
        """[out, dq, dk, dv (, dsink)] of the whole sequence."""
        qkv, ids, sink, weights = self.tensors()
        leaves = [x.requires_grad_() for x in (*qkv, *([] if sink is None else [sink]))]
        out = reference.attention(
            *leaves[:3], scale=SCALE, window=self.window, document_ids_BS=ids, sink_N=sink
        )
        return [out.detach(), *torch.autograd.grad((out * weights).sum(), leaves)]

    def on_rank(self, program: Program, exchange) -> list[Tensor]:
        """The same of the local tokens of one rank."""
        qkv, ids, sink, weights = self.tensors()
        layout, rank = program.layout, exchange.rank
        local = [layout.split(x, rank, dim=0) for x in (*qkv, weights)]
        leaves = [x.detach().requires_grad_() for x in local[:3]]
        if sink is not None:
            leaves.append(sink.requires_grad_())
        job = Attention(program, exchange, SCALE, self.window, ids)
        out = context_attention(*leaves[:3], job, sink)
        return [out.detach(), *torch.autograd.grad((out * local[3]).sum(), leaves)]


def joined(layout: Layout, per_rank: list[list[Tensor]]) -> list[Tensor]:
    """Whole tensors from those of all ranks; shares of the sink's gradient are summed."""
    columns = list(zip(*per_rank))
    whole = [layout.join(column, dim=0) for column in columns[:4]]
    return whole + [torch.stack(column).sum(dim=0) for column in columns[4:]]
