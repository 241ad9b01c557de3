"""Rows 18 to 21: damaged .idx and .bin files, ids outside the vocabulary, index caches.

Every case goes the way of a training process: `open_datasets`, which must refuse before a sample is
read. A clean pair between the damaged ones must be accepted.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from data import scan
from data.datasets import open_datasets
from data.indexed import HEADER, IndexedFile, write_pair
from data.storage import sha256_of
from tests.faults.cell import Bomb, Case, Wrong, refused, run_cases
from tests.faults.outcome import Outcome

VOCABULARY = 250
FIELDS = {"magic": (0, 9), "version": (9, 8), "dtype": (17, 1), "sequences": (18, 8)}
FIELDS |= {"documents": (26, 8)}
HOSTILE_INTEGERS = (-1, -(2**31), 2**31 - 1, 0, 1, 2**30, -5)
HOSTILE_LONGS = (-1, 2**62, -(2**63), 2**63 - 1, 10**9, 10**18, 0, 1)


class Pair:
    """A clean pair with its report, restored from memory before each case."""

    def __init__(self, folder: Path, seed: int, dtype: type = np.uint16) -> None:
        self.folder, self.state = folder, random.Random(seed)
        folder.mkdir(parents=True, exist_ok=True)
        self.prefix = folder / "tokens"
        numbers = np.random.RandomState(seed)
        documents = [
            numbers.randint(0, VOCABULARY, numbers.randint(1, 41))
            for _ in range(numbers.randint(20, 60))
        ]
        documents[3] = np.array([], dtype=np.int64)
        write_pair(self.prefix, documents, dtype)
        self.bin, self.idx = folder / "tokens.bin", folder / "tokens.idx"
        self.report = folder / "tokens.report.json"
        self.dtype, self.documents = np.dtype(dtype), documents
        self.good_bin, self.good_idx = self.bin.read_bytes(), self.idx.read_bytes()
        self.good_report = json.dumps(make_report(self)).encode()
        self.restore()

    def restore(self, with_report: bool = True) -> None:
        """The clean files again, and no cache."""
        self.bin.write_bytes(self.good_bin)
        self.idx.write_bytes(self.good_idx)
        self.report.write_bytes(self.good_report)
        if not with_report:
            self.report.unlink()
        shutil.rmtree(self.folder / "cache", ignore_errors=True)

    def open(self, vocab_size: int = VOCABULARY, is_builder: bool = True) -> np.ndarray:
        """As a training process opens it; ids of the first samples."""
        splits = open_datasets(
            settings(self),
            seq_length=16,
            num_samples=(40, 0, 0),
            seed=7,
            vocab_size=vocab_size,
            eod=0,
            is_builder=is_builder,
            barrier=lambda: None,
        )
        return np.stack([splits.train.sample(index)[0] for index in range(40)])


def settings(pair: Pair) -> SimpleNamespace:
    """cfg.data for one pair."""
    return SimpleNamespace(
        data_path=[str(pair.prefix)],
        split="100,0,0",
        data_cache_path=str(pair.folder / "cache"),
    )


def make_report(pair: Pair) -> dict:
    """What data.prepare says of a pair."""
    ids = np.concatenate(pair.documents)
    return {
        "bin_bytes": pair.bin.stat().st_size,
        "bin_sha256": sha256_of(pair.bin),
        "idx_sha256": sha256_of(pair.idx),
        "spot_sha256": scan.spot_sha256(pair.bin),
        "min_token_id": int(ids.min()),
        "max_token_id": int(ids.max()),
    }


def patched(good: bytes, offset: int, content: bytes) -> bytes:
    """``content`` written over ``good`` at ``offset``."""
    return good[:offset] + content + good[offset + len(content) :]


def flipped(good: bytes, state: random.Random) -> tuple[bytes, int]:
    """One bit of ``good`` the other way, and its byte."""
    offset = state.randrange(len(good))
    return patched(good, offset, bytes([good[offset] ^ (1 << state.randrange(8))])), offset


def _idx_damages(pair: Pair, count: int) -> Iterator[tuple[str, bytes]]:
    """(name, bytes of a damaged .idx)."""
    good, state, size = pair.good_idx, pair.state, len(pair.documents)
    pointers, marks = HEADER.size + 4 * size, HEADER.size + 12 * size
    for _ in range(count):
        kind = state.choice(("field", "length", "pointer", "mark", "cut", "longer", "bit", "empty"))
        if kind == "field":
            name = state.choice(list(FIELDS))
            offset, width = FIELDS[name]
            content = state.randbytes(width)
            if name in ("sequences", "documents"):
                content = struct.pack("<q", state.choice(HOSTILE_LONGS))
            yield f"{name}: offset {offset}", patched(good, offset, content)
        elif kind == "length":
            at = HEADER.size + 4 * state.randrange(size)
            yield (
                f"length: offset {at}",
                patched(good, at, struct.pack("<i", state.choice(HOSTILE_INTEGERS))),
            )
        elif kind in ("pointer", "mark"):
            first, many = (pointers, size) if kind == "pointer" else (marks, size + 1)
            at = first + 8 * state.randrange(many)
            content = struct.pack("<q", state.choice((*HOSTILE_LONGS, state.randrange(size))))
            yield f"{kind}: offset {at}", patched(good, at, content)
        elif kind == "cut":
            length = state.randrange(len(good))
            yield f"truncated: {length} bytes", good[:length]
        elif kind == "longer":
            yield "longer: more bytes", good + state.randbytes(state.randrange(1, 64))
        elif kind == "bit":
            content, offset = flipped(good, state)
            yield f"bit: offset {offset}", content
        else:
            yield "empty: 0 bytes", b""


def _case(pair: Pair, path: Path, content: bytes, with_report: bool = True) -> Callable[[], None]:
    """Writes ``content`` to ``path`` and opens the pair: it must be refused, naming one of the two
    files (where they disagree nobody knows which is right).
    """

    def action() -> None:
        pair.restore(with_report)
        path.write_bytes(content)
        refused(pair.open, pair.prefix)

    return action


def _clean(pair: Pair) -> Case:
    expected = pair.open().tobytes()

    def action() -> None:
        pair.restore()
        try:
            found = pair.open().tobytes()
        except Exception as error:
            raise Wrong("false", f"a clean pair was refused: {error}") from None
        if found != expected:
            raise Wrong("silent", "a clean pair gave other samples")

    return "clean pair accepted", action


def row_18(folder: Path, seed: int, count: int) -> list[Outcome]:
    """A damaged .idx is refused when it is opened."""
    pair = Pair(folder, seed)
    cases = [_clean(pair)]
    for name, content in _idx_damages(pair, count):
        if content != pair.good_idx:
            cases.append((name, _case(pair, pair.idx, content)))
    return run_cases(18, [*cases, _clean(pair)])


def row_19(folder: Path, seed: int, count: int) -> list[Outcome]:
    """A .bin that is cut, changed by a bit, or another file's is refused when it is opened."""
    pair, other = Pair(folder, seed), Pair(folder / "other", seed + 1)
    state, good = pair.state, pair.good_bin
    cases = [_clean(pair)]
    for _ in range(count):
        kind = state.choice(("cut", "bit", "longer", "page"))
        if kind == "cut":
            length = state.randrange(len(good))
            cases.append((f"truncated: {length}", _case(pair, pair.bin, good[:length])))
        elif kind == "longer":
            more = good + state.randbytes(state.randrange(1, 64))
            cases.append(("longer: more bytes", _case(pair, pair.bin, more)))
        elif kind == "bit":
            content, offset = flipped(good, state)
            cases.append((f"bit: byte {offset}", _case(pair, pair.bin, content)))
        else:
            first = state.randrange(len(good) - 64)
            zeroed = patched(good, first, bytes(64))
            if zeroed != good:
                cases.append((f"zeroed page: byte {first}", _case(pair, pair.bin, zeroed)))
    cases.append(("wrong pair: .bin of another", _case(pair, pair.bin, other.good_bin)))
    cases.append(("wrong pair: .idx of another", _case(pair, pair.idx, other.good_idx)))
    return run_cases(19, [*cases, _clean(pair)])


def row_20(folder: Path, seed: int, count: int) -> list[Outcome]:
    """An id outside the vocabulary is named with document and position before the first step."""
    cases: list[Case] = []
    for number, dtype in enumerate((np.uint16, np.int32, np.int64)):
        pair = Pair(folder / np.dtype(dtype).name, seed + number, dtype)
        cases.append(_clean(pair))
        for _ in range(count // 3):
            cases.append(_outside(pair))
    return run_cases(20, cases)


def _outside(pair: Pair) -> Case:
    state = pair.state
    at = state.randrange(len(pair.good_bin) // pair.dtype.itemsize)
    largest = int(np.iinfo(pair.dtype).max)
    token = state.choice(
        (VOCABULARY, VOCABULARY + 1, state.randrange(VOCABULARY, largest), largest)
    )
    if pair.dtype.kind == "i" and state.random() < 0.5:
        token = state.choice((-1, -7, int(np.iinfo(pair.dtype).min)))
    content = np.array([token], dtype=pair.dtype).tobytes()
    damaged = patched(pair.good_bin, at * pair.dtype.itemsize, content)

    def action() -> None:
        pair.restore(with_report=False)
        pair.bin.write_bytes(damaged)
        document, position = IndexedFile(pair.prefix).locate(at)
        place = f"token id {token} in document {document} at position {position}"
        refused(pair.open, place)

    return f"{pair.dtype.name}: id {token} at {at}", action


def row_21(folder: Path, seed: int, count: int) -> list[Outcome]:
    """A damaged, half-written, stale or hostile index cache is rebuilt: the same samples."""
    pair, canary = Pair(folder, seed), folder / "canary"
    expected = pair.open().tobytes()
    cache = {path.name: path.read_bytes() for path in (folder / "cache").iterdir()}
    cases = [_clean(pair)]
    for _ in range(count):
        name = pair.state.choice(sorted(cache))
        kind, content = _cache_damage(pair.state, cache, name, canary)
        cases.append((f"{kind}: {name}", _cache_case(pair, cache, name, content, expected)))
    cases += [(f"two builders: {n}", _two_builders(pair, expected)) for n in range(count // 50)]
    return run_cases(21, cases, canary)


def _cache_damage(
    state: random.Random, cache: dict[str, bytes], name: str, canary: Path
) -> tuple[str, bytes | None]:
    """(kind, what the file holds then); None: it is gone."""
    import pickle

    good = cache[name]
    kind = state.choice(("half-written", "bit", "gone", "hostile pickle", "swapped", "shape"))
    if kind == "half-written":
        return kind, good[: state.randrange(len(good))]
    if kind == "bit":
        return kind, flipped(good, state)[0]
    if kind == "hostile pickle":
        return kind, pickle.dumps(Bomb(canary, state.randrange(6)))
    if kind == "swapped":
        return kind, cache[state.choice(sorted(cache))]
    if kind == "shape":
        return kind, good.replace(b"'shape': (", b"'shape': (9", 1)[: len(good)]
    return kind, None


def _cache_case(
    pair: Pair, cache: dict[str, bytes], name: str, content: bytes | None, expected: bytes
) -> Callable[[], None]:
    def action() -> None:
        pair.restore()
        pair.open()
        path = pair.folder / "cache" / name
        target = path if path.exists() else _same_kind(pair.folder / "cache", name)
        if content is None:
            target.unlink()
        else:
            target.write_bytes(content)
        for is_builder in (False, True, False):
            if pair.open(is_builder=is_builder).tobytes() != expected:
                raise Wrong("silent", "other samples")

    return action


def _same_kind(cache: Path, name: str) -> Path:
    """The file of this cache that plays the part of ``name`` of an earlier one (the keys hold the
    times of the data files).
    """
    start, _, end = name.partition("-")
    ending = end.partition(".")[2]
    found = sorted(
        p for p in cache.iterdir() if p.name.startswith(start) and p.name.endswith(ending)
    )
    return found[0]


def _two_builders(pair: Pair, expected: bytes) -> Callable[[], None]:
    def action() -> None:
        pair.restore()
        pids = []
        for _ in range(3):
            pid = os.fork()
            if pid == 0:
                try:
                    os._exit(int(pair.open().tobytes() != expected))
                finally:
                    os._exit(2)
            pids.append(pid)
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        left = [path.name for path in (pair.folder / "cache").iterdir() if ".tmp" in path.name]
        if any(codes) or left or pair.open().tobytes() != expected:
            raise Wrong("failed", f"exit codes {codes}, left {left}")

    return action
