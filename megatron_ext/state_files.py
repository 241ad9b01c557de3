"""Small files of a run, which a crash may have torn and a person may have exchanged.

A pipe, a socket or a folder in the place of one is an OSError at once, never a wait; any bytes are
tolerated; what is replaced or cut is the old file or the new one at every moment.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path

LONGEST_LINE = 64 << 20
"""Bytes of a line that `cut_lines` looks at; a longer one is nobody's record."""
_KINDS = {stat.S_IFIFO: "a pipe", stat.S_IFDIR: "a folder", stat.S_IFSOCK: "a socket"}


def opener(path: str | os.PathLike[str], flags: int) -> int:
    """For `open(..., opener=opener)`: a regular file, or a device for who only writes.

    Raises OSError (EINVAL) for anything else: it might keep its reader or writer waiting.
    """
    descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    mode = os.fstat(descriptor).st_mode
    only_writes = flags & os.O_ACCMODE == os.O_WRONLY
    if stat.S_ISREG(mode) or (only_writes and stat.S_ISCHR(mode)):
        return descriptor
    os.close(descriptor)
    kind = _KINDS.get(stat.S_IFMT(mode), "a device")
    raise OSError(errno.EINVAL, f"is {kind}, not a regular file", os.fspath(path))


def read_bytes(path: str | os.PathLike[str], at_most: int = -1) -> bytes:
    """The first `at_most` bytes of a regular file, all by default. Raises OSError."""
    with open(path, "rb", opener=opener) as file:
        return file.read(at_most)


def read_text(path: str | os.PathLike[str], at_most: int = -1) -> str:
    """The same as text; bytes that are no UTF-8 become replacement characters. Raises OSError."""
    return read_bytes(path, at_most).decode("utf-8", errors="replace")


def replace_text(path: Path, text: str) -> None:
    """The whole new text or the old file; whatever stood there was no folder. Raises OSError."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def cut_lines(path: Path, keeps: Callable[[bytes], bool]) -> None:
    """Forget the lines that `keeps` refuses; a file that is not there stays so. Raises OSError.

    Where the kept lines are the first ones, the file is cut at an offset, else written anew and
    renamed: killed at any moment, it still holds every line that is kept.
    """
    try:
        file = open(path, "rb", opener=opener)
    except FileNotFoundError:
        return
    with file:
        end, has_later, is_torn = 0, False, False
        while line := file.readline(LONGEST_LINE):
            if not keeps(line):
                continue
            has_later = has_later or end != file.tell() - len(line)
            end, is_torn = file.tell(), not line.endswith(b"\n")
        size = os.fstat(file.fileno()).st_size
        if has_later:
            file.seek(0)
            _write_kept(path, file, keeps)
            return
    if end < size:
        os.truncate(path, end)
    if is_torn:
        with open(path, "ab", opener=opener) as file:
            file.write(b"\n")


def _write_kept(path: Path, file, keeps: Callable[[bytes], bool]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as new:
            while line := file.readline(LONGEST_LINE):
                if keeps(line):
                    new.write(line if line.endswith(b"\n") else line + b"\n")
            new.flush()
            os.fsync(new.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
