"""The tensors of an update cut into tiles that stay in a CPU's cache.

An update of AdamW reads 16 bytes of each element (weight, gradient, both moments) and writes 12,
and its 16-bit copy takes 6 more. Over whole tensors each further kernel goes to memory again; over
a tile it finds the tile in the cache.

    parameters   |  a: 5 elements  | b: 3 |  c: 9 elements            |
    tiles of 4   | a a a a | a b b b | c c c c | c c c c | c |
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

TILE = 1 << 18
"""Elements. Two threads of a Zen 4 with 32 MiB of L3: 14.4 ms for AdamW and the copy to bf16 of
17.8M weights in tiles of this size, 19.0 ms in whole tensors, 18.9 ms in tiles of a quarter.
"""


class Row(NamedTuple):
    """What one parameter's update reads and writes: contiguous and of one size, but for `step`.
    `weight` is the copy in the model's dtype that follows the master, None where there is none.
    """

    master: Tensor
    gradient: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: Tensor
    weight: Tensor | None

    def addresses(self) -> tuple[int, ...]:
        """Where the row lies; views of it are good as long as this is the same."""
        return tuple(0 if one is None else one.data_ptr() for one in self)


@dataclass(frozen=True)
class Tile:
    """Flat views, in lists as torch's kernels over many tensors take them. `sources` are the
    masters that `weights` follow.
    """

    masters: list[Tensor] = field(default_factory=list)
    gradients: list[Tensor] = field(default_factory=list)
    exp_avgs: list[Tensor] = field(default_factory=list)
    exp_avg_sqs: list[Tensor] = field(default_factory=list)
    steps: list[Tensor] = field(default_factory=list)
    sources: list[Tensor] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)

    def add(self, row: Row, start: int, stop: int) -> None:
        """The elements [start, stop) of a row."""
        cut = [one.detach().view(-1)[start:stop] for one in row[:4]]
        for views, view in zip(
            (self.masters, self.gradients, self.exp_avgs, self.exp_avg_sqs), cut
        ):
            views.append(view)
        self.steps.append(row.step)
        if row.weight is not None:
            self.sources.append(cut[0])
            self.weights.append(row.weight.detach().view(-1)[start:stop])


def cuts(sizes: Sequence[int], tile: int) -> Iterator[list[tuple[int, int, int]]]:
    """For each tile its pieces (number of the parameter, start, stop)."""
    pieces, free = [], tile
    for number, size in enumerate(sizes):
        start = 0
        while start < size:
            stop = min(size, start + free)
            pieces.append((number, start, stop))
            free -= stop - start
            start = stop
            if not free:
                yield pieces
                pieces, free = [], tile
    if pieces:
        yield pieces


def tiles(rows: Sequence[Row], tile: int = TILE) -> list[Tile]:
    """All elements of `rows` in tiles of `tile` elements, the last one smaller."""
    made = []
    for pieces in cuts([row.master.numel() for row in rows], tile):
        made.append(Tile())
        for number, start, stop in pieces:
            made[-1].add(rows[number], start, stop)
    return made
