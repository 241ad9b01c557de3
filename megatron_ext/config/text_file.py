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
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        raise ValueError(getattr(error, "strerror", None) or str(error)) from None
    with os.fdopen(file, "rb") as stream:
        status = os.fstat(file)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"is {_kind(status.st_mode)}, not a file that every rank can read")
        if status.st_size > MOST_BYTES:
            raise ValueError(f"has {status.st_size} bytes, {MOST_BYTES} at most")
        try:
            return stream.read(MOST_BYTES + 1).decode("utf-8")
        except OSError as error:
            raise ValueError(error.strerror or str(error)) from None
        except UnicodeDecodeError:
            raise ValueError("is not UTF-8 text") from None


def _kind(mode: int) -> str:
    kinds = {stat.S_IFIFO: "a pipe", stat.S_IFDIR: "a folder", stat.S_IFSOCK: "a socket"}
    return kinds.get(stat.S_IFMT(mode), "a device")
