"""Parquet files through pyarrow: values of one column, in memory that a limit bounds."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from data.compressed import TOO_LARGE, open_bytes
from megatron_ext.errors import ConfigError, DataError, ResourceError

ROWS_PER_BATCH = 1024


def require_parquet():
    """pyarrow's parquet module, or the line that installs it."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise ConfigError(
            "a .parquet input needs the package pyarrow", do="pip install pyarrow==25.0.1"
        ) from None
    return pyarrow.parquet


@contextmanager
def parquet_errors(path: Path) -> Iterator[None]:
    """Turns what pyarrow raises on a damaged file into a `DataError`."""
    require_parquet()
    from pyarrow import ArrowException

    try:
        yield
    except MemoryError as error:
        raise ResourceError(
            f"memory does not suffice for a row group: {error}",
            do="write the file with smaller row groups, or use fewer --workers",
            path=path,
        ) from error
    except (ArrowException, UnicodeDecodeError) as error:
        raise DataError(
            f"damaged parquet file: {error}", do="copy the file again or leave it out", path=path
        ) from error


def row_groups(path: Path) -> int:
    """Number of row groups of a file."""
    with parquet_errors(path):
        return require_parquet().ParquetFile(path).num_row_groups


@contextmanager
def open_parquet(path: Path, compression: str) -> Iterator:
    """A pyarrow ParquetFile; what it raises inside the block is one line."""
    with parquet_errors(path), _seekable(path, compression) as stream:
        yield require_parquet().ParquetFile(stream)


@contextmanager
def _seekable(path: Path, compression: str) -> Iterator[BinaryIO]:
    """The file, which is read from its end: unpacked on the disk where it is compressed."""
    with open_bytes(path, compression) as stream:
        if not compression:
            yield stream
            return
        with tempfile.TemporaryFile() as unpacked:
            shutil.copyfileobj(stream, unpacked)
            yield unpacked  # type: ignore[misc]


def values(file, groups: Sequence[int], key: str, max_bytes: int) -> Iterator[object]:
    """The values of column ``key`` in row groups, TOO_LARGE for those above ``max_bytes``."""
    rows = _rows_at_once(file.metadata, groups, max_bytes)
    for batch in file.iter_batches(rows, row_groups=groups, columns=[key]):
        for value in batch.column(0):
            yield TOO_LARGE if _bytes_of(value) > max_bytes else _decoded(value)


def _rows_at_once(metadata, groups: Sequence[int], max_bytes: int) -> int:
    """Rows in a batch: as many as hold ``max_bytes`` by the mean of the group of largest rows."""
    sizes = [metadata.row_group(group) for group in groups]
    mean = max((g.total_byte_size / max(1, g.num_rows) for g in sizes), default=1.0)
    return int(min(ROWS_PER_BATCH, max(1.0, max_bytes / max(1.0, mean))))


def _decoded(value) -> object:
    """The value as Python has it; one that is not UTF-8 has lone surrogates, not an error."""
    try:
        return value.as_py()
    except UnicodeDecodeError:
        return value.as_buffer().to_pybytes().decode("utf-8", "surrogateescape")


def _bytes_of(value) -> int:
    """Bytes of a string or binary value; 0 for one of another type."""
    buffer = value.as_buffer() if value.is_valid and hasattr(value, "as_buffer") else None
    return 0 if buffer is None else buffer.size
