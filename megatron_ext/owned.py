"""Whether a file that we would load could have been put there by somebody else.

A compiled library is executed, byte code is run, a checkpoint in /dev/shm becomes the model, and
the name of each can be guessed. So a file counts only where it and its folder belong to this user
(or to root, where an administrator installs them), nobody else may write them, and no link leads
there. Its owner is looked at through the descriptor that is then read: a file that is exchanged in
between is not the one that is read.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Collection
from pathlib import Path

GROUP_AND_OTHERS = stat.S_IWGRP | stat.S_IWOTH


class ForeignFile(Exception):  # noqa: N818 - whose file it is, one line
    """Why a file or a folder is not trusted."""


def why_foreign(
    status: os.stat_result, owners: Collection[int] = (), writers: int = GROUP_AND_OTHERS
) -> str:
    """In words, "" where it is ours.

    Args:
        owners: users beside this one to whom it may belong.
        writers: bits of the mode that must not be set.
    """
    if stat.S_ISLNK(status.st_mode):
        return "is a link"
    if status.st_uid != os.geteuid() and status.st_uid not in owners:
        return f"belongs to user {status.st_uid}, this is user {os.geteuid()}"
    if status.st_mode & writers:
        return f"may be written by others (mode {stat.S_IMODE(status.st_mode):o})"
    return ""


def require_own_folder(path: Path, writers: int = GROUP_AND_OTHERS) -> None:
    """Raises ForeignFile, OSError where it is not there."""
    status = path.lstat()
    why = why_foreign(status, writers=writers)
    if not why and not stat.S_ISDIR(status.st_mode):
        why = "is no folder"
    if why:
        raise ForeignFile(f"{path} {why}")


def read_own(path: Path, owners: Collection[int] = ()) -> tuple[int, bytes]:
    """(descriptor, content) of a regular file. Raises ForeignFile, OSError where it is not there.

    The caller closes the descriptor.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if path.is_symlink():
            raise ForeignFile(f"{path} is a link") from error
        raise
    try:
        status = os.fstat(descriptor)
        why = why_foreign(status, owners)
        if not why and not stat.S_ISREG(status.st_mode):
            why = "is no regular file"
        if why:
            raise ForeignFile(f"{path} {why}")
        with open(descriptor, "rb", closefd=False) as file:
            return descriptor, file.read()
    except BaseException:
        os.close(descriptor)
        raise
