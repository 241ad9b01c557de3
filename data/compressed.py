"""Byte streams of plain, gzip and zstandard files; a truncated or damaged stream is an error, never
a short file.
"""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from megatron_ext.errors import ConfigError, DataError

CHUNK_BYTES = 1 << 20
ZSTD_INPUT_BYTES = 1 << 8
"""Given to zstandard at once: a block of 4 bytes may unpack to 128 KiB, so this to 8 MiB."""
ZSTD_LARGEST_WINDOW = 1 << 31
TOO_LARGE = object()
"""In the place of a document that is larger than the limit."""


def require_zstandard():
    """The module, or the line that installs it."""
    try:
        import zstandard
    except ImportError:
        raise ConfigError(
            "a .zst input needs the package zstandard", do="pip install zstandard==0.25.0"
        ) from None
    return zstandard


class _ChunkStream(io.RawIOBase):
    """A readable stream over an iterator of byte chunks."""

    def __init__(self, chunks: Iterator[bytes]):
        self._chunks = chunks
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._rest:
            chunk = next(self._chunks, None)
            if chunk is None:
                return 0
            self._rest = memoryview(chunk)
        size = min(len(buffer), len(self._rest))
        buffer[:size] = self._rest[:size]
        self._rest = self._rest[size:]
        return size


def _zstd_chunks(stream: BinaryIO) -> Iterator[bytes]:
    """Decompressed chunks of all frames.  zstandard's own reader takes a cut frame for the end of
    the file.
    """
    zstandard = require_zstandard()
    decompressor = zstandard.ZstdDecompressor(max_window_size=ZSTD_LARGEST_WINDOW)
    frame = None
    while data := stream.read(ZSTD_INPUT_BYTES):
        while data:
            frame = frame or decompressor.decompressobj()
            yield frame.decompress(data)
            data = b""
            if frame.eof:
                data, frame = frame.unused_data, None
    if frame is not None:
        raise EOFError("the last zstandard frame is cut short")


def is_damage(error: Exception) -> bool:
    """True for what the decompressors raise on a damaged stream."""
    kinds = (EOFError, gzip.BadGzipFile, zlib.error)
    return isinstance(error, kinds) or type(error).__name__ == "ZstdError"


def read_line(stream: BinaryIO, limit: int) -> tuple[bytes | None, int]:
    """(the next line, its bytes); (None, its bytes) where it is longer than ``limit`` without its
    newline: such a line is passed over and never held whole.
    """
    line = stream.readline(limit + 1)
    size = len(line)
    if size <= limit or line.endswith(b"\n"):
        return line, size
    del line
    while part := stream.readline(CHUNK_BYTES):
        size += len(part)
        if part.endswith(b"\n"):
            break
    return None, size


@contextmanager
def open_bytes(path: Path, compression: str) -> Iterator[BinaryIO]:
    """Opens ``path`` for reading bytes; ``compression`` is "", ".gz" or ".zst".

    Raises:
        DataError: the compressed stream is truncated or damaged (raised from the reading code
            inside the block).
    """
    try:
        with open(path, "rb") as raw:
            if compression == ".gz":
                yield gzip.open(raw, "rb")  # type: ignore[misc]
            elif compression == ".zst":
                yield io.BufferedReader(_ChunkStream(_zstd_chunks(raw)), CHUNK_BYTES)  # type: ignore[misc]
            else:
                yield raw
    except Exception as error:
        if isinstance(error, OSError) and not is_damage(error):
            raise DataError(
                f"input cannot be read: {error.strerror}", do="repair it or leave it out", path=path
            ) from error
        if not is_damage(error):
            raise
        raise DataError(
            f"truncated or damaged {compression} file: {error}",
            do="copy the file again or leave it out",
            path=path,
        ) from error
