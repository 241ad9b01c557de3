"""An image to disk: hashed while it is written, past the page cache where the file system allows.

Large aligned writes with O_DIRECT reach the disk at its own speed and leave the page cache to the
data; where a file system refuses them (EINVAL) the same loop writes through the cache. Both end
with fsync.
"""

from __future__ import annotations

import errno
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from megatron_ext.checkpoint.hashes import FileHash, Hasher, block_size, check_blocks
from megatron_ext.checkpoint.manifest import open_regular
from megatron_ext.checkpoint.staging import Image

PAGE = 4096
_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_DIRECT = getattr(os, "O_DIRECT", 0)


def _open(path: Path) -> tuple[int, bool]:
    """(descriptor of a new file, whether writes must be aligned)."""
    try:
        return os.open(path, _FLAGS | _DIRECT, 0o666), bool(_DIRECT)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        path.unlink(missing_ok=True)
        return os.open(path, _FLAGS, 0o666), False


class NewFile:
    """A new file that takes aligned blocks in order."""

    def __init__(self, path: Path) -> None:
        self.path, self.position = path, 0
        self.descriptor, self.is_direct = _open(path)

    def _through_cache(self) -> None:
        """Some file systems take O_DIRECT when opening and refuse it when writing."""
        os.close(self.descriptor)
        self.descriptor = os.open(self.path, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        self.is_direct = False

    def write(self, data: memoryview) -> None:
        """The next bytes. Raises OSError."""
        while len(data):
            if self.is_direct and (self.position % PAGE or len(data) % PAGE):
                self._through_cache()  # after a short write
            try:
                count = os.pwrite(self.descriptor, data, self.position)
            except OSError as error:
                if error.errno != errno.EINVAL or not self.is_direct:
                    raise
                self._through_cache()
                continue
            data, self.position = data[count:], self.position + count

    def write_padded(self, memory: memoryview, filled: int) -> None:
        """The next `filled` bytes out of a block of whole pages. Raises OSError."""
        padded = -(-filled // PAGE) * PAGE if self.is_direct else filled
        memory[filled:padded] = bytes(padded - filled)
        self.write(memory[:padded])

    def finish(self, num_bytes: int) -> None:
        """Cut the padding off and wait until everything is on the disk."""
        if self.position != num_bytes:
            os.ftruncate(self.descriptor, num_bytes)
        os.fsync(self.descriptor)


def write_image(image: Image, path: Path) -> FileHash:
    """Write and fsync all blocks of an image to a new file; a thread hashes each while the disk
    takes it. Raises OSError and what the copy raised; blocks go back to their pool in any case.
    """
    hasher = Hasher(image.num_bytes)
    file = None
    try:
        file = NewFile(path)
        with ThreadPoolExecutor(1, "hash") as hashing:
            for block, filled in image.blocks():
                memory = memoryview(block.numpy())
                hashed = hashing.submit(hasher.update, memory[:filled])
                try:
                    file.write_padded(memory, filled)
                finally:
                    hashed.result()
                    image.pool.give(block)
        file.finish(image.num_bytes)
    except BaseException:
        image.drop()
        raise
    finally:
        if file is not None:
            os.close(file.descriptor)
    return hasher.finish()


def read_back(path: Path, descriptor: int, expected: FileHash) -> int:
    """Hash a written file again from the disk; returns its bytes. Raises Damaged."""
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    count = check_blocks(descriptor, path, expected)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    return count


def open_written(path: Path, expected: FileHash) -> int:
    """A descriptor that stays valid while the folder gets its name."""
    assert expected.block_bytes == block_size(expected.num_bytes)
    return open_regular(path, expected.num_bytes)
