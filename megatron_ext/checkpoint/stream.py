"""A checkpoint read and written tensor by tensor, without a model, an optimizer or ranks.

    source = StoredTensors(DIR / "step_00000100")
    source.read("decoder.layers.0.mlp.experts.fc1_weight", (3, 0, 0, 0), (1, 2, 96, 64))
    write(DIR, [Piece("decoder...", shape, place, size, dtype, make), ...], run_info={...})

Converters use it: memory holds one piece at a time. What is written is read by every layout, like
what a run saves: pieces have global names and places (see the package's docstring).
"""

from __future__ import annotations

import contextlib
import shutil
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.utils import _create_file_view

from megatron_ext.checkpoint import folder
from megatron_ext.checkpoint.loader import read_metadata
from megatron_ext.checkpoint.writer import Shard, write_metadata
from megatron_ext.errors import DataError

Box = tuple[int, ...]
KEPT_PIECES = 2
"""Stored pieces that `StoredTensors` keeps: one piece may hold many experts that are asked for in
turn.
"""


@dataclass(frozen=True)
class Piece:
    """The box `place` + `size` of the global tensor `name` of `shape`; `make()` gives values."""

    name: str
    shape: Box
    place: Box
    size: Box
    dtype: torch.dtype
    make: Callable[[], Tensor]

    @property
    def num_bytes(self) -> int:
        """Bytes of this piece."""
        return torch.Size(self.size).numel() * self.dtype.itemsize


class StoredTensors:
    """The tensors of one step's folder. Raises DataError where it is incomplete or damaged."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.record = folder.read_record(path)
        self._metadata = read_metadata(path)
        self._kept: OrderedDict[MetadataIndex, Tensor] = OrderedDict()

    def __contains__(self, name: str) -> bool:
        return isinstance(self._metadata.state_dict_metadata.get(name), TensorStorageMetadata)

    def names(self) -> Iterator[str]:
        """Every tensor, weights, optimizer states and random streams."""
        return (name for name in self._metadata.state_dict_metadata if name in self)

    def shape(self, name: str) -> Box:
        """The global shape."""
        return tuple(self._metadata.state_dict_metadata[name].size)

    def dtype(self, name: str) -> torch.dtype:
        """The dtype on disk."""
        return self._metadata.state_dict_metadata[name].properties.dtype

    def read(self, name: str, place: Box | None = None, size: Box | None = None) -> Tensor:
        """The box `place` + `size` of a tensor (all of it by default), whatever pieces it lies in.

        Raises DataError where no piece covers a part of it.
        """
        shape = self.shape(name)
        place, size = place or (0,) * len(shape), size or shape
        chunks = self._metadata.state_dict_metadata[name].chunks
        for chunk in chunks:
            if (tuple(chunk.offsets), tuple(chunk.sizes)) == (place, size):
                return self._load(name, chunk)
        target = torch.empty(size, dtype=self.dtype(name))
        covered = 0
        for chunk in chunks:
            both = _overlap((place, size), (tuple(chunk.offsets), tuple(chunk.sizes)))
            if both is None:
                continue
            stored = self._stored(name, chunk)
            part = stored[_slices(both, tuple(chunk.offsets))]
            target[_slices(both, place)] = part
            covered += part.numel()
        if covered != target.numel():
            raise DataError(f"checkpoint holds only a part of {name}", path=self.path)
        return target

    def _stored(self, name: str, chunk: ChunkStorageMetadata) -> Tensor:
        """A stored piece of which a part is wanted: the next parts will be asked for soon."""
        index = MetadataIndex(name, chunk.offsets)
        if index not in self._kept:
            while len(self._kept) >= KEPT_PIECES:
                self._kept.popitem(last=False)
            self._kept[index] = self._load(name, chunk)
        self._kept.move_to_end(index)
        return self._kept[index]

    def _load(self, name: str, chunk: ChunkStorageMetadata) -> Tensor:
        info = self._metadata.storage_data[MetadataIndex(name, chunk.offsets)]
        try:
            with open(self.path / info.relative_path, "rb") as file:
                view = _create_file_view(file, info.offset, info.length)
                tensor = torch.load(view, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged archive may raise anything
            raise DataError(
                f"checkpoint cannot be read: {name}: {error}", path=self.path
            ) from error
        if tuple(tensor.shape) != tuple(chunk.sizes):
            raise DataError(
                f"checkpoint is damaged: a piece of {name} is {tuple(tensor.shape)}", path=self.path
            )
        return tensor


def _overlap(a: tuple[Box, Box], b: tuple[Box, Box]) -> tuple[Box, Box] | None:
    """(place, size) of what two boxes share."""
    start = tuple(max(p, q) for p, q in zip(a[0], b[0]))
    stop = tuple(min(p + n, q + m) for p, n, q, m in zip(*a, *b))
    if any(low >= high for low, high in zip(start, stop)):
        return None if start else ((), ())
    return start, tuple(high - low for low, high in zip(start, stop))


def _slices(box: tuple[Box, Box], origin: Box) -> tuple[slice, ...]:
    return tuple(slice(p - o, p - o + n) for p, n, o in zip(*box, origin))


def _item(piece: Piece) -> WriteItem:
    place, size = torch.Size(piece.place), torch.Size(piece.size)
    return WriteItem(
        index=MetadataIndex(piece.name, place),
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            chunk=ChunkStorageMetadata(offsets=place, sizes=size),
            properties=TensorProperties(dtype=piece.dtype),
            size=torch.Size(piece.shape),
        ),
    )


def _values(pieces: Iterable[Piece]) -> Iterator[tuple[MetadataIndex, Tensor]]:
    for piece in pieces:
        tensor = piece.make().reshape(piece.size)
        assert tensor.dtype == piece.dtype, f"{piece.name}: {tensor.dtype}, not {piece.dtype}"
        if tensor.untyped_storage().nbytes() != piece.num_bytes or not tensor.is_contiguous():
            tensor = tensor.clone(memory_format=torch.contiguous_format)
        yield MetadataIndex(piece.name, torch.Size(piece.place)), tensor


def _record(run_info: dict[str, Any]) -> dict[str, Any]:
    one = dict.fromkeys(("world_size", "tp", "pp", "cp", "ep", "etp", "dp"), 1)
    return {
        "format": "pretrain_moe",
        "version": folder.RECORD_VERSION,
        "step": 0,
        "time": time.time(),
        "layout": {**one, "vpp": None},
        "progress": {"step": 0},
        "extra": {},
        "scheduler": None,
        "optimizer": None,
        "run": run_info,
    }


def write(directory: Path, pieces: Sequence[Piece], run_info: dict[str, Any]) -> Path:
    """Write weights as step 0 of `directory`, which holds no checkpoint; the folder of that step.

    Raises DiskError, and whatever `make` of a piece raises: the caller drops the folder then
    (`whole_folder`).
    """
    assert not folder.steps(directory), f"{directory} holds checkpoints already"
    folder.check_space(directory, sum(piece.num_bytes for piece in pieces))
    try:
        writing = folder.begin(directory, 0)
        return _write(writing, directory, pieces, run_info)
    except OSError as error:
        raise folder.disk_error(error, directory) from error


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A folder beside `path` to write into; at the end of the block it gets the name `path`, which
    is new or empty. After an error nothing is left. Raises DiskError.
    """
    writing = path.with_name(f".writing_{path.name}_{uuid.uuid4().hex[:8]}")
    try:
        writing.mkdir(parents=True)
        yield writing
        if path.exists():
            path.rmdir()
        writing.rename(path)
        folder.sync(path.parent)
    except OSError as error:
        raise folder.disk_error(error, path) from error
    finally:
        shutil.rmtree(writing, ignore_errors=True)


def _write(writing: Path, directory: Path, pieces: Sequence[Piece], run_info: dict) -> Path:
    num_bytes = sum(piece.num_bytes for piece in pieces)
    shard = Shard(writing / "__0_0.distcp", _values(pieces), num_bytes, is_private=True)
    shard.write()
    if shard.error is not None:
        raise shard.error
    plan = SavePlan([_item(piece) for piece in pieces])
    planner = DefaultSavePlanner(flatten_state_dict=False)
    _, metadata = planner.create_global_plan([plan])
    write_metadata(metadata, [shard.results], writing)
    torch.save({"iteration": 0, "checkpoint_version": 3.0}, writing / "common.pt")
    save_config(CheckpointingConfig("torch_dist", 1), str(writing))
    return folder.finish(writing, directory, _record(run_info))
