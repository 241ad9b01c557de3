"""Indices on disk: built once by one rank, verified by every reader, rebuilt when bad.

An entry is a folder-less group of files ``KEY.NAME.npy`` and ``KEY.json`` with the shape, type and
SHA-256 of each; the JSON is written last.  Each file is written to a temporary name, fsynced and
renamed, so that two jobs that build the same entry at once write the same bytes and nobody sees
half a file.  A reader that finds no good entry (another node's disk, a damaged file) builds the
arrays in its own memory: they are pure functions of the data. ``numpy.load`` runs with
``allow_pickle=False``: a pickle renamed to .npy is refused, not executed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from data.storage import atomic_file, make_folder, read_json, sha256_of, write_json
from megatron_ext.errors import DiskError

FORMAT = 1
Arrays = dict[str, np.ndarray]


def key_of(kind: str, **facts: object) -> str:
    """Name of an entry: its kind and a hash over all that decides its content."""
    text = json.dumps([FORMAT, facts], sort_keys=True, default=str)
    return f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:32]}"


def manifest_of(facts: dict) -> dict:
    """The content of ``KEY.json``: a hash over the facts, so that a damaged manifest shows too."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return {"format": FORMAT, "arrays": facts, "sha256": digest}


def note_of(key: str, value: dict) -> dict:
    """The content of a note's file: its hash covers the key, so that it is nobody else's note."""
    digest = hashlib.sha256(json.dumps([key, value], sort_keys=True).encode()).hexdigest()
    return {"format": FORMAT, "value": value, "sha256": digest}


class IndexCache:
    """A folder of entries.

    Args:
        folder: where entries live; created when it is first written to.
        required: a folder that cannot be written to is an error (the user named it), else one
            warning.
    """

    def __init__(self, folder: Path, required: bool):
        self.folder, self.required = folder, required
        self.warnings: list[str] = []
        self._unwritable = False

    def ensure(self, key: str, make: Callable[[], Arrays]) -> None:
        """Builds the entry unless a good one is there (the builder's part, before the barrier)."""
        if self._unwritable or self._load(key) is not None:
            return
        self._write(lambda: self._store(key, make()))

    def load_or_make(self, key: str, make: Callable[[], Arrays]) -> Arrays:
        """The entry from disk when it is good, else built in memory."""
        arrays = self._load(key)
        return make() if arrays is None else arrays

    def note(self, key: str, make: Callable[[], dict]) -> None:
        """As `ensure`, for a small JSON object."""
        if not self._unwritable and self.read_note(key) is None:
            note = note_of(key, make())
            self._write(
                lambda: (make_folder(self.folder), write_json(self.folder / f"{key}.json", note))
            )

    def read_note(self, key: str) -> dict | None:
        """A small JSON object; None where it is missing, damaged or another entry's."""
        note = read_json(self.folder / f"{key}.json") or {}
        value = note.get("value")
        return value if isinstance(value, dict) and note == note_of(key, value) else None

    def _write(self, action: Callable[[], object]) -> None:
        try:
            action()
        except DiskError as error:
            if self.required:
                raise
            self._unwritable = True
            self.warnings.append(
                f"index cache {self.folder} cannot be written ({error.what}): indices are built "
                "in the memory of each process; name a folder with --data-cache-path"
            )

    def _path(self, key: str, name: str) -> Path:
        return self.folder / f"{key}.{name}.npy"

    def _store(self, key: str, arrays: Arrays) -> None:
        make_folder(self.folder)
        facts = {}
        for name, array in arrays.items():
            path = self._path(key, name)
            with atomic_file(path, array.nbytes) as stream:
                np.save(stream, array, allow_pickle=False)
            facts[name] = {
                "shape": list(array.shape),
                "dtype": array.dtype.str,
                "sha256": sha256_of(path),
            }
        write_json(self.folder / f"{key}.json", manifest_of(facts))

    def _load(self, key: str) -> Arrays | None:
        """The arrays of an entry, mapped read-only, or None where anything about it is wrong."""
        manifest = read_json(self.folder / f"{key}.json") or {}
        try:
            facts = manifest["arrays"]
            if manifest != manifest_of(facts):
                return None
            return {name: self._load_one(self._path(key, name), facts[name]) for name in facts}
        except (OSError, ValueError, KeyError, TypeError, EOFError):
            return None

    @staticmethod
    def _load_one(path: Path, facts: dict) -> np.ndarray:
        if sha256_of(path) != facts["sha256"]:
            raise ValueError(f"hash of {path}")
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        if list(array.shape) != facts["shape"] or array.dtype.str != facts["dtype"]:
            raise ValueError(f"shape or type of {path}")
        return array
