"""What a ``.bin`` holds is known before the first forward pass: its ids, and that its bytes are
whole.

An id outside the vocabulary gives a finite, wrong loss in megatron-core (tensor parallelism turns
it into a zero vector), so it must never reach the model.  Two nets: the range of the ids of the
whole file is known when it is opened, and each sample is checked again as it is read
(`first_outside`), so that a file which changes later is caught too.

`examine` finds the range once; the result is kept in the index cache under the files' paths, sizes
and times of change.  Where ``PREFIX.report.json`` belongs to the file (the same size), its hashes
are compared - of the ``.idx``, and of all bytes of the ``.bin`` up to `HASHED_WHOLE_BYTES`, of
`SPOTS` blocks above unless ``complete`` (--data-hash complete) - and its range is taken. Without a
report all ids are read; a changed bit that leaves an id inside the vocabulary cannot show then.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from data.indexed import IndexedFile
from data.storage import read_json, sha256_of
from megatron_ext.errors import DataError

SPOTS = 256
SPOT_BYTES = 4096
SCAN_TOKENS = 1 << 22
HASHED_WHOLE_BYTES = 1 << 32


def spot_sha256(path: Path) -> str:
    """Hash over the size and `SPOTS` blocks, evenly spaced from the first byte to the last."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with open(path, "rb") as stream:
        for spot in range(SPOTS):
            stream.seek(max(0, size - SPOT_BYTES) * spot // (SPOTS - 1))
            digest.update(stream.read(SPOT_BYTES))
    return digest.hexdigest()


BY_ALL = ("bin_sha256", sha256_of)
BY_SPOTS = ("spot_sha256", spot_sha256)


def scan(file: IndexedFile) -> dict:
    """Reads the whole ``.bin``: smallest and largest id, and the first token that holds each."""
    low: tuple[int, int] | None = None
    high: tuple[int, int] | None = None
    for start in range(0, file.num_tokens, SCAN_TOKENS):
        ids = file.read(start, min(SCAN_TOKENS, file.num_tokens - start))
        smallest, largest = int(ids.min()), int(ids.max())
        if low is None or smallest < low[0]:
            low = (smallest, start + int(ids.argmin()))
        if high is None or largest > high[0]:
            high = (largest, start + int(ids.argmax()))
    assert low is not None and high is not None, "an IndexedFile has at least one token"
    return {"min_token_id": low[0], "min_at": low[1], "max_token_id": high[0], "max_at": high[1]}


def examine(file: IndexedFile, complete: bool = False) -> dict:
    """The range of the ids as `scan` gives it, or ``{"error": what, "path": file}`` where bytes are
    damaged.
    """
    report = read_json(report_path(file)) or {}
    size = file.bin_path.stat().st_size
    has_range = all(isinstance(report.get(f"{end}_token_id"), int) for end in ("min", "max"))
    if report.get("bin_bytes") != size or not has_range:
        return scan(file)  # no report, or one of another file
    is_whole = complete or size <= HASHED_WHOLE_BYTES
    checks = [(file.bin_path, *(BY_ALL if is_whole else BY_SPOTS))]
    if "idx_sha256" in report:
        checks.append((file.idx_path, "idx_sha256", sha256_of))
    for path, name, hash_of in checks:
        found = hash_of(path)
        if found != report.get(name):
            what = (
                f"bytes have changed: {name} is {found[:16]}..., {report_path(file).name} "
                f"says {str(report.get(name))[:16]}..."
            )
            return {"error": what, "path": str(path)}
    return {name: report.get(name) for name in ("min_token_id", "max_token_id")}


def report_path(file: IndexedFile) -> Path:
    """Where data.prepare writes the report of a pair."""
    return Path(f"{file.prefix}.report.json")


def has_bad_report(file: IndexedFile) -> bool:
    """True where a report lies beside the pair that is not even an object of JSON."""
    return report_path(file).exists() and read_json(report_path(file)) is None


def cache_key(file: IndexedFile, complete: bool = False) -> str:
    """Name of the result of `examine` for these very files in the index cache."""
    report = report_path(file)
    paths = [file.bin_path, file.idx_path, *([report] if report.exists() else [])]
    stamps = " ".join(stamp(path) for path in paths)
    facts = f"{file.bin_path.resolve()} {stamps} {file.dtype.name} {complete}"
    return f"scan-{hashlib.sha256(facts.encode()).hexdigest()[:32]}"


def stamp(path: Path) -> str:
    """Size and times of change: another content, or another copy, has another stamp."""
    status = path.stat()
    return f"{status.st_size}-{status.st_mtime_ns}-{status.st_ctime_ns}"


def require_whole(file: IndexedFile, result: dict) -> None:
    """Raises where `examine` found damage."""
    if "error" in result:
        raise DataError(
            result["error"],
            do="copy the .bin again or rebuild it; delete the report if the .bin was replaced on "
            "purpose",
            path=result.get("path", file.bin_path),
        )


def require_range(file: IndexedFile, result: dict, vocab_size: int) -> None:
    """Raises where a scan found an id outside [0, vocab_size), naming document and position."""
    too_small = result["min_token_id"] < 0
    if not too_small and result["max_token_id"] < vocab_size:
        return
    if "min_at" not in result:
        result = scan(file)
    at, token = (
        (result["min_at"], result["min_token_id"])
        if too_small
        else (result["max_at"], result["max_token_id"])
    )
    raise outside(file, token, *file.locate(at), vocab_size)


def outside(
    file: IndexedFile, token: int, document: int, position: int, vocab_size: int
) -> DataError:
    """The error that names an id outside the vocabulary."""
    return DataError(
        f"token id {token} in document {document} at position {position}: "
        f"the vocabulary is 0 to {vocab_size - 1}",
        do=f"prepare the data with the tokenizer of this run, or set "
        f"--vocab-size above {max(token, 0)}",
        path=file.bin_path,
    )


def needs_no_scan(file: IndexedFile, vocab_size: int) -> bool:
    """True where the type of the ids cannot hold one outside."""
    return file.dtype.kind == "u" and np.iinfo(file.dtype).max < vocab_size


def first_outside(tokens: np.ndarray, vocab_size: int) -> int | None:
    """Index of the first token outside [0, vocab_size), or None: the check of each sample that is
    read.
    """
    if len(tokens) and (tokens.min() < 0 or tokens.max() >= vocab_size):
        return int(np.argmax((tokens < 0) | (tokens >= vocab_size)))
    return None
