"""The bytes of a file, copied block by block out of the tensors of a run while it goes on.

Weights and optimizer states do not change between two optimizer steps, so they are copied by a
thread during the next forward and backward (lazily, as in DataStates-LLM, arXiv 2406.10707) and
only `copied` has to be waited for before the next update. The copy is the file itself: headers and
pieces at their offsets in aligned blocks, which another thread hashes and writes as they are.

    tensors --copy thread--> blocks of the pool --write thread--> disk --> back to the pool
"""

from __future__ import annotations

import contextlib
import mmap
import queue
import threading
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

BLOCK = 16 << 20
"""Bytes of a block of host memory and of one write: writes of 4 MiB past the page cache reached a
half of what writes of 16 MiB do (ext4 on a virtual disk).
"""
Source = Tensor | Callable[[], Tensor]


def aligned(num_bytes: int) -> Tensor:
    """Host memory on page boundaries, of huge pages where there are some."""
    memory = mmap.mmap(-1, num_bytes)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without huge pages: ordinary ones do
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)


class Pool:
    """Page-aligned blocks of host memory, kept from save to save; pinned where there is CUDA.

    `limit_bytes` bounds all blocks together (at least two); None: as large as a save.
    """

    def __init__(self, limit_bytes: int | None = None, pinned: bool = False) -> None:
        self._most = None if limit_bytes is None else max(2, limit_bytes // BLOCK)
        self._pinned = pinned
        self._made = 0
        self._free: queue.SimpleQueue[Tensor] = queue.SimpleQueue()

    @property
    def num_bytes(self) -> int:
        """Host memory taken so far."""
        return self._made * BLOCK

    def reserve(self, num_blocks: int) -> None:
        """Grow to this many blocks, or to the limit. Memory is touched when it is first filled."""
        wanted = num_blocks if self._most is None else min(num_blocks, self._most)
        missing = wanted - self._made
        if missing <= 0:
            return
        for block in self._arena(missing * BLOCK).split(BLOCK):
            self._free.put(block)
        self._made = wanted

    def _arena(self, num_bytes: int) -> Tensor:
        if self._pinned:
            return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
        return aligned(num_bytes)

    def take(self, stop: threading.Event) -> Tensor:
        """A free block; waits for one. Raises Stopped."""
        while True:
            try:
                return self._free.get(timeout=0.1)
            except queue.Empty:
                if stop.is_set():
                    raise Stopped from None

    def give(self, block: Tensor) -> None:
        """A block that has been written."""
        self._free.put(block)


class Stopped(Exception):  # noqa: N818 - no error: somebody ended the save
    """The save is over: the other thread failed, or the run ends."""


def segments(
    places: Sequence[tuple[int, int]], header: int, num_bytes: int
) -> Iterator[list[tuple[int, int, int, int]]]:
    """For each block in order: (piece, first byte in it, first byte in the block, bytes).

    `places`: (offset in the file, bytes) of each piece, ascending without gaps from `header` on;
    piece -1 is the header.
    """
    pieces = [(-1, 0, header), *((i, start, size) for i, (start, size) in enumerate(places))]
    cursor = 0
    for begin in range(0, num_bytes, BLOCK):
        stop, found = min(begin + BLOCK, num_bytes), []
        while cursor < len(pieces):
            piece, start, size = pieces[cursor]
            low, high = max(start, begin), min(start + size, stop)
            if low < high:
                found.append((piece, low - start, low - begin, high - low))
            if start + size > stop:
                break
            cursor += 1
        yield found


def as_bytes(tensor: Tensor) -> Tensor:
    """A tensor's elements as one row of bytes, over its storage where they are contiguous."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


class Image:
    """A file to be written: its header, then pieces at ascending places.

    Args:
        header: the first bytes.
        pieces: (bytes, source) in file order; a source is a tensor, or a function that makes it
            when its turn comes (then at most one is in memory).
        pool: where blocks come from.
    """

    def __init__(self, header: bytes, pieces: Sequence[tuple[int, Source]], pool: Pool) -> None:
        self.pool = pool
        self.num_bytes = len(header) + sum(size for size, _ in pieces)
        self.num_blocks = -(-self.num_bytes // BLOCK)
        self.copied = threading.Event()
        self.stop = threading.Event()
        self.error: BaseException | None = None
        self._header = torch.frombuffer(bytearray(header), dtype=torch.uint8)
        self._sources = [source for _, source in pieces]
        self._places, position = [], len(header)
        for size, _ in pieces:
            self._places.append((position, size))
            position += size
        self._full: queue.SimpleQueue = queue.SimpleQueue()
        self._is_empty = False
        self._stream = None
        if pool._pinned:  # copies wait for what the caller's stream has still to compute
            self._stream = torch.cuda.Stream()
            self._stream.wait_stream(torch.cuda.current_stream())
        pool.reserve(self.num_blocks)

    def copy(self, when_done: Callable[[], None] = lambda: None) -> None:
        """Fill block after block, then call `when_done`; never raises: the error goes to whoever
        writes.
        """
        try:
            if self._stream is None:
                self._copy()
            else:
                with torch.cuda.stream(self._stream):
                    self._copy()
            when_done()
        except BaseException as error:
            self.error = error
        self._sources = []
        self._full.put(None)
        self.copied.set()

    def _copy(self) -> None:
        current, data = -1, self._header
        for parts in segments(self._places, len(self._header), self.num_bytes):
            block, filled = self.pool.take(self.stop), 0
            for piece, start, where, count in parts:
                if piece != current:
                    source = self._sources[piece]
                    data = as_bytes(source if torch.is_tensor(source) else source())
                    current = piece
                block[where : where + count].copy_(data[start : start + count], non_blocking=True)
                filled = where + count
            if self._stream is not None:
                self._stream.synchronize()
            self._full.put((block, filled))

    def blocks(self) -> Iterator[tuple[Tensor, int]]:
        """(block, bytes filled) in order, as they become ready; whoever takes one gives it back.
        Raises what the copy raised.
        """
        while (entry := self._full.get()) is not None:
            yield entry
        self._is_empty = True
        if self.error is not None:
            raise self.error

    def drop(self) -> None:
        """End the copy and give every block back."""
        self.stop.set()
        while not self._is_empty:
            entry = self._full.get()
            if entry is None:
                self._is_empty = True
            else:
                self.pool.give(entry[0])
