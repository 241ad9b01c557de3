"""The backward pass of a plan on one rank: blocks again with the global (out, lse), gradients
home."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_ext.context import block
from megatron_ext.context.plan import GRADIENT_OF
from megatron_ext.context.program import Compute, Move, Piece
from megatron_ext.context.worker import Attention, Key, Worker


class Backward(Worker):
    """Sums gradients in fp32: those of local pieces in place, the others until they are sent."""

    def __init__(
        self,
        job: Attention,
        shapes: tuple[torch.Size, torch.Size, torch.Size],
        dout: Tensor,
        saved: dict[Piece, tuple[Tensor, ...]],
        finals: dict[Key, tuple[Tensor, Tensor]],
    ) -> None:
        """`shapes` of the local q, k, v; dout [S, B, N * Dv]."""
        super().__init__(job, *shapes, dtype=dout.dtype, device=dout.device)
        self.table, self.finals, self.num_groups = dict(saved), finals, shapes[1][2]
        whole = dout.contiguous().view(*shapes[0][:3], shapes[2][3])
        self.dout = dict(self.pieces_of(whole, 0))
        self.gradients = [
            torch.zeros(shape, dtype=torch.float32, device=dout.device) for shape in shapes
        ]
        dq, dk, dv = self.gradients
        self.sums: dict[Piece, tuple[Tensor, ...]] = {}
        for key, view in self.pieces_of(dq, 0):
            self.sums[("dq", *key)] = (view,)
        for (key, keys), (_, values) in zip(self.pieces_of(dk, 1), self.pieces_of(dv, 1)):
            self.sums[("dkv", *key)] = keys, values
        for key, (out, lse) in finals.items():
            if key[0] in self.plan.own:
                self.table[("g", *key)] = self.dout[key], out, lse
        self.final_douts = {key: self.dout[key] for key in finals if key[0] in self.plan.own}

    def compute(self, compute: Compute) -> None:
        [q] = self.get("q", compute.q, compute.part)
        k, v = self.get("kv", compute.kv, compute.part)
        dout, out, lse = self.get("g", compute.q, compute.part)
        allowed = self.job.allowed(compute, self.chunk_length, self.device)
        dq, dk, dv = block.backward(
            dout, q, k, v, out, lse, scale=self.job.scale, causal=compute.causal, allowed=allowed
        )
        for chunk, share in self.split(dq, compute.q):
            self.add("dq", chunk, compute.part, (share,))
        for (chunk, keys), (_, values) in zip(
            self.split(dk, compute.kv), self.split(dv, compute.kv)
        ):
            self.add("dkv", chunk, compute.part, (keys, values))

    def add(self, what: str, chunk: int, part: int, shares: tuple[Tensor, ...]) -> None:
        """Add to the gradient of a piece."""
        piece = what, chunk, part
        if piece in self.sums:
            for total, share in zip(self.sums[piece], shares):
                total.add_(share)
        else:
            self.sums[piece] = tuple(share.to(torch.float32, copy=True) for share in shares)

    def wire(self, move: Move) -> torch.dtype:
        """How a move travels: sums that are not complete in fp32, also those of a key/value head
        that several parts of the query heads read."""
        parts_share = move.what == "dkv" and self.job.program.num_parts > self.num_groups
        return torch.float32 if move.wide or parts_share else self.dtype

    def outgoing(self, move: Move) -> tuple[Tensor, ...]:
        key = move.chunk, move.part
        if move.what in GRADIENT_OF.values():
            return tuple(share.to(self.wire(move)) for share in self.sums.pop(move.piece))
        if move.what == "dout":
            return (self.dout[key],)
        if move.what == "query":
            return (*self.table[("q", *key)], *self.table[("g", *key)])
        return self.table[move.piece]

    def buffers(self, move: Move) -> tuple[Tensor, ...]:
        query_heads, kv_heads = self.heads[move.part]
        width, value_width = self.widths
        dtype = self.wire(move)
        if move.what in ("kv", "dkv"):
            return self.room(kv_heads, width, dtype), self.room(kv_heads, value_width, dtype)
        if move.what == "dq":
            return (self.room(query_heads, width, dtype),)
        dout = self.room(query_heads, value_width, dtype)
        if move.what == "dout":
            return (dout,)
        lse = self.room(query_heads, None, torch.float32)
        return self.room(query_heads, width, dtype), dout, torch.empty_like(dout), lse

    def arrived(self, move: Move, tensors: tuple[Tensor, ...]) -> None:
        key = move.chunk, move.part
        if move.what in GRADIENT_OF.values():
            self.add(move.what, *key, tensors)
        elif move.what == "dout":
            self.table[("g", *key)] = (*tensors, *self.finals[key])
            self.final_douts[key] = tensors[0]
        elif move.what == "query":
            self.table[("q", *key)], self.table[("g", *key)] = tensors[:1], tensors[1:]
        else:
            self.table[move.piece] = tensors

    def sink_gradient(self, sink_N: Tensor) -> Tensor:
        """This rank's share of the gradient of the sinks [N]; the shares of all cp ranks sum to it.

        d loss / d sink = -sum over rows of e^(sink - lse) rowsum(dout out).
        """
        total = torch.zeros_like(sink_N, dtype=torch.float32)
        for key, dout in self.final_douts.items():
            heads = self.heads[key[1]][0]
            out, lse = self.finals[key]
            delta = (dout.float() * out.float()).sum(dim=-1)
            weight = torch.exp(sink_N.float()[heads].view(1, -1, 1) - lse)
            total[heads] -= (weight * delta).sum(dim=(0, 2))
        return total.to(sink_N.dtype)
