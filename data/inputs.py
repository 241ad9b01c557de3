"""The files that a run reads - ``.bin``, ``.idx`` and the tokenizer's - as they were when it opened
them, and hashes of what is in them.

A file that is rewritten under a running job gives other losses and no error. So size, time of
change and inode are noted before the files are opened and looked at again whenever the run saves
(`Inputs.check`): no checkpoint of it is written, and the one before is clean.

A checkpoint keeps `Inputs.content`, and a resume compares it. What it promises:

    .idx, tokenizer     every byte (xxh3-128)
    .bin up to 1 GiB    every byte
    .bin above          its size and `BLOCKS` blocks of 16 KiB: the first, the last, and others at
                        places drawn from the size as seed. Another file, or one of which a share
                        s was changed, is found with probability 1 - (1 - s)^1024 at least (0.99
                        for half a percent); --data-hash complete hashes every byte as well

Hashes are kept in the index cache under the files' paths, sizes and times.
"""

from __future__ import annotations

import logging
import os
import random
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from data import scan
from data.cache import IndexCache, key_of
from data.indexed import paths_of
from data.storage import HASH_CHUNK_BYTES
from megatron_ext.errors import DataError

HASHED_WHOLE_BYTES = 1 << 30
BLOCKS, BLOCK_BYTES = 1024, 1 << 14
BY_BLOCKS = f"bin, {BLOCKS} blocks"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stamp:
    """What tells a file from another one of its name, or from itself before it was written to."""

    size: int
    mtime_ns: int
    inode: int

    @classmethod
    def of(cls, path: Path) -> Stamp:
        """Raises OSError."""
        status = path.stat()
        return cls(status.st_size, status.st_mtime_ns, status.st_ino)

    def changes(self, now: Stamp) -> str:
        """What is different now, in words."""
        found = []
        if now.inode != self.inode:
            found.append(f"it is another file (inode {self.inode} -> {now.inode})")
        if now.size != self.size:
            found.append(f"size {self.size} -> {now.size} bytes")
        if now.mtime_ns != self.mtime_ns:
            found.append(f"time of change {_clock(self.mtime_ns)} -> {_clock(now.mtime_ns)}")
        return ", ".join(found)


def _clock(mtime_ns: int) -> str:
    seconds, rest = divmod(mtime_ns, 10**9)
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.localtime(seconds))}.{rest // 10**6:03d}"


@dataclass(frozen=True)
class Inputs:
    """The files of a run: their stamps on this machine, and their content for its checkpoints."""

    stamps: dict[Path, Stamp] = field(default_factory=dict)
    content: dict[str, dict[str, Any]] = field(default_factory=dict)
    """{"data_content": {prefix: hashes}, "tokenizer_content": {file name: hashes}}, plain JSON."""

    def check(self) -> None:
        """Raises DataError for the first file that is not what it was."""
        for path, before in self.stamps.items():
            try:
                what = before.changes(Stamp.of(path))
            except FileNotFoundError:
                what = "it is gone"
            except OSError as error:
                _log.warning("%s cannot be looked at just now: %s", path, error.strerror)
                continue
            if what:
                raise DataError(
                    f"a file that this run reads was changed under it: {what}",
                    do="put the file back and start the same command again: the newest checkpoint "
                    "is from before the change; new data goes under another name",
                    path=path,
                )


def stamped(paths: Iterable[Path]) -> Inputs:
    """The files as they are now, before they are opened; one that is missing is the opener's to
    report.
    """
    return Inputs({path: Stamp.of(path) for path in paths if path.is_file()})


def data_files(prefixes: Iterable[str]) -> list[Path]:
    """Both files of each pair."""
    return [path for prefix in prefixes for path in paths_of(prefix)]


def content_of(
    prefixes: Iterable[str], tokenizer_files: Iterable[Path], cache: IndexCache, complete: bool
) -> dict[str, dict[str, Any]]:
    """`Inputs.content` of pairs that are there. ``complete``: every byte, however large the file
    is.
    """
    data = {prefix: _of_pair(prefix, cache, complete) for prefix in prefixes}
    words = {path.name: {"path": str(path), "hash": hash_of(path)} for path in tokenizer_files}
    return {"data_content": data, "tokenizer_content": words}


def _of_pair(prefix: str, cache: IndexCache, complete: bool) -> dict[str, Any]:
    bin_path, idx_path = paths_of(prefix)
    stamps = [scan.stamp(path) for path in (bin_path, idx_path)]
    key = key_of("content", path=bin_path.resolve(), stamps=stamps, complete=complete)

    def make() -> dict[str, Any]:
        size = bin_path.stat().st_size
        found = {"bytes": size, "idx": hash_of(idx_path)}
        if size > HASHED_WHOLE_BYTES:
            found[BY_BLOCKS] = hash_of_blocks(bin_path)
        if size <= HASHED_WHOLE_BYTES or complete:
            found["bin"] = hash_of(bin_path)
        return found

    cache.note(key, make)
    return {"path": prefix, **(cache.read_note(key) or make())}


def hash_of(path: Path) -> str:
    """xxh3-128 of every byte."""
    digest = xxhash.xxh3_128()
    with open(path, "rb") as stream:
        while chunk := stream.read(HASH_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def hash_of_blocks(path: Path) -> str:
    """xxh3-128 of `BLOCKS` blocks of a file that is larger than they are."""
    digest = xxhash.xxh3_128()
    with open(path, "rb") as stream:
        last = os.fstat(stream.fileno()).st_size - BLOCK_BYTES
        draw = random.Random(last + BLOCK_BYTES)  # the size
        for place in [0, *sorted(draw.randrange(last) for _ in range(BLOCKS - 2)), last]:
            stream.seek(place)
            digest.update(stream.read(BLOCK_BYTES))
    return digest.hexdigest()
