"""The forward pass of a plan on one rank: merge blocks into (out, lse) and bring them home."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_ext.context import block
from megatron_ext.context.program import Compute, Move, Piece
from megatron_ext.context.worker import Attention, Key, Worker


class Forward(Worker):
    """Merges blocks into out and lse, brings them home."""

    def __init__(self, job: Attention, q, k, v, sink_N: Tensor | None) -> None:
        super().__init__(job, q.shape, k.shape, v.shape, dtype=q.dtype, device=q.device)
        self.sink_N, self.wanted = sink_N, frozenset(self.plan.saved)
        self.sums: dict[Key, tuple[Tensor, Tensor]] = {}
        self.finals: dict[Key, tuple[Tensor, Tensor]] = {}
        self.results: dict[Key, Tensor] = {}
        self.saved: dict[Piece, tuple[Tensor, ...]] = {}
        for key, view in self.pieces_of(q, 0):
            self.hold(("q", *key), (view,))
        for (key, keys), (_, values) in zip(self.pieces_of(k, 1), self.pieces_of(v, 1)):
            self.hold(("kv", *key), (keys, values))

    def hold(self, piece: Piece, tensors: tuple[Tensor, ...]) -> None:
        """Put a piece into the table, and among the saved ones where the backward pass wants it. A
        part of the heads is copied, so that the saved piece does not keep all heads alive."""
        if len(self.heads) > 1:
            tensors = tuple(x.contiguous() for x in tensors)
        self.table[piece] = tensors
        if piece in self.wanted:
            self.saved[piece] = tensors

    def compute(self, compute: Compute) -> None:
        [q] = self.get("q", compute.q, compute.part)
        k, v = self.get("kv", compute.kv, compute.part)
        allowed = self.job.allowed(compute, self.chunk_length, self.device)
        out, lse = block.forward(
            q, k, v, scale=self.job.scale, causal=compute.causal, allowed=allowed
        )
        for (chunk, out_c), (_, lse_c) in zip(
            self.split(out, compute.q), self.split(lse, compute.q)
        ):
            self.add((chunk, compute.part), out_c, lse_c)

    def add(self, key: Key, out: Tensor, lse: Tensor) -> None:
        """Merge one more partial result of these queries."""
        if key in self.sums:
            out, lse = block.merge(*self.sums[key], out, lse)
        self.sums[key] = out, lse

    def final(self, key: Key) -> tuple[Tensor, Tensor]:
        """(out in the model's dtype, lse) over all keys and the sink."""
        if key not in self.finals:
            out, lse = self.sums.pop(key)
            if self.sink_N is not None:
                sink = self.sink_N.float()[self.heads[key[1]][0]].view(1, -1, 1)
                total = torch.logaddexp(lse, sink)
                out, lse = out.float() * torch.exp(lse - total)[..., None], total
            self.finals[key] = out.to(self.dtype), lse
        return self.finals[key]

    def outgoing(self, move: Move) -> tuple[Tensor, ...]:
        key = move.chunk, move.part
        if move.what == "partial":
            out, lse = self.sums.pop(key)
            return out.float(), lse
        if move.what == "final":
            return self.final(key)[:1]
        return self.table[move.piece]

    def buffers(self, move: Move) -> tuple[Tensor, ...]:
        query_heads, kv_heads = self.heads[move.part]
        width, value_width = self.widths
        if move.what == "partial":
            out = self.room(query_heads, value_width, torch.float32)
            return out, self.room(query_heads, None, torch.float32)
        if move.what == "kv":
            keys = self.room(kv_heads, width, self.dtype)
            return keys, self.room(kv_heads, value_width, self.dtype)
        width = value_width if move.what == "final" else width
        return (self.room(query_heads, width, self.dtype),)

    def arrived(self, move: Move, tensors: tuple[Tensor, ...]) -> None:
        key = move.chunk, move.part
        if move.what == "partial":
            self.add(key, *tensors)
        elif move.what == "final":
            self.results[key] = tensors[0]
        else:
            self.hold(move.piece, tensors)

    def output(self, num_heads: int) -> Tensor:
        """[S, B, N * Dv] of the local queries."""
        length = self.chunk_length * len(self.plan.own)
        shape = (length, self.batch, num_heads, self.widths[1])
        result = torch.empty(shape, dtype=self.dtype, device=self.device)
        for key, view in self.pieces_of(result, 0):
            view.copy_(self.results[key] if key in self.results else self.final(key)[0])
        return result.flatten(2)
