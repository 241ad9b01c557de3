"""Documents from files: ``.txt .md .py .jsonl .parquet``, each also as ``.gz`` or ``.zst``.

A text file is one document; a jsonl line and a parquet row are one document each (the value of one
key).  What is not a document is skipped and counted with its reason, never silently: binary or
non-UTF-8 text, a line without the key, a value that is not a string, a blank document.  Order is
fixed: inputs as given, a folder's files by path.

A text file, a line of jsonl or a value of a parquet column of more bytes than a limit is skipped,
too, and no more of it than the limit is held: one line of a small .gz may unpack to gigabytes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from data.compressed import TOO_LARGE, open_bytes, read_line
from data.parquet import open_parquet, row_groups, values
from megatron_ext.errors import ConfigError, DataError, Fatal, one_line

KINDS = {".txt": "text", ".md": "text", ".py": "text", ".jsonl": "jsonl", ".parquet": "parquet"}
COMPRESSIONS = (".gz", ".zst")
SUPPORTED = ", ".join(KINDS) + " and .gz/.zst of those"
EXAMPLES_KEPT = 5
MAX_DOCUMENT_BYTES = 64 << 20
"""Default of --max-document-bytes; tokenizing takes up to 160 times the bytes of a document."""
SAID_CHARACTERS = 200


@dataclass
class Skipped:
    """What was left out: reason -> count, and the first places of each reason."""

    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, place: str, count: int = 1) -> None:
        """Counts ``count`` things left out for ``reason``; ``place`` is kept as an example."""
        self.counts[reason] = self.counts.get(reason, 0) + count
        kept = self.examples.setdefault(reason, [])
        if len(kept) < EXAMPLES_KEPT:
            kept.append(place)

    @contextmanager
    def one_document(self, stage: str, place: str) -> Iterator[None]:
        """Whatever ends the block ends this document only: counted as ``stage: kind of error``.

        BaseException, because that is what the panic of a library in Rust is.
        """
        try:
            yield
        except (KeyboardInterrupt, SystemExit, GeneratorExit):
            raise
        except BaseException as error:
            said = error.what if isinstance(error, Fatal) else str(error)
            said = f": {one_line(said)[:SAID_CHARACTERS]}" if said else ""
            self.add(f"{stage}: {type(error).__name__}", place + said)

    def merge(self, other: Skipped) -> None:
        """Adds the counts of ``other``, which comes later in the order of documents."""
        for reason, count in other.counts.items():
            self.counts[reason] = self.counts.get(reason, 0) + count
            self.examples[reason] = (self.examples.get(reason, []) + other.examples[reason])[
                :EXAMPLES_KEPT
            ]


@dataclass(frozen=True)
class Source:
    """One input file."""

    path: Path
    kind: str
    """"text", "jsonl" or "parquet"."""
    compression: str
    """"", ".gz" or ".zst"."""
    size: int
    """Bytes on disk."""
    mtime_ns: int


@dataclass(frozen=True)
class Piece:
    """Part of a source: lines that begin in bytes [start, end) of a jsonl, row groups [start, end)
    of a parquet.

    Other files are read whole and ignore the range.
    """

    source: Source
    start: int
    end: int
    size: int
    """Bytes on disk, about."""


def single_key(keys: Sequence[str]) -> str:
    """The one key of ``--json-keys`` (Megatron-LM writes one file a key; here each key is its own
    run).
    """
    if len(keys) != 1:
        raise ConfigError(
            f"--json-keys {' '.join(keys)} names {len(keys)} keys, one is allowed",
            do="run once for each key, with its own --output",
        )
    return keys[0]


def kind_of(path: Path) -> tuple[str, str] | None:
    """(kind, compression) by the name, or None where the name says nothing we read."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compression = suffixes.pop() if suffixes and suffixes[-1] in COMPRESSIONS else ""
    kind = KINDS.get(suffixes[-1]) if suffixes else None
    return (kind, compression) if kind else None


def files_below(folder: Path) -> Iterator[Path]:
    """Files below a folder by path, without hidden files and folders (their names begin with a
    dot).
    """
    found = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(parent, name) for name in names if not name.startswith(".")]
    return iter(sorted(found))


def find_sources(inputs: Iterable[Path]) -> tuple[list[Source], Skipped]:
    """The files to read, in order, each once; and what was left out by name."""
    sources: list[Source] = []
    skipped = Skipped()
    seen: set[Path] = set()
    for given in inputs:
        if not given.exists():
            raise DataError("--input does not exist", do="name a file or folder", path=given)
        if given.is_file() and kind_of(given) is None:
            raise DataError(
                f"--input has a name that says nothing: {SUPPORTED} are read",
                do="rename the file by its content",
                path=given,
            )
        for path in files_below(given) if given.is_dir() else [given]:
            if path.resolve() in seen:
                continue
            seen.add(path.resolve())
            source = _source(path, skipped)
            sources += [source] if source else []
    if not sources:
        raise DataError(
            f"--input has no file to read: {SUPPORTED} are",
            do="name text files or folders of them",
            path=", ".join(map(str, inputs)),
        )
    return sources, skipped


def _source(path: Path, skipped: Skipped) -> Source | None:
    """One file of a folder, or None with the reason counted."""
    kind = kind_of(path)
    if kind is None:
        skipped.add("file name not supported", str(path))
        return None
    if not path.is_file() or not os.access(path, os.R_OK):
        skipped.add("file not readable", str(path))
        return None
    status = path.stat()
    return Source(path, *kind, size=status.st_size, mtime_ns=status.st_mtime_ns)


def whole(source: Source) -> Piece:
    """A piece that covers the source."""
    end = row_groups(source.path) if splits_by_rows(source) else source.size
    return Piece(source, 0, end, source.size)


def splits_by_rows(source: Source) -> bool:
    """True where pieces are ranges of row groups."""
    return source.kind == "parquet" and not source.compression


def read_piece(
    piece: Piece, key: str, skipped: Skipped, max_bytes: int = MAX_DOCUMENT_BYTES
) -> Iterator[str]:
    """Texts of the documents of a piece, in order; what is skipped is counted in ``skipped``."""
    return (text for _, text in read_documents(piece, key, skipped, max_bytes))


def read_documents(
    piece: Piece, key: str, skipped: Skipped, max_bytes: int
) -> Iterator[tuple[str, str]]:
    """As `read_piece`, each text behind its place: the file, and where in it."""
    readers = {"text": _read_text, "jsonl": _read_jsonl, "parquet": _read_parquet}
    for place, text in readers[piece.source.kind](piece, key, skipped, max_bytes):
        if text is TOO_LARGE:
            skipped.add(f"larger than --max-document-bytes {max_bytes}", place)
        elif not isinstance(text, str):
            skipped.add(f"value of '{key}' is not a string", place)
        elif not text.strip():
            skipped.add("blank document", place)
        elif not _is_utf8(text):
            skipped.add("not UTF-8 (lone surrogate)", place)
        else:
            yield place, text


def _is_utf8(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _read_text(
    piece: Piece, key: str, skipped: Skipped, max_bytes: int
) -> Iterator[tuple[str, object]]:
    """The one document of a text file; a byte order mark is dropped."""
    place = str(piece.source.path)
    with open_bytes(piece.source.path, piece.source.compression) as stream:
        content = stream.read(max_bytes + 1)
    if len(content) > max_bytes:
        yield place, TOO_LARGE
        return
    if b"\0" in content:
        skipped.add("binary (NUL byte)", place)
        return
    try:
        yield place, content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        skipped.add("not UTF-8", f"{place} byte {error.start}")


def _lines(piece: Piece, stream: BinaryIO, max_bytes: int) -> Iterator[tuple[int, bytes | None]]:
    """(offset, line) of the lines that begin inside the piece; None for a line that is too long."""
    if piece.source.compression:
        offset, end = 0, None
    else:
        offset, end = piece.start, piece.end
        if offset:
            stream.seek(offset - 1)
            offset += read_line(stream, 0)[1] - 1  # a line that began earlier is another piece's
    while end is None or offset < end:
        line, size = read_line(stream, max_bytes)
        if not size:
            return
        yield offset, line
        offset += size


def _read_jsonl(
    piece: Piece, key: str, skipped: Skipped, max_bytes: int
) -> Iterator[tuple[str, object]]:
    """The values of ``key``, one a line."""
    with open_bytes(piece.source.path, piece.source.compression) as stream:
        for offset, line in _lines(piece, stream, max_bytes):
            place = f"{piece.source.path} byte {offset}"
            if line is None:
                yield place, TOO_LARGE
                continue
            if not line.strip():
                continue
            try:
                record = json.loads(line.decode("utf-8-sig" if offset == 0 else "utf-8"))
            except UnicodeDecodeError:
                skipped.add("not UTF-8", place)
            except (ValueError, RecursionError):
                skipped.add("line is not JSON", place)
            except MemoryError:
                skipped.add("reader: MemoryError", place)
            else:
                if isinstance(record, dict) and key in record:
                    yield place, record[key]
                else:
                    keys = (
                        ", ".join(map(repr, record))
                        if isinstance(record, dict)
                        else type(record).__name__
                    )
                    skipped.add(no_key(key), f"{place} keys present: {keys}")


def no_key(key: str) -> str:
    """The reason for a record without the text."""
    return f"no key '{key}'"


def _read_parquet(
    piece: Piece, key: str, skipped: Skipped, max_bytes: int
) -> Iterator[tuple[str, object]]:
    """The values of column ``key``."""
    source = piece.source
    with open_parquet(source.path, source.compression) as file:
        if key not in file.schema_arrow.names:
            keys = ", ".join(map(repr, file.schema_arrow.names))
            place = f"{source.path} keys present: {keys}"
            skipped.add(no_key(key), place, file.metadata.num_rows)
            return
        whole_file = range(file.num_row_groups)
        groups = range(piece.start, piece.end) if splits_by_rows(source) else whole_file
        for row, value in enumerate(values(file, groups, key, max_bytes)):
            yield f"{source.path} group {piece.start} row {row}", value


WAYS_OUT = {
    "larger than": "raise --max-document-bytes, or write documents, one a line of a .jsonl",
    "tokenizer:": "use a tokenizer file that is whole and fits the text",
}
"""By the beginning of the reason for which documents were skipped."""


def nothing_found(skipped: Skipped, key: str) -> DataError:
    """The error where a whole input gave no document."""
    missing = skipped.examples.get(no_key(key))
    if missing:
        return DataError(
            f"no document has the key '{key}'; first: {missing[0]}",
            do="name the key with --json-keys",
        )
    reasons = "; ".join(
        f"{reason}: {count} (first: {skipped.examples[reason][0]})"
        for reason, count in skipped.counts.items()
    )
    ways = [
        way for start, way in WAYS_OUT.items() if any(r.startswith(start) for r in skipped.counts)
    ]
    return DataError(
        f"no document in the input; skipped: {reasons or 'nothing'}",
        do="; ".join(ways) or "name files with text",
    )


def first_texts(
    inputs: Iterable[Path], key: str, max_bytes: int, max_document_bytes: int = MAX_DOCUMENT_BYTES
) -> Iterator[str]:
    """Texts to train a tokenizer on: of each file its share of ``max_bytes``, from its start."""
    sources, skipped = find_sources(inputs)
    share = min(1.0, max_bytes / max(1, sum(source.size for source in sources)))
    count = 0
    for source in sources:
        budget = source.size * share if share < 1.0 else float("inf")
        for text in read_piece(whole(source), key, skipped, max_document_bytes):
            if budget <= 0:
                break
            budget -= len(text.encode("utf-8"))
            count += 1
            yield text
    if not count:
        raise nothing_found(skipped, key)
