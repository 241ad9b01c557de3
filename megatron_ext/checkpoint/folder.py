"""The checkpoint folder: names, complete and incomplete, and the moves that make a checkpoint
appear whole.

A step is written under `.writing_step_00000100_<id>` and renamed when every rank's file is on disk;
`latest` follows by atomic replacement. So a folder named `step_...` was complete once, and a crash
leaves the previous one untouched. `state.json` lists every file with its size: what was cut or
removed later is seen before anything is read.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import time
import uuid
from pathlib import Path
from typing import Any

from megatron_ext.errors import DataError, DiskError

LATEST = "latest"
MEGATRON_LATEST = "latest_checkpointed_iteration.txt"
LEDGER = "ledger.jsonl"
RECORD = "state.json"
RECORD_VERSION = 1
_STEP = re.compile(r"step_(\d{8,})")
_UNFINISHED = re.compile(r"\.(writing|replaced)_step_\d{8,}_[0-9a-f]+")
_HEADROOM = 1.05  # file headers, metadata


def step_name(step: int) -> str:
    """The folder of a step, sorted by name as by number."""
    return f"step_{step:08d}"


def disk_error(error: OSError, path: Path, num_bytes: int | None = None) -> DiskError:
    """The one line for a failed write, with what was needed and what is free where space is the
    reason.
    """
    where = Path(error.filename) if isinstance(error.filename, str) else path
    what = f"cannot write the checkpoint: {os.strerror(error.errno) if error.errno else error}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        need = "" if num_bytes is None else f"need {num_bytes} bytes, "
        what += f" ({need}have {free_bytes(path)} bytes)"
    return DiskError(what, do="free space, or --save a folder that can be written", path=where)


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


def write_atomically(path: Path, text: str) -> None:
    """Replace a small file as a whole: readers see the old or the new text."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    with open(temporary, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync(path.parent)


def begin(directory: Path, step: int) -> Path:
    """A new empty folder for a step that is being written."""
    path = directory / f".writing_{step_name(step)}_{uuid.uuid4().hex[:8]}"
    path.mkdir(parents=True)
    return path


def finish(writing: Path, directory: Path, record: dict[str, Any]) -> Path:
    """Write the record, make everything durable, give the folder its name, and point `latest` at
    it.

    A complete checkpoint of the same step (the run went back and came here again) is moved away
    first and deleted last.
    """
    files = sorted(writing.iterdir())
    for file in files:
        sync(file)
    record["files"] = {file.name: {"bytes": file.stat().st_size} for file in files}
    write_atomically(writing / RECORD, json.dumps(record, indent=1))
    final = directory / step_name(record["step"])
    replaced = None
    if final.exists():
        replaced = directory / f".replaced_{final.name}_{uuid.uuid4().hex[:8]}"
        os.rename(final, replaced)
    os.rename(writing, final)
    sync(directory)
    write_atomically(directory / LATEST, final.name + "\n")
    write_atomically(directory / MEGATRON_LATEST, f"{record['step']}\n")
    if replaced is not None:
        shutil.rmtree(replaced, ignore_errors=True)
    return final


def remove_unfinished(directory: Path) -> list[str]:
    """Delete what killed writers left. Only for the holder of the lease."""
    names = [path.name for path in directory.iterdir() if _UNFINISHED.fullmatch(path.name)]
    for name in names:
        shutil.rmtree(directory / name, ignore_errors=True)
    return names


def steps(directory: Path) -> list[int]:
    """The steps that have a folder here, newest first."""
    if not directory.is_dir():
        return []
    found = (_STEP.fullmatch(path.name) for path in directory.iterdir() if path.is_dir())
    return sorted((int(match[1]) for match in found if match), reverse=True)


def latest_step(directory: Path) -> int | None:
    """What `latest` says; None if it is missing or not a step name."""
    try:
        text = (directory / LATEST).read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None
    match = _STEP.fullmatch(text)
    return int(match[1]) if match else None


def read_record(path: Path) -> dict[str, Any]:
    """`state.json` of a complete checkpoint. Raises DataError where it, or a file that it lists, is
    missing or cut.
    """
    try:
        record = json.loads((path / RECORD).read_text())
        version = record["version"]
        files = {name: entry["bytes"] for name, entry in record["files"].items()}
        sizes = {name: (path / Path(name).name).stat().st_size for name in files}
    except FileNotFoundError as error:
        name = Path(error.filename).name
        raise DataError(f"checkpoint is incomplete: {name} is missing", path=path) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"checkpoint record cannot be read: {error}", path=path / RECORD) from error
    if version > RECORD_VERSION:
        raise DataError(
            f"checkpoint is of version {version}, this program reads up to {RECORD_VERSION}",
            path=path,
        )
    for name, size in files.items():
        if sizes[name] != size:
            raise DataError(
                f"checkpoint is damaged: {name} has {sizes[name]} bytes, was written with {size}",
                path=path,
            )
    return record


class Ledger:
    """`ledger.jsonl`: one line for each thing that happened to a checkpoint; appended by rank 0."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / LEDGER

    def add(self, event: str, step: int, **values: Any) -> None:
        """Append one line; `event` is requested, staged, durable or failed."""
        line = {"time": round(time.time(), 3), "event": event, "step": step, **values}
        with open(self.path, "a") as file:
            file.write(json.dumps(line) + "\n")
