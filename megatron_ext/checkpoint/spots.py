"""Where a piece lies: a box of a global tensor, and who writes it.

A `Spot` is a name, the shape of the whole tensor, and the place and size of one box in it. Ranks
offer the boxes that they hold; `assign` gives each to one rank, `check_cover` finds gaps and
overlaps. Example: tp 2 of a [4, 6] weight: boxes at (0, 0) and (0, 3), both of size (4, 3).
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
from torch import Tensor

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""(place, size), one number each per dim."""

OBJECT_PREFIX = "object."
"""Names of state that is bytes and not a tensor (Transformer Engine's extra states)."""


@dataclass(frozen=True)
class Spot:
    """The box `place` + `size` of the global tensor `name` of `shape`."""

    name: str
    shape: tuple[int, ...]
    place: tuple[int, ...]
    size: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Bytes of the box."""
        return math.prod(self.size) * self.dtype.itemsize

    @property
    def key(self) -> tuple[str, tuple[int, ...]]:
        """What makes it the same box on two ranks."""
        return self.name, self.place

    @property
    def is_whole(self) -> bool:
        """The box is the whole tensor."""
        return self.size == self.shape


def spot_of(piece: ShardedTensor | ShardedObject) -> Spot:
    """The box of a sharded piece; an object is a whole tensor of bytes."""
    if isinstance(piece, ShardedObject):
        size = (len(object_bytes(piece.data)),)
        return Spot(OBJECT_PREFIX + piece.unique_key, size, (0,), size, torch.uint8)
    size = (1,) * piece.prepend_axis_num + tuple(piece.local_shape)
    return Spot(
        piece.key, tuple(piece.global_shape), tuple(piece.global_offset), size, piece.data.dtype
    )


def tensor_of(piece: ShardedTensor | ShardedObject) -> Tensor:
    """The values of a piece in the shape of its box, over live storage where possible."""
    if isinstance(piece, ShardedObject):
        return torch.frombuffer(bytearray(object_bytes(piece.data)), dtype=torch.uint8)
    return piece.data.detach().reshape(spot_of(piece).size)


def object_bytes(data: object) -> bytes:
    """An extra state, a byte tensor or a BytesIO, as bytes."""
    if isinstance(data, io.BytesIO):
        return data.getvalue()
    assert torch.is_tensor(data) and data.dtype == torch.uint8, (
        f"an extra state of type {type(data).__name__} has no form on disk"
    )
    return data.detach().cpu().contiguous().numpy().tobytes()


def overlap(a: Box, b: Box) -> Box | None:
    """(place, size) of what two boxes share."""
    start = tuple(max(p, q) for p, q in zip(a[0], b[0]))
    stop = tuple(min(p + n, q + m) for p, n, q, m in zip(*a, *b))
    if any(low >= high for low, high in zip(start, stop)):
        return None
    return start, tuple(high - low for low, high in zip(start, stop))


def slices(box: Box, origin: Sequence[int]) -> tuple[slice, ...]:
    """Index of `box` in a tensor whose first element lies at `origin`."""
    return tuple(slice(p - o, p - o + n) for p, n, o in zip(*box, origin))


def check_cover(name: str, shape: Sequence[int], boxes: Iterable[Box]) -> None:
    """The boxes fill the tensor without gap or overlap. Raises ValueError with the place."""
    ordered = sorted(boxes)
    filled = sum(math.prod(size) for _, size in ordered)
    active: list[Box] = []
    for box in ordered:
        place, size = box
        if any(p < 0 or n < 0 or p + n > whole for p, n, whole in zip(place, size, shape)):
            raise ValueError(f"{name}: the box {place} + {size} lies outside of {tuple(shape)}")
        if place:
            active = [other for other in active if other[0][0] + other[1][0] > place[0]]
        clash = next((other for other in active if overlap(box, other)), None)
        if clash is not None or (not place and active):
            raise ValueError(f"{name}: two pieces overlap at {place}")
        active.append(box)
    if filled != math.prod(shape):
        raise ValueError(f"{name}: pieces hold {filled} of {math.prod(shape)} elements")


def assign(offers: Sequence[Sequence[Spot]]) -> list[list[int]]:
    """For each rank, which of its offered spots (by index) it writes: each box once, the heaviest
    first, to the rank with the fewest bytes so far among those that offer it (the lowest of
    equals).
    """
    holders: dict[tuple, list[tuple[int, int]]] = {}
    for rank, spots in enumerate(offers):
        for index, spot in enumerate(spots):
            holders.setdefault(spot.key, []).append((rank, index))
    load, mine = [0] * len(offers), [[] for _ in offers]

    def weight(key: tuple) -> int:
        rank, index = holders[key][0]
        return offers[rank][index].num_bytes

    for key in sorted(holders, key=lambda key: (-weight(key), key)):
        rank, index = min(holders[key], key=lambda holder: (load[holder[0]], holder[0]))
        load[rank] += weight(key)
        mine[rank].append(index)
    return [sorted(chosen) for chosen in mine]


def check_whole(spots: Iterable[Spot]) -> None:
    """Every tensor is complete and of one shape and dtype. Raises ValueError."""
    tensors: dict[str, list[Spot]] = {}
    for spot in spots:
        tensors.setdefault(spot.name, []).append(spot)
    for name, pieces in tensors.items():
        kinds = {(spot.shape, spot.dtype) for spot in pieces}
        if len(kinds) > 1:
            raise ValueError(f"{name}: pieces are of different tensors: {kinds}")
        check_cover(name, pieces[0].shape, [(spot.place, spot.size) for spot in pieces])
