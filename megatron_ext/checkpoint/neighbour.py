"""A save in a fast tier of several nodes: each rank's file in its node's folder and, sent there, in
that of the next node, so that any one node may be lost.

    write own file -> tell all -> send it to the neighbour, keep the copy of the node before -> tell
    all -> every node's leader publishes its folder with the same manifest -> read both files back

It runs in the thread of the save, over a gloo group that no other thread uses. All ranks go through
the same steps in the same order, also after a disk error on some of them: everybody is told and
all give up together. So the main thread does nothing but the lazy copy, and the group stays in
order for the next save.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from megatron_ext.checkpoint import folder, tensor_file, writer
from megatron_ext.checkpoint.hashes import Damaged, FileHash, Hasher, read_at
from megatron_ext.checkpoint.nodes import Nodes
from megatron_ext.checkpoint.reports import FailedThere, Failure, quietly
from megatron_ext.checkpoint.saving import DURABLE, VERIFIED, Save
from megatron_ext.checkpoint.staging import BLOCK, aligned
from megatron_ext.mesh.agree import FailedElsewhere

T = TypeVar("T")


class _Copy:
    """The file of another rank, hashed while its blocks arrive. A disk error is kept until the last
    one is here, so that the sender is not left alone.
    """

    def __init__(self, path: Path, num_bytes: int) -> None:
        self._hasher = Hasher(num_bytes)
        self._num_bytes = num_bytes
        self._error: OSError | None = None
        self._file: writer.NewFile | None = None
        self._try(lambda: self._open(path))

    def _open(self, path: Path) -> None:
        self._file = writer.NewFile(path)

    def _try(self, action: Callable[[], None]) -> None:
        if self._error is None:
            self._error = quietly(action)

    def add(self, block: memoryview, filled: int) -> None:
        """The next bytes, in a block of whole pages."""
        self._hasher.update(block[:filled])
        self._try(lambda: self._file.write_padded(block, filled))

    def finish(self) -> FileHash:
        """After the last byte, on the disk. Raises OSError."""
        self._try(lambda: self._file.finish(self._num_bytes))
        if self._file is not None:
            os.close(self._file.descriptor)
        if self._error is not None:
            raise self._error
        return self._hasher.finish()


def swap(mine: Path, num_bytes: int, copy: Path, copy_bytes: int, nodes: Nodes) -> FileHash:
    """Send the file `mine` to the neighbour while the source's arrives as `copy`; its hash.

    All ranks send and receive the same number of blocks or fewer, in order. Raises OSError.
    """
    out, into = aligned(BLOCK), aligned(BLOCK)
    target, descriptor = _Copy(copy, copy_bytes), os.open(mine, os.O_RDONLY | os.O_CLOEXEC)
    try:
        for begin in range(0, max(num_bytes, copy_bytes), BLOCK):
            count, incoming = min(BLOCK, num_bytes - begin), min(BLOCK, copy_bytes - begin)
            works = []
            if incoming > 0:
                part = into[:incoming]
                works.append(torch.distributed.irecv(part, nodes.source, group=nodes.lane))
            if count > 0:
                read_at(descriptor, begin, memoryview(out.numpy())[:count])
                part = out[:count]
                works.append(torch.distributed.isend(part, nodes.neighbour, group=nodes.lane))
            for work in works:
                work.wait()
            if incoming > 0:
                target.add(memoryview(into.numpy()), incoming)
    finally:
        os.close(descriptor)
    return target.finish()


@dataclass
class SpreadSave(Save):
    """A save whose files lie on several nodes; `nodes` says where this rank is."""

    nodes: Nodes | None = None

    def _together(self, action: Callable[[], T]) -> list[T]:
        """What `action` gave on every rank, in rank order. Raises this rank's error, or FailedThere
        where only others failed; either way all ranks have been told.
        """
        value, error = None, None
        try:
            value = action()
        except Exception as caught:  # told to all, then raised
            error = caught
        told = self.nodes.gather((error and self._fatal(error).what, value))
        if error is not None:
            raise error
        failed = [what for what, _ in told if what]
        if failed:
            raise FailedThere(failed[0])
        return [given for _, given in told]

    def _run(self) -> None:
        path = self.order.writing / tensor_file.file_name(self.rank)
        copy = self.order.writing / tensor_file.file_name(self.nodes.source)
        written = self._together(lambda: writer.write_image(self.image, path))
        expected = written[self.nodes.source]

        def exchange() -> None:
            sizes = written[self.rank].num_bytes, expected.num_bytes
            if swap(path, sizes[0], copy, sizes[1], self.nodes) != expected:
                raise Damaged("checkpoint is damaged: it changed on the way here", path=copy)

        self._together(exchange)
        opened: list[tuple[Path, int, FileHash]] = []

        def open_both() -> None:
            for file, hash_ in ((path, written[self.rank]), (copy, expected)):
                opened.append((file, writer.open_written(file, hash_), hash_))

        try:
            self._together(open_both)
            self._publish_everywhere(written)
            self.phase = DURABLE
            self.changed.set()
            self._together(lambda: [writer.read_back(*entry) for entry in opened])
        finally:
            for _, descriptor, _ in opened:
                os.close(descriptor)
        self._settle_everywhere()
        self.phase = VERIFIED

    def _publish_everywhere(self, written: list[FileHash]) -> None:
        def text() -> bytes | None:
            if self.rank != 0:
                return None
            self.order.check_lease()
            return self.describe(written)

        manifest_text = self._together(text)[0]

        def publish() -> None:
            if self.nodes.is_leader:
                where = self.order.writing, self.order.directory
                folder.publish(*where, self.order.step, manifest_text)

        self._together(publish)
        self.note("durable")

    def _settle_everywhere(self) -> None:
        self.note("verified")
        gone = self._together(
            lambda: self.order.prune(self.order.step) if self.nodes.is_leader else []
        )
        for step in sorted({step for of_node in gone for step in of_node}):
            self.note("pruned", of=step)

    def _fail(self, error: BaseException) -> None:
        """All ranks come here together; each node's leader clears its folder."""
        self.is_elsewhere = isinstance(error, (FailedThere, FailedElsewhere))
        if isinstance(error, RuntimeError):
            error = Failure(f"the other ranks' checkpoint writers are gone: {error}"[:300])
        self.note("failed", error=str(self._fatal(error)))
        if self.nodes.is_leader:
            shutil.rmtree(self.order.writing, ignore_errors=True)
            if self.phase == DURABLE:
                quietly(lambda: folder.remove_step(self.order.directory, self.order.step))
        self.error = self._fatal(error)
