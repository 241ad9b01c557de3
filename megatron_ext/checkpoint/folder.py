"""The checkpoint folder: names, complete and incomplete, and the moves that make a checkpoint
appear whole.

A step is written under `.writing_step_00000100_<id>` and renamed when every rank's file is on disk
and the manifest lists it; `latest` follows by atomic replacement. So a folder named `step_...` was
complete once, and a crash leaves the previous one untouched. All changes go through `os`, one call
each, so that a test can record them and replay every state that a crash may leave.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import stat
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from megatron_ext.checkpoint.record import MANIFEST
from megatron_ext.errors import ConfigError, DiskError, words_of
from megatron_ext.state_files import read_text

T = TypeVar("T")
LATEST = "latest"
MEGATRON_LATEST = "latest_checkpointed_iteration.txt"
_STEP = re.compile(r"step_(\d{8,18})")
_REPLACED = re.compile(r"(?:\.replaced_)?step_(\d{8,18})(?:_[0-9a-f]+)?")
_UNFINISHED = re.compile(r"\.(writing|replaced|pruned|reports)_step_\d{8,18}_[0-9a-f]+")
_HEADROOM = 1.1  # file headers, manifest, and somebody else's files


def step_name(step: int) -> str:
    """The folder of a step, sorted by name as by number."""
    return f"step_{step:08d}"


def disk_error(error: OSError, path: Path, num_bytes: int | None = None) -> DiskError:
    """The one line for a failed write, with what was needed and what is free where space is the
    reason.
    """
    where = Path(error.filename) if isinstance(error.filename, str) else path
    what = f"cannot write the checkpoint: {words_of(error)}"
    if error.errno == errno.EFBIG:
        return DiskError(what, do="raise the limit (ulimit -f unlimited)", path=where)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        need = "" if num_bytes is None else f"need {num_bytes} bytes, "
        what += f" ({need}have {free_bytes(path)} bytes)"
    return DiskError(what, do="free space, or --save a folder that can be written", path=where)


def on_disk(path: Path, action: Callable[[], T]) -> T:
    """What `action` returns. Raises DiskError for its OSError."""
    try:
        return action()
    except OSError as error:
        raise disk_error(error, path) from error


def free_bytes(path: Path) -> int:
    """Bytes that this user may still write on the file system of `path` or of its nearest existing
    parent.
    """
    while not path.exists() and path != path.parent:
        path = path.parent
    return shutil.disk_usage(path).free


def check_space(path: Path, num_bytes: int) -> None:
    """Refuse a save that cannot fit, before a byte is written."""
    need, have = int(num_bytes * _HEADROOM), free_bytes(path)
    if have < need:
        raise DiskError(
            f"no space for the checkpoint: need {need} bytes, have {have} bytes",
            do="free space, or --save another folder",
            path=path,
        )


def sync(path: Path) -> None:
    """Make a file's bytes, or a folder's names, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_new(path: Path, data: bytes) -> None:
    """A new file with its bytes on disk (its name is durable when its folder is synced)."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(path, flags, 0o666)
    try:
        view = memoryview(data)
        while len(view):
            view = view[os.write(descriptor, view) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, text: str) -> None:
    """Replace a small file as a whole: readers see the old or the new text."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        write_new(temporary, text.encode())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def begin(directory: Path, step: int, identity: str | None = None) -> Path:
    """A new empty folder for a step that is being written."""
    path = directory / f".writing_{step_name(step)}_{identity or uuid.uuid4().hex[:8]}"
    directory.mkdir(parents=True, exist_ok=True)
    os.mkdir(path)
    return path


def publish(writing: Path, directory: Path, step: int, manifest: bytes) -> Path:
    """Add the manifest to the files of all ranks, which are on disk already, give the folder its
    name, and point `latest` at it.

    A complete checkpoint of the same step (the run went back and came here again) is moved away
    first and deleted last.
    """
    write_new(writing / MANIFEST, manifest)
    sync(writing)
    final = directory / step_name(step)
    replaced = None
    if final.exists():
        replaced = directory / f".replaced_{final.name}_{uuid.uuid4().hex[:8]}"
        os.rename(final, replaced)
    os.rename(writing, final)
    sync(directory)
    point_at(directory, step)
    if replaced is not None:
        shutil.rmtree(replaced, ignore_errors=True)
    return final


def point_at(directory: Path, step: int) -> None:
    """Let `latest`, and Megatron-LM's file for it, name this step."""
    write_atomically(directory / LATEST, step_name(step) + "\n")
    write_atomically(directory / MEGATRON_LATEST, f"{step}\n")


def remove_unfinished(directory: Path) -> list[str]:
    """Delete what killed writers left, and give back a step whose replacement did not come. Only
    for the holder of the lease.
    """
    names = [path.name for path in directory.iterdir() if _UNFINISHED.fullmatch(path.name)]
    for name in names:
        final = directory / name.removeprefix(".replaced_").rpartition("_")[0]
        if name.startswith(".replaced_") and not final.exists():
            os.rename(directory / name, final)
        else:
            shutil.rmtree(directory / name, ignore_errors=True)
    for leftover in directory.glob(f".{LATEST}*.????????"):
        leftover.unlink(missing_ok=True)
    return names


def remove_step(directory: Path, step: int) -> None:
    """Take the name away first: a half-deleted folder is no checkpoint."""
    gone = directory / f".pruned_{step_name(step)}_{uuid.uuid4().hex[:8]}"
    os.rename(directory / step_name(step), gone)
    sync(directory)
    shutil.rmtree(gone, ignore_errors=True)


def quarantine(directory: Path, step: int) -> Path:
    """Move a damaged step aside, to be looked at; it is no candidate any more."""
    bad = directory / f"{step_name(step)}.bad-{uuid.uuid4().hex[:8]}"
    os.rename(directory / step_name(step), bad)
    sync(directory)
    return bad


def steps(directory: Path, replaced: bool = False) -> list[int]:
    """The steps that have a folder here, newest first; with `replaced` also those whose old folder
    a crash has left between its two names: `remove_unfinished` gives them back.
    """
    if not directory.is_dir():
        return []
    pattern = _REPLACED if replaced else _STEP
    found = (pattern.fullmatch(path.name) for path in directory.iterdir() if path.is_dir())
    return sorted((int(match[1]) for match in found if match), reverse=True)


def named(path: Path) -> tuple[Path, int | None]:
    """(folder of checkpoints, step or None) for a folder that a person would name: RUN,
    RUN/checkpoints or RUN/checkpoints/step_00000100. Anything else is taken as it is.
    """
    step = _STEP.fullmatch(path.absolute().name)
    if step and path.is_dir() and not steps(path):
        return path.absolute().parent, int(step[1])
    inside = path / "checkpoints"
    if not steps(path) and latest_step(path) is None and inside.is_dir():
        return inside, None
    return path, None


def named_step(path: Path, asked: int | None, flag: str = "--ckpt-step") -> tuple[Path, int | None]:
    """`named`, with the step that a flag asks for. Raises ConfigError where both say another."""
    directory, step = named(path)
    if step is not None and asked not in (None, step):
        raise ConfigError(
            f"{flag} {asked}, but {path} is step {step}",
            do=f"leave {flag} out, or name {directory}",
        )
    return directory, asked if step is None else step


def latest_step(directory: Path) -> int | None:
    """What `latest` says; None if it is missing or not a step name."""
    try:
        text = read_text(directory / LATEST, 64).strip()
    except OSError:
        return None
    match = _STEP.fullmatch(text)
    return int(match[1]) if match else None


def gate(directory: Path) -> str | None:
    """Why the owner or the mode of a folder is suspicious, in words; None where it is not."""
    info = directory.stat()
    if info.st_uid not in (os.geteuid(), 0):
        return f"belongs to user {info.st_uid}, this is user {os.geteuid()}"
    if info.st_mode & stat.S_IWOTH and not info.st_mode & stat.S_ISVTX:
        return f"is writable by everybody (mode {stat.S_IMODE(info.st_mode):o})"
    return None
