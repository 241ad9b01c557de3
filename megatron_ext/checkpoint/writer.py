"""Shards to disk: who writes what (plan), a private copy, and the bytes, in the background where
asked.

The files are megatron-core's `torch_dist` format (torch.distributed.checkpoint):
`__<rank>_0.distcp`, each entry a `torch.save` of one piece, and `.metadata` with their places.
Written here and not by megatron-core's own writer, because on a CPU that one shares live storage
with the optimizer, starts a manager process and forked writers whose death nobody sees, and reports
a full disk as "unexpected pos". Here a thread writes: it dies with its process.

    plan (collective, once) -> stage (private copy) -> write (thread) -> results, gathered to rank 0
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, is_main_replica
from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult


def _tensor_of(piece: ShardedTensor) -> Tensor:
    return piece.data.detach().reshape((1,) * piece.prepend_axis_num + tuple(piece.local_shape))


def _index(piece: ShardedTensor | ShardedObject) -> MetadataIndex:
    if isinstance(piece, ShardedObject):
        return MetadataIndex(piece.unique_key)
    return MetadataIndex(piece.key, torch.Size(piece.global_offset))


def _write_item(piece: ShardedTensor | ShardedObject) -> WriteItem:
    if isinstance(piece, ShardedObject):
        return WriteItem(index=_index(piece), type=WriteItemType.BYTE_IO)
    tensor = _tensor_of(piece)
    data = TensorWriteData(
        chunk=ChunkStorageMetadata(offsets=torch.Size(piece.global_offset), sizes=tensor.shape),
        properties=TensorProperties(dtype=tensor.dtype),
        size=torch.Size(piece.global_shape),
    )
    return WriteItem(index=_index(piece), type=WriteItemType.SHARD, tensor_data=data)


class Planner:
    """Decides once which rank writes which replica, and again only when the pieces of some rank
    changed.
    """

    def __init__(self, share_replicas: bool) -> None:
        self.share_replicas = share_replicas
        self.metadata: Metadata | None = None  # on rank 0
        self._signature: list | None = None
        self._mine: set[MetadataIndex] = set()

    def plan(self, pieces: Iterable[ShardedTensor | ShardedObject]) -> list:
        """The pieces that this rank writes. Collective.

        With `share_replicas` the copies of a weight on dp ranks compete and the rank with fewest
        bytes gets it; otherwise the first replica is written. Raises ValueError where the pieces of
        all ranks leave a gap or overlap.
        """
        pieces = list({_index(piece): piece for piece in pieces}.values())  # tied weights once
        if not self.share_replicas:
            pieces = [piece for piece in pieces if is_main_replica(piece.replica_id)]
        items = [_write_item(piece) for piece in pieces]
        signature = [(item.index, item.tensor_data) for item in items]
        changed: list = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(changed, signature != self._signature)
        if any(changed):
            self._mine = self._agree(items)
            self._signature = signature
        return [piece for piece in pieces if _index(piece) in self._mine]

    def _agree(self, items: list[WriteItem]) -> set[MetadataIndex]:
        """All ranks' items to rank 0, which drops copies and checks coverage; back comes what each
        rank writes.
        """
        rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
        plans: list | None = [None] * world if rank == 0 else None
        torch.distributed.gather_object(SavePlan(items), plans, dst=0)
        answer: list = [None]
        if plans is not None:
            try:
                final, self.metadata = DefaultSavePlanner(
                    flatten_state_dict=False
                ).create_global_plan(plans)
                answer = [[{item.index for item in plan.items} for plan in final]]
            except ValueError as error:
                answer = [error]
        torch.distributed.broadcast_object_list(answer, src=0)
        if isinstance(answer[0], ValueError):
            raise answer[0]
        return answer[0][rank]


class _Stream:
    """The file as `torch.save` sees it; keeps the OSError that torch's zip writer would turn into a
    RuntimeError.
    """

    def __init__(self, path: Path) -> None:
        self._file = open(path, "wb", buffering=0)
        self.position = 0
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        view = memoryview(data)
        try:
            while view:
                view = view[self._file.write(view) :]
        except OSError as error:
            self.error = error
            raise
        self.position += len(data)
        return len(data)

    def flush(self) -> None:
        pass

    def close(self, sync: bool) -> None:
        if sync:
            os.fsync(self._file.fileno())
        self._file.close()


@dataclass
class Shard:
    """The file of one rank: pieces to write, then what was written where."""

    path: Path
    pieces: list
    num_bytes: int
    is_private: bool
    results: list[WriteResult] = field(default_factory=list)
    error: BaseException | None = None
    seconds: float = 0.0
    done: threading.Event = field(default_factory=threading.Event)

    def start(self) -> None:
        """Write in a thread of this process."""
        threading.Thread(target=self.write, name=f"write {self.path.name}", daemon=True).start()

    def write(self) -> None:
        """Write and fsync; never raises: an error is kept for the main thread."""
        begin = time.perf_counter()
        try:
            self._write()
        except BaseException as error:
            self.error = error
        self.pieces = []
        self.seconds = time.perf_counter() - begin
        self.done.set()

    def _write(self) -> None:
        stream = _Stream(self.path)
        is_complete = False
        try:
            for index, value in self.pieces:
                begin = stream.position
                self._save(value, stream)
                length = stream.position - begin
                info = _StorageInfo(self.path.name, begin, length)
                self.results.append(
                    WriteResult(index=index, size_in_bytes=length, storage_data=info)
                )
            is_complete = True
        finally:
            stream.close(sync=is_complete)

    def _save(self, value: object, stream: _Stream) -> None:
        if torch.is_tensor(value) and not self.is_private:
            value = private_copy(
                value
            )  # one at a time; a view would drag its whole storage into the file
        try:
            torch.save(value, stream)
        except RuntimeError as error:
            if stream.error is not None:
                raise stream.error from error
            raise


def private_copy(tensor: Tensor) -> Tensor:
    """A copy in host memory that no later optimizer step can change."""
    return tensor.to("cpu", copy=True, memory_format=torch.contiguous_format)


def stage(pieces: list, folder: Path, copy: bool) -> Shard:
    """This rank's file in `folder`, not yet written; `copy`: of private copies, so that training
    may go on.
    """
    values = []
    for piece in pieces:
        if isinstance(piece, ShardedObject):
            values.append((_index(piece), [piece.data]))  # megatron-core reads a list of objects
        else:
            tensor = _tensor_of(piece)
            values.append((_index(piece), private_copy(tensor) if copy else tensor))
    tensors = [value for _, value in values if torch.is_tensor(value)]
    num_bytes = sum(t.numel() * t.element_size() for t in tensors)
    name = f"__{torch.distributed.get_rank()}_0.distcp"
    return Shard(folder / name, values, num_bytes, is_private=copy)


def write_metadata(metadata: Metadata, results: list[list[WriteResult]], folder: Path) -> None:
    """Rank 0's table of every piece (file, offset, length), written by torch's own writer."""
    writer = FileSystemWriter(folder)
    writer.set_up_storage_writer(is_coordinator=True)
    writer.finish(metadata, results)
