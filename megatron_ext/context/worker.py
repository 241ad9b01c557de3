"""One rank's walk through the steps of a plan: the part that forward and backward share.

Shapes: S local sequence, B micro-batch, N query heads, G key/value heads, D head, Dv value head of
this tp rank. A piece is [B, heads, chunk length, width].
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ext.context.exchange import Exchange
from megatron_ext.context.heads import head_slices
from megatron_ext.context.plan import RankPlan, RankStep, rank_plan
from megatron_ext.context.program import Compute, Move, Piece, Program

Key = tuple[int, int]
"""(chunk, part)."""


def positions(chunks: tuple[int, ...], chunk_length: int, device: torch.device) -> Tensor:
    """int64 [chunks * chunk length]: places in the whole sequence."""
    starts = torch.tensor(chunks, device=device)[:, None] * chunk_length
    return (starts + torch.arange(chunk_length, device=device)).flatten()


@dataclass(frozen=True)
class Attention:
    """What the attention of one call is: the program and the mask, the same on all cp ranks.

    `window`: a token sees at most this many before it. `document_ids_BS`: whole sequences, not
    the local part, so that every rank can mask keys of every other.
    """

    program: Program
    exchange: Exchange
    scale: float
    window: int | None = None
    document_ids_BS: Tensor | None = None

    @property
    def plan(self) -> RankPlan:
        """What this rank does."""
        return rank_plan(self.program, self.exchange.rank)

    def allowed(self, compute: Compute, chunk_length: int, device: torch.device) -> Tensor | None:
        """The mask of one block, or None where causal or full says it all."""
        longest = (max(compute.q) - min(compute.kv) + 1) * chunk_length - 1
        in_window = self.window is None or longest <= self.window
        if in_window and self.document_ids_BS is None:
            return None
        row, col = (positions(chunks, chunk_length, device) for chunks in (compute.q, compute.kv))
        allowed = col[None, :] <= row[:, None]
        if not in_window:
            allowed = allowed & (col[None, :] >= row[:, None] - self.window)
        allowed = allowed[None, None]
        if self.document_ids_BS is not None:
            ids = self.document_ids_BS
            allowed = allowed & (ids[:, row][:, :, None] == ids[:, col][:, None, :])[:, None]
        return allowed


def _joined(pieces: list[Tensor]) -> Tensor:
    """One tensor of adjacent chunks; a view where they already lie side by side in memory."""
    first, length = pieces[0], pieces[0].shape[2]
    storage = first.untyped_storage().data_ptr()
    is_view = all(
        piece.untyped_storage().data_ptr() == storage
        and piece.stride() == first.stride()
        and piece.storage_offset() == first.storage_offset() + i * length * first.stride(2)
        for i, piece in enumerate(pieces)
    )
    if not is_view:
        return torch.cat(pieces, dim=2)
    size = (*first.shape[:2], length * len(pieces), *first.shape[3:])
    return first.as_strided(size, first.stride())


class Worker(ABC):
    """The step loop, the table of pieces and the accumulators of one pass on one rank."""

    def __init__(
        self,
        job: Attention,
        q: torch.Size,
        k: torch.Size,
        v: torch.Size,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """q, k, v: shapes of the local tensors, [S, B, heads, width]."""
        self.job, self.plan, self.dtype, self.device = job, job.plan, dtype, device
        self.chunk_length, self.batch = q[0] // len(self.plan.own), q[1]
        self.widths = q[3], v[3]
        self.heads = head_slices(q[2], k[2], job.program.num_parts)
        self.table: dict[Piece, tuple[Tensor, ...]] = {}

    def local(self, x: Tensor, chunk: int, heads: slice) -> Tensor:
        """View [B, heads, c, width] of a local [S, B, all heads, width]."""
        start = self.plan.own.index(chunk) * self.chunk_length
        return x[start : start + self.chunk_length, :, heads].permute(1, 2, 0, 3)

    def pieces_of(self, x: Tensor, side: int) -> Iterable[tuple[Key, Tensor]]:
        """((chunk, part), view) of a local tensor with query (side 0) or kv (side 1) heads."""
        for part, slices in enumerate(self.heads):
            for chunk in self.plan.own:
                yield (chunk, part), self.local(x, chunk, slices[side])

    def get(self, what: str, chunks: tuple[int, ...], part: int) -> list[Tensor]:
        """The tensors of a row of pieces, joined along the sequence."""
        rows = zip(*(self.table[what, chunk, part] for chunk in chunks))
        return [_joined(list(row)) for row in rows]

    def split(self, x: Tensor, chunks: tuple[int, ...]) -> Iterable[tuple[int, Tensor]]:
        """The inverse of joining."""
        return zip(chunks, x.split(self.chunk_length, dim=2))

    def room(self, heads: slice, width: int | None, dtype: torch.dtype) -> Tensor:
        """Room for one received tensor, [B, heads, c, width] or [B, heads, c]."""
        shape = (self.batch, heads.stop - heads.start, self.chunk_length)
        shape = shape if width is None else (*shape, width)
        return torch.empty(shape, dtype=dtype, device=self.device)

    def run(self, steps: Iterable[RankStep]) -> None:
        """Every step: start the moves, compute, wait, take in what came, free what is done."""
        for step in steps:
            sends = [(m.target, x.contiguous()) for m in step.sends for x in self.outgoing(m)]
            arrivals = [(move, self.buffers(move)) for move in step.receives]
            receives = [(move.source, x) for move, tensors in arrivals for x in tensors]
            pending = self.job.exchange.start(sends, receives)
            del sends, receives
            for compute in step.computes:
                self.compute(compute)
            pending.wait()
            for move, tensors in arrivals:
                self.arrived(move, tensors)
            for piece in step.release:
                self.table.pop(piece, None)

    @abstractmethod
    def outgoing(self, move: Move) -> tuple[Tensor, ...]:
        """What this rank sends for `move`."""

    @abstractmethod
    def buffers(self, move: Move) -> tuple[Tensor, ...]:
        """Where the tensors of `move` are received."""

    @abstractmethod
    def arrived(self, move: Move, tensors: tuple[Tensor, ...]) -> None:
        """Take what `move` has brought."""

    @abstractmethod
    def compute(self, compute: Compute) -> None:
        """Do one step's work."""
