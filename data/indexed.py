"""Megatron's ``.bin``/``.idx`` pair: a strict reader and the writer of the index.

::

    .bin   token ids of all documents, one after the other, little-endian, no header
    .idx   offset  0  magic      "MMIDIDX\\0\\0"           9 bytes
                   9  version    1                        uint64
                  17  dtype      code of `DTYPES`         uint8
                  18  sequences  N                        uint64
                  26  documents  D + 1                    uint64
                  34  lengths    tokens of each sequence  N x int32
                      pointers   first byte of each       N x int64
                      documents  first sequence of each, and N at the end   (D + 1) x int64

megatron-core's reader takes negative lengths and wrong pointers without a word and finds a short
``.bin`` when that sample is read, maybe days later.  Here everything is checked when the pair is
opened.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from megatron_ext.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPES: dict[int, type] = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    6: np.float64,
    7: np.float32,
    8: np.uint16,
}
UINT16_VOCABULARY = 65500
"""Megatron's rule: ids are uint16 below this vocabulary size, int32 from it."""
LARGEST_DOCUMENT = 2**31 - 1
CHECKED_AT_ONCE = 1 << 20
REBUILD = "rebuild the pair with python -m data.prepare, or copy both files again"


def token_dtype(vocab_size: int) -> np.dtype:
    """The type of ids on disk for a vocabulary."""
    return np.dtype(np.uint16 if vocab_size < UINT16_VOCABULARY else np.int32)


def paths_of(prefix: str | Path) -> tuple[Path, Path]:
    """(.bin, .idx) of a prefix."""
    return Path(f"{prefix}.bin"), Path(f"{prefix}.idx")


def write_index(stream: BinaryIO, lengths: np.ndarray, dtype: np.dtype) -> None:
    """Writes the ``.idx`` of documents with ``lengths`` tokens, one sequence a document."""
    code = next(code for code, kind in DTYPES.items() if np.dtype(kind) == dtype)
    count = len(lengths)
    stream.write(HEADER.pack(MAGIC, VERSION, code, count, count + 1))
    stream.write(lengths.astype("<i4").tobytes())
    ends = np.cumsum(lengths, dtype=np.int64) * dtype.itemsize
    stream.write((ends - lengths.astype(np.int64) * dtype.itemsize).astype("<i8").tobytes())
    stream.write(np.arange(count + 1, dtype="<i8").tobytes())


class IndexedFile:
    """One verified ``.bin``/``.idx`` pair.

    Args:
        prefix: path without ``.bin`` or ``.idx``.
        mmap: read the ``.bin`` through the page cache by mapping it; else by pread (slow network
            disks).

    Attributes:
        lengths: int32 [N], tokens of each document.
        num_tokens: tokens in the ``.bin``.
        dtype: of the ids on disk.

    Raises:
        DataError: missing, empty, truncated, foreign or inconsistent files, with offset and
            numbers.
    """

    def __init__(self, prefix: str | Path, mmap: bool = True):
        self.prefix = str(prefix)
        self.bin_path, self.idx_path = paths_of(prefix)
        self._require_files()
        sequences, documents = self._read_header()
        self._read_arrays(sequences, documents)
        self._check_lengths_and_pointers()
        self._check_documents(sequences)
        self._check_bin_size()
        self._map = np.memmap(self.bin_path, dtype=self.dtype, mode="r") if mmap else None
        self._handle = -1 if mmap else os.open(self.bin_path, os.O_RDONLY)

    def __len__(self) -> int:
        return len(self.lengths)

    def __del__(self) -> None:
        if getattr(self, "_handle", -1) >= 0:
            os.close(self._handle)

    @property
    def domain(self) -> str:
        """Short name of the data: the last part of the prefix."""
        return Path(self.prefix).name

    def read(self, start: int, count: int) -> np.ndarray:
        """``count`` ids from token ``start`` of the file, in the type of the disk."""
        if self._map is not None:
            return np.asarray(self._map[start : start + count])
        size = self.dtype.itemsize
        content = os.pread(self._handle, count * size, start * size)
        if len(content) != count * size:
            raise self._bad(
                f"ended at byte {start * size + len(content)} while being read", self.bin_path
            )
        return np.frombuffer(content, dtype=self.dtype)

    def document(self, index: int) -> np.ndarray:
        """Ids of one document."""
        return self.read(self.first_token(index), int(self.lengths[index]))

    def first_token(self, document: int) -> int:
        """Position in the ``.bin``, in tokens, of the first token of a document."""
        return int(self._pointers[document]) // self.dtype.itemsize

    def locate(self, token: int) -> tuple[int, int]:
        """(document, position in it) of a token of the file."""
        byte = token * self.dtype.itemsize
        document = int(np.searchsorted(self._pointers, byte, side="right")) - 1
        return document, token - self.first_token(document)

    def _bad(self, what: str, path: Path) -> DataError:
        return DataError(what, do=REBUILD, path=path)

    def _require_files(self) -> None:
        for path in (self.idx_path, self.bin_path):
            try:
                size = path.stat().st_size
                with open(path, "rb"):
                    pass
            except OSError as error:
                raise DataError(
                    f"{path.suffix} file of the data path cannot be read: {error.strerror}",
                    do="give --data-path a prefix without .bin/.idx that data.prepare made",
                    path=path,
                ) from None
            if size == 0:
                raise self._bad(f"{path.suffix} file is empty (0 bytes)", path)

    def _read_header(self) -> tuple[int, int]:
        with open(self.idx_path, "rb") as stream:
            head = stream.read(HEADER.size)
        if not head.startswith(MAGIC):
            raise self._bad(
                f"not a Megatron index: offset 0 holds {head[:9]!r}, expected {MAGIC!r}",
                self.idx_path,
            )
        if len(head) < HEADER.size:
            raise self._bad(
                f"truncated: {len(head)} bytes, the header alone has {HEADER.size}", self.idx_path
            )
        _, version, code, sequences, documents = HEADER.unpack(head)
        if version != VERSION:
            raise self._bad(f"version at offset 9 is {version}, expected {VERSION}", self.idx_path)
        if code not in DTYPES:
            raise self._bad(f"dtype code at offset 17 is {code}, expected 1 to 8", self.idx_path)
        self.dtype = np.dtype(DTYPES[code]).newbyteorder("<")
        if self.dtype.kind not in "iu":
            raise self._bad(
                f"dtype code at offset 17 is {code} ({self.dtype.name}): not token ids",
                self.idx_path,
            )
        if sequences == 0:
            raise self._bad("sequence count at offset 18 is 0: no document", self.idx_path)
        return sequences, documents

    def _read_arrays(self, sequences: int, documents: int) -> None:
        size = self.idx_path.stat().st_size
        expected = HEADER.size + sequences * (4 + 8) + documents * 8
        if size != expected:
            state = "truncated" if size < expected else "too long"
            raise self._bad(
                f"{state}: {size} bytes, but {sequences} sequences (offset 18) and {documents} "
                f"document marks (offset 26) need {expected}",
                self.idx_path,
            )
        index = np.memmap(self.idx_path, dtype=np.uint8, mode="r")
        self._at_pointers = HEADER.size + 4 * sequences
        self._at_documents = self._at_pointers + 8 * sequences
        self.lengths: np.ndarray = index[HEADER.size : self._at_pointers].view("<i4")
        self._pointers = index[self._at_pointers : self._at_documents].view("<i8")
        self._documents = index[self._at_documents :].view("<i8")

    def _check_lengths_and_pointers(self) -> None:
        """In chunks, so that an index of 10^9 documents needs no memory of its own."""
        total = 0
        for first in range(0, len(self.lengths), CHECKED_AT_ONCE):
            lengths = self.lengths[first : first + CHECKED_AT_ONCE].astype(np.int64)
            if lengths.min() < 0:
                at = first + int(np.argmax(lengths < 0))
                raise self._bad(
                    f"length of sequence {at} at offset {HEADER.size + 4 * at} is "
                    f"{self.lengths[at]}: lengths are 0 or more",
                    self.idx_path,
                )
            ends = total + np.cumsum(lengths)
            expected = (ends - lengths) * self.dtype.itemsize
            wrong = np.flatnonzero(self._pointers[first : first + CHECKED_AT_ONCE] != expected)
            if len(wrong):
                at = first + int(wrong[0])
                raise self._bad(
                    f"pointer of sequence {at} at offset {self._at_pointers + 8 * at} is "
                    f"{self._pointers[at]}, but the lengths before it make "
                    f"{expected[at - first]} bytes",
                    self.idx_path,
                )
            total = int(ends[-1])
        if total == 0:
            raise self._bad(f"all {len(self.lengths)} sequences are empty", self.idx_path)
        self.num_tokens = total

    def _check_documents(self, sequences: int) -> None:
        marks = self._documents
        if len(marks) == 0 or marks[0] != 0 or marks[-1] != sequences:
            ends = "no mark" if len(marks) == 0 else f"{marks[0]} ... {marks[-1]}"
            raise self._bad(
                f"document marks from offset {self._at_documents} are {ends}, expected 0 ... "
                f"{sequences}",
                self.idx_path,
            )
        falling = np.flatnonzero(marks[1:] < marks[:-1])
        if len(falling):
            at = int(falling[0]) + 1
            raise self._bad(
                f"document mark {at} at offset {self._at_documents + 8 * at} is {marks[at]}, "
                f"less than {marks[at - 1]} before it",
                self.idx_path,
            )

    def _check_bin_size(self) -> None:
        size = self.bin_path.stat().st_size
        expected = self.num_tokens * self.dtype.itemsize
        if size != expected:
            state = "truncated" if size < expected else "too long (another file's pair?)"
            raise self._bad(
                f"{state}: {size} bytes, but the .idx counts {self.num_tokens} tokens of "
                f"{self.dtype.itemsize} bytes = {expected}",
                self.bin_path,
            )


def write_pair(
    prefix: str | Path, documents: Sequence[Sequence[int]], dtype: np.dtype | type
) -> None:
    """Writes a small pair from memory (tests, conversions); `data.prepare` writes large ones."""
    from data.storage import atomic_file

    bin_path, idx_path = paths_of(prefix)
    with atomic_file(bin_path) as stream:
        for document in documents:
            stream.write(np.asarray(document, dtype=dtype).tobytes())
    with atomic_file(idx_path) as stream:
        write_index(
            stream,
            np.array([len(document) for document in documents], dtype=np.int64),
            np.dtype(dtype),
        )
