"""Tensors out of a checkpoint, box by box, whatever pieces they lie in.

Only the bytes that a box needs are read, into memory whose size the manifest has bounded. Bytes of
an object (an extra state of Transformer Engine) are looked through before anybody may unpickle
them.
"""

from __future__ import annotations

import io
import math
import os
import pickletools
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_ext.checkpoint import manifest as manifests
from megatron_ext.checkpoint.hashes import Damaged, check_blocks, read_at
from megatron_ext.checkpoint.manifest import Manifest, Stored
from megatron_ext.checkpoint.patience import patiently
from megatron_ext.checkpoint.spots import Box, overlap, slices
from megatron_ext.errors import DataError

_HARMLESS_IMPORTS = frozenset({"collections OrderedDict", "torch Size", "_codecs encode"})
_IMPORTS = frozenset({"GLOBAL", "INST"})
_REFUSED = frozenset({"STACK_GLOBAL", "EXT1", "EXT2", "EXT4", "PERSID", "BINPERSID"})


Span = tuple[str, int, int]
"""File, offset, number of bytes."""


def byte_span(piece: Stored, box: Box) -> tuple[Span, list[int]]:
    """The shortest run of bytes that holds a box inside a piece, and the strides of its elements
    there.
    """
    spot, (place, size) = piece.spot, box
    strides = [math.prod(spot.size[dim + 1 :]) for dim in range(len(size))]
    first = sum((p - q) * s for p, q, s in zip(place, spot.place, strides))
    last = first + sum((n - 1) * s for n, s in zip(size, strides))
    width = spot.dtype.itemsize
    return (piece.file, piece.offset + first * width, (last - first + 1) * width), strides


class StoredTensors:
    """The tensors of one step's folder. Raises DataError where it is incomplete or damaged.

    `verify`: read and hash every file first.
    """

    def __init__(self, path: Path, verify: bool = True, may_lack_files: bool = False) -> None:
        self.path = path
        self.manifest = manifests.read(path, may_lack_files)
        self.record = self.manifest.record
        self._descriptors: dict[str, int] = {}
        if verify:
            check_share(self.manifest, 0, 1)

    def __contains__(self, name: str) -> bool:
        return name in self.manifest.tensors

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Close the files."""
        for descriptor in getattr(self, "_descriptors", {}).values():
            os.close(descriptor)
        self._descriptors = {}

    def names(self) -> Iterator[str]:
        """Every tensor: weights, optimizer states and random streams."""
        return iter(self.manifest.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """The global shape."""
        return self._pieces(name)[0].spot.shape

    def dtype(self, name: str) -> torch.dtype:
        """The dtype on disk."""
        return self._pieces(name)[0].spot.dtype

    def _pieces(self, name: str) -> list[Stored]:
        return self.manifest.tensors[name]

    def read(
        self, name: str, place: Sequence[int] | None = None, size: Sequence[int] | None = None
    ) -> Tensor:
        """The box `place` + `size` of a tensor (all of it by default) on the CPU."""
        shape = self.shape(name)
        box = (tuple(place or (0,) * len(shape)), tuple(shape if size is None else size))
        target = torch.empty(box[1], dtype=self.dtype(name))
        covered = self.read_into(target, name, box)
        if covered != target.numel():
            raise DataError(f"checkpoint holds only a part of {name}", path=self.path)
        return target

    def read_into(self, target: Tensor, name: str, box: Box) -> int:
        """Fill `target`, which is the box of a tensor, where the checkpoint has values; returns
        how many.
        """
        covered = 0
        for piece in self._pieces(name):
            spot = piece.spot
            both = overlap(box, (spot.place, spot.size))
            if both is None:
                continue
            values = self._read_box(piece, both)
            target[slices(both, box[0])].copy_(values)
            covered += values.numel()
        return covered

    def _read_box(self, piece: Stored, box: Box) -> Tensor:
        """A box inside one piece: the shortest run of bytes that holds it."""
        span, strides = byte_span(piece, box)
        return self.read_bytes(span).view(piece.spot.dtype).as_strided(box[1], strides)

    def read_bytes(self, span: Span) -> Tensor:
        """Bytes of one file."""
        file, offset, count = span
        raw = torch.empty(count, dtype=torch.uint8)
        target = memoryview(raw.numpy())
        try:
            patiently(lambda: read_at(self._open(file), offset, target), self.path / file)
        except (OSError, EOFError) as error:
            raise DataError(
                f"checkpoint cannot be read: {file} offset={offset}: {error}",
                path=self.path / file,
            ) from error
        return raw

    def _open(self, name: str) -> int:
        if name not in self._descriptors:
            self._descriptors[name] = self.manifest.open(name)
        return self._descriptors[name]


def check_share(
    manifest: Manifest, rank: int, world: int, files: Collection[str] | None = None
) -> int:
    """Hash this rank's share of all blocks of all files (or these) again; returns the bytes read.
    Raises Damaged with file, offset, expected and actual hash.
    """
    number = total = 0
    for name in sorted(manifest.files if files is None else files):
        expected = manifest.files[name]
        count = len(expected.blocks)
        mine = [block for block in range(count) if (number + block) % world == rank]
        number += count
        if mine:
            descriptor = manifest.open(name)
            try:
                total += check_blocks(descriptor, manifest.path / name, expected, mine)
            finally:
                os.close(descriptor)
    return total


def _imports(data: bytes) -> Iterable[str]:
    """What a pickle would import, as `module name`; `?` where that cannot be told."""
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name in _IMPORTS:
            yield str(argument)
        elif opcode.name in _REFUSED:
            yield "?"


def object_of(data: Tensor, like: Any, path: Path) -> Any:
    """An object's bytes in the form that the module gave (byte tensor or BytesIO).

    The module may unpickle them, so a pickle that imports anything but plain containers is refused
    here. Raises Damaged.
    """
    raw = data.numpy().tobytes()
    try:
        strange = sorted(set(_imports(raw)) - _HARMLESS_IMPORTS)
    except ValueError:  # no pickle: nothing that could run
        strange = []
        if raw[:1] == b"\x80" or raw[:2] == b"PK":
            strange = ["an archive or a damaged pickle"]
    if strange:
        raise Damaged(f"an extra state would import {strange[0][:80]!r}: refused", path=path)
    return io.BytesIO(raw) if isinstance(like, io.BytesIO) else data
