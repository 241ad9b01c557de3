"""`manifest.json`: what a checkpoint holds, and the hash of every byte of it.

    {"hash": "<of all bytes after this line>",
    "manifest": {"format": "pretrain_moe", "version": 2, "step": 100, "id": ..., "layout": ...,
                 "progress": ..., "scheduler": ..., "optimizer": ..., "run": ..., "model": ...,
                 "files": {"rank_00000.safetensors": {"bytes", "hash", "block_bytes", "blocks"}},
                 "tensors": {name: {"dtype", "shape", "pieces": [[file, offset, place, size]]}}}}

It is JSON and is not believed: names match a pattern, files are regular and of the written size,
every piece lies inside its file and its tensor, pieces fill each tensor exactly once, no byte of a
file belongs to two pieces. All of it is checked before memory is taken for any tensor.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ext.checkpoint.hashes import Damaged, FileHash, text_hash
from megatron_ext.checkpoint.patience import patiently
from megatron_ext.checkpoint.record import MANIFEST
from megatron_ext.checkpoint.schema import check_record
from megatron_ext.checkpoint.spots import Spot, check_whole
from megatron_ext.checkpoint.tensor_file import DTYPES, TORCH_DTYPES
from megatron_ext.errors import DataError

OLD_RECORD = "state.json"
FORMAT, VERSION = "pretrain_moe", 2
SIZE_LIMIT = 512 << 20
_STEP_FOLDER = re.compile(r"step_(\d{8,18})")
_FILE = re.compile(r"rank_\d{5,8}\.safetensors")
_MOST_DIMS, _MOST_ELEMENTS, _LONGEST_NAME = 16, 1 << 62, 1024


@dataclass(frozen=True)
class Stored:
    """One piece on disk."""

    spot: Spot
    file: str
    offset: int


@dataclass(frozen=True)
class Manifest:
    """A manifest that has been checked. `record`: everything but files and tensors."""

    path: Path
    record: dict[str, Any]
    files: dict[str, FileHash]
    tensors: dict[str, list[Stored]]

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensor files."""
        return sum(entry.num_bytes for entry in self.files.values())

    def open(self, name: str) -> int:
        """A descriptor of one of its files: regular, no link, of the size that was written."""
        return open_regular(self.path / name, self.files[name].num_bytes)


def open_regular(path: Path, num_bytes: int | None = None) -> int:
    """Open for reading. Raises Damaged for a missing file, a link, a device, another size;
    DiskError where the disk refuses.
    """
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        descriptor = patiently(lambda: os.open(path, flags), path)
    except FileNotFoundError as error:
        raise Damaged(f"checkpoint is incomplete: {path.name} is missing", path=path) from error
    except OSError as error:  # a link
        what = f"checkpoint cannot be read: {path.name}: {os.strerror(error.errno)}"
        raise Damaged(what, path=path) from error
    info = os.fstat(descriptor)
    problem = None
    if not stat.S_ISREG(info.st_mode):
        problem = "is not a regular file"
    elif num_bytes is not None and info.st_size != num_bytes:
        problem = f"has {info.st_size} bytes, was written with {num_bytes}"
    if problem is None:
        return descriptor
    os.close(descriptor)
    raise Damaged(f"checkpoint is damaged: {path.name} {problem}", path=path)


def describe(
    record: Mapping[str, Any],
    files: Mapping[str, FileHash],
    pieces: Iterator[tuple[Spot, str, int]],
) -> bytes:
    """The bytes of a manifest from its parts."""
    names = sorted(files)
    numbers = {name: index for index, name in enumerate(names)}
    tensors: dict[str, dict] = {}
    for spot, file, offset in pieces:
        entry = tensors.setdefault(
            spot.name, {"dtype": DTYPES[spot.dtype], "shape": list(spot.shape), "pieces": []}
        )
        entry["pieces"].append([numbers[file], offset, list(spot.place), list(spot.size)])
    body = {
        "format": FORMAT,
        "version": VERSION,
        **record,
        "files": {name: files[name].to_json() for name in names},
        "tensors": tensors,
    }
    text = f'"manifest": {json.dumps(body)}}}\n'.encode()
    return f'{{"hash": "{text_hash(text)}",\n'.encode() + text


def read(path: Path, may_lack_files: bool = False) -> Manifest:
    """Read and check the manifest of a step's folder. Raises Damaged, or DataError where it is of
    another version. `may_lack_files`: other nodes hold files
    of it, and who opens one checks its size.
    """
    if patiently(lambda: path.is_symlink() or not path.is_dir(), path):
        raise DataError("a checkpoint must be a folder and no symbolic link", path=path)
    names = patiently(lambda: os.listdir(path), path)
    if MANIFEST not in names and OLD_RECORD in names:
        raise DataError(
            "checkpoint is of format version 1 (torch_dist with pickled metadata), this program"
            f" reads version {VERSION}",
            do="go on with the release that wrote it",
            path=path,
        )
    body = _body(path)
    version = body.get("version")
    if body.get("format") != FORMAT or version != VERSION:
        raise DataError(
            f"checkpoint is of format {str(body.get('format'))[:40]!r} version"
            f" {str(version)[:20]}, this program reads {FORMAT!r} version {VERSION}",
            path=path,
        )
    try:
        found = _checked(path, body)
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
        cause = str(error)[:300] if isinstance(error, ValueError) else repr(error)[:300]
        raise Damaged(f"checkpoint manifest is wrong: {cause}", path=path / MANIFEST) from error
    for name in found.files if not may_lack_files else ():
        os.close(found.open(name))
    known = {MANIFEST, *found.files}
    extra = sorted(name for name in names if name not in known)
    if extra:
        raise Damaged(
            f"checkpoint holds {len(extra)} files that were not written with it, as {extra[0]!r}",
            path=path,
        )
    return found


def _body(path: Path) -> dict[str, Any]:
    descriptor = open_regular(path / MANIFEST)
    with os.fdopen(descriptor, "rb") as file:
        if os.fstat(descriptor).st_size > SIZE_LIMIT:
            raise Damaged(f"manifest is larger than {SIZE_LIMIT} bytes", path=path / MANIFEST)
        data = patiently(lambda: (file.seek(0), file.read())[1], path / MANIFEST)
    first, _, rest = data.partition(b"\n")
    try:
        hash_ = json.loads(first.rstrip(b",") + b"}")["hash"]
        actual = text_hash(rest)
        if hash_ != actual:
            raise ValueError(f"expected={str(hash_)[:40]} actual={actual}")
        body = json.loads(b"{" + rest)["manifest"]
        if not isinstance(body, dict):
            raise ValueError("no object")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise Damaged(
            f"checkpoint is damaged: {MANIFEST} offset=0: {str(error)[:200]}", path=path / MANIFEST
        ) from error
    return body


def _numbers(value: Any, least: int = 0) -> tuple[int, ...]:
    """A list of whole numbers as a tuple."""
    if not isinstance(value, list) or len(value) > _MOST_DIMS:
        raise ValueError(f"a shape must be a list of at most {_MOST_DIMS} numbers")
    if any(type(n) is not int or not least <= n < _MOST_ELEMENTS for n in value):
        raise ValueError("a shape must hold whole numbers")
    return tuple(value)


def _checked(path: Path, body: dict[str, Any]) -> Manifest:
    check_record(body)
    named = _STEP_FOLDER.fullmatch(path.name)
    if named and int(named[1]) != body["step"]:
        raise ValueError(f"it is of step {body['step']}, its folder is called {path.name}")
    files = {}
    for name, entry in body["files"].items():
        if not _FILE.fullmatch(name):
            raise ValueError(f"file name {name[:80]!r} is not of the form rank_00000.safetensors")
        files[name] = FileHash.from_json(entry)
    tensors = {name: _pieces(name, entry, files) for name, entry in body["tensors"].items()}
    _check_ranges(tensors, files)
    check_whole(piece.spot for pieces in tensors.values() for piece in pieces)
    record = {name: value for name, value in body.items() if name not in ("files", "tensors")}
    return Manifest(path, record, files, tensors)


def _pieces(name: str, entry: dict, files: dict[str, FileHash]) -> list[Stored]:
    if len(name) > _LONGEST_NAME or not name.isprintable():
        raise ValueError(f"tensor name {name[:80]!r}")
    names = sorted(files)
    dtype, shape = TORCH_DTYPES[entry["dtype"]], _numbers(entry["shape"])
    found = []
    for number, offset, place, size in entry["pieces"]:
        spot = Spot(name, shape, _numbers(place), _numbers(size), dtype)
        if not len(shape) == len(spot.place) == len(spot.size):
            raise ValueError(f"{name}: a piece has another number of dims than its tensor")
        if type(number) is not int or type(offset) is not int or min(number, offset) < 0:
            raise ValueError(f"{name}: file and offset must be whole numbers")
        found.append(Stored(spot, names[number], offset))
    if not found and math.prod(shape):
        raise ValueError(f"{name}: no piece of it is there")
    return found


def _check_ranges(tensors: dict[str, list[Stored]], files: dict[str, FileHash]) -> None:
    """No piece ends beyond its file, no byte belongs to two pieces."""
    ranges: dict[str, list[tuple[int, int, str]]] = {}
    for name, pieces in tensors.items():
        for piece in pieces:
            stop = piece.offset + piece.spot.num_bytes
            if stop > files[piece.file].num_bytes:
                raise ValueError(f"{name}: bytes {piece.offset}-{stop} are beyond {piece.file}")
            ranges.setdefault(piece.file, []).append((piece.offset, stop, name))
    for file, entries in ranges.items():
        entries.sort()
        for (_, stop, name), (start, _, other) in zip(entries, entries[1:]):
            if start < stop:
                raise ValueError(f"{name} and {other} share bytes of {file}")
