"""How our tensors lie against theirs: pure functions, each with its exact inverse.

Shapes: H hidden, N query heads, G key/value heads, D head, F feed-forward width, [rows, columns] as
in `torch.nn.Linear.weight`. `join` takes their tensors to ours, `split` goes back; no number
changes, so gradients travel through them as weights do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Transform(Protocol):
    """A permutation of elements between several of their tensors and one of ours."""

    def join(self, theirs: Sequence[Tensor]) -> Tensor:
        """Their tensors -> ours."""

    def split(self, ours: Tensor) -> list[Tensor]:
        """Ours -> their tensors."""


class Same:
    """One tensor, element by element."""

    def join(self, theirs: Sequence[Tensor]) -> Tensor:
        return theirs[0]

    def split(self, ours: Tensor) -> list[Tensor]:
        return [ours]


@dataclass(frozen=True)
class QueryKeyValue:
    """q [N*D, ...], k and v [G*D, ...] <-> one tensor whose rows go group by group: the N/G query
    heads of a key/value head, its key, its value. So a tensor-parallel rank's rows are whole
    groups.
    """

    groups: int
    queries_per_group: int

    def join(self, theirs: Sequence[Tensor]) -> Tensor:
        by_group = [t.unflatten(0, (self.groups, -1)) for t in theirs]
        return torch.cat(by_group, dim=1).flatten(0, 1)

    def split(self, ours: Tensor) -> list[Tensor]:
        heads = self.queries_per_group
        by_head = ours.unflatten(0, (self.groups, heads + 2, -1))
        parts = by_head.split([heads, 1, 1], dim=1)
        return [part.flatten(0, 2) for part in parts]


class GateThenUp:
    """gate [F, H] and up [F, H] <-> [2F, H] (dense and shared feed-forward layers)."""

    def join(self, theirs: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(theirs))

    def split(self, ours: Tensor) -> list[Tensor]:
        return list(ours.chunk(2))


class GateAndUp:
    """gate [F, H] and up [F, H] of one expert <-> [2, F, H]."""

    def join(self, theirs: Sequence[Tensor]) -> Tensor:
        return torch.stack(list(theirs))

    def split(self, ours: Tensor) -> list[Tensor]:
        return list(ours.unbind())


class Interleaved:
    """gate and up in turn in the last dim, [H, 2F] or [2F], <-> [2, F, H] or [2, F] (GPT-OSS)."""

    def join(self, theirs: Sequence[Tensor]) -> Tensor:
        pairs = theirs[0].unflatten(-1, (-1, 2))
        return pairs.permute(*reversed(range(pairs.dim())))

    def split(self, ours: Tensor) -> list[Tensor]:
        return [ours.permute(*reversed(range(ours.dim()))).flatten(-2)]


class Transposed:
    """[F, H] <-> [H, F]."""

    def join(self, theirs: Sequence[Tensor]) -> Tensor:
        return theirs[0].t()

    def split(self, ours: Tensor) -> list[Tensor]:
        return [ours.t()]


SAME = Same()
GATE_THEN_UP = GateThenUp()
GATE_AND_UP = GateAndUp()
INTERLEAVED = Interleaved()
TRANSPOSED = Transposed()
