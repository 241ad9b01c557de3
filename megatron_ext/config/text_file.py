"""The text of a file that a flag names, without waiting and without end: regular files only.

Every rank reads the flags' files by itself, so a pipe, which can be read once, would give the first
reader a run and the others another one.
"""

from __future__ import annotations

import os
import stat

MOST_BYTES = 16 * 2**20
"""Longest file that is read."""


def read_text(path: str) -> str:
    """The file as text.

    Raises:
        ValueError: with the reason, for a message.
    """
    try:
        with open(path, "rb", opener=_opener) as stream:
            return stream.read(MOST_BYTES).decode("utf-8")
    except UnicodeDecodeError:
        raise ValueError("is not UTF-8 text") from None
    except OSError as error:
        raise ValueError(error.strerror or str(error)) from None


def _opener(path: str, flags: int) -> int:
    """Opens a regular file of at most `MOST_BYTES`; what would wait is not waited for."""
    file = os.open(path, flags | os.O_NONBLOCK)
    status = os.fstat(file)
    if stat.S_ISREG(status.st_mode) and status.st_size <= MOST_BYTES:
        return file
    os.close(file)
    if stat.S_ISREG(status.st_mode):
        raise ValueError(f"has {status.st_size} bytes, {MOST_BYTES} at most")
    raise ValueError(f"is {_kind(status.st_mode)}, not a file that every rank can read")


def _kind(mode: int) -> str:
    kinds = {stat.S_IFIFO: "a pipe", stat.S_IFDIR: "a folder", stat.S_IFSOCK: "a socket"}
    return kinds.get(stat.S_IFMT(mode), "a device")
