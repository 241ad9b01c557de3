"""Files that are complete or absent: write to a temporary name, fsync, rename, fsync the folder.

Errors of the disk (full, read-only, quota, I/O) become one `DiskError` naming the path and, where
it can be known, the bytes needed and the bytes free.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from megatron_ext.errors import DiskError, words_of

HASH_CHUNK_BYTES = 1 << 22
DISK_FAULTS = {
    errno.ENOSPC: "No space left",
    errno.EDQUOT: "Disk quota exceeded",
    errno.EROFS: "Read-only file system",
    errno.EACCES: "Permission denied",
    errno.EPERM: "Operation not permitted",
    errno.EIO: "Input/output error",
}


def free_bytes(path: Path) -> int:
    """Bytes that this user may still write at ``path``, or at its nearest existing parent."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return shutil.disk_usage(path).free


@contextmanager
def disk_errors(path: Path, need_bytes: int | None = None) -> Iterator[None]:
    """Turns an OSError while writing ``path`` into a `DiskError` of one line."""
    try:
        yield
    except OSError as error:
        fault = DISK_FAULTS.get(error.errno or 0, words_of(error))
        need = "" if need_bytes is None else f"need {need_bytes} bytes, "
        raise DiskError(
            f"{fault} while writing: {need}have {free_bytes(path)} bytes free",
            do="raise the limit (ulimit -f unlimited)"
            if error.errno == errno.EFBIG
            else "free space or name another folder with write permission",
            path=path,
        ) from error


def require_space(path: Path, need_bytes: int) -> None:
    """Refuses to start a write of ``need_bytes`` that cannot end well."""
    have = free_bytes(path)
    if have < need_bytes:
        raise DiskError(
            f"No space left: need {need_bytes} bytes, have {have} bytes free",
            do="free space or name another folder",
            path=path,
        )


def make_folder(folder: Path) -> None:
    """Creates ``folder`` and proves that it can be written to."""
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".write-probe-{os.getpid()}"
        probe.write_bytes(b"x")
        probe.unlink()


def fsync_folder(folder: Path) -> None:
    """Makes renames inside ``folder`` durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def atomic_file(path: Path, need_bytes: int | None = None) -> Iterator[BinaryIO]:
    """Yields a binary file that becomes ``path`` when the block ends well, and vanishes when it
    does not.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with disk_errors(path, need_bytes):
            with open(temporary, "wb") as stream:
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, path)
            fsync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: object) -> None:
    """Writes ``value`` as indented JSON with sorted keys, atomically."""
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    with atomic_file(path) as stream:
        stream.write(text.encode("utf-8"))


def read_json(path: Path) -> dict | None:
    """The object in ``path``, or None where the file is missing or is not a JSON object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def sha256_of(path: Path) -> str:
    """SHA-256 of a whole file, hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while chunk := stream.read(HASH_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
