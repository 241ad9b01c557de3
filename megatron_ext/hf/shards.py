"""safetensors shards of a folder: headers read and checked first, tensors one at a time.

The format is small: 8 bytes header length, the header (JSON: name -> dtype, shape, byte range), the
bytes. The safetensors library writes whole shards from memory and maps whole shards when it reads;
here a shard may be larger than memory, so one tensor's bytes are moved at a time.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_ext.errors import DataError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "I8": torch.int8,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
LARGEST_HEADER = 100_000_000
"""safetensors' own limit, in bytes."""


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies and what it is."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int  # of its first byte in the file


def _header(path: Path) -> dict[str, Stored]:
    """The tensors of one file: their bytes lie one after the other up to its end. Raises
    DataError.
    """
    try:
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > LARGEST_HEADER:
                raise ValueError(f"a header of {length} bytes")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        found, end = {}, 0
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            first, last = entry["data_offsets"]
            shape = tuple(int(size) for size in entry["shape"])
            dtype = DTYPES.get(entry["dtype"])
            size = last - first if dtype is None else torch.Size(shape).numel() * dtype.itemsize
            if first != end or last - first != size or min(shape, default=0) < 0:
                raise ValueError(f"{name} lies at bytes {first} to {last}")
            found[name] = Stored(path, entry["dtype"], shape, 8 + length + first)
            end = last
        if path.stat().st_size != 8 + length + end:
            raise ValueError(f"{path.stat().st_size} bytes, the header says {8 + length + end}")
        return found
    except FileNotFoundError:
        raise DataError(
            f"shard {path.name} is missing", do="fetch the folder again", path=path.parent
        ) from None
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        struct.error,
        AttributeError,
        RecursionError,
    ) as error:
        raise DataError(
            f"shard {path.name} is damaged: {error}", do="fetch the folder again", path=path
        ) from error


def _files(folder: Path) -> dict[str, set[str]]:
    """File name -> the tensors that the index puts there; an empty set where there is no index."""
    index = folder / INDEX
    if index.is_file():
        try:
            table = json.loads(index.read_text())["weight_map"]
            places = {name: Path(file).name for name, file in table.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise DataError(f"{INDEX} cannot be read: {error!r}", path=index) from error
        if any(places[name] != file for name, file in table.items()):
            raise DataError(f"{INDEX} names a file outside its folder", path=index)
        files: dict[str, set[str]] = {}
        for name, file in places.items():
            files.setdefault(file, set()).add(name)
        return files
    if (folder / SINGLE).is_file():
        return {SINGLE: set()}
    pickles = sorted(folder.glob("pytorch_model*.bin"))
    why = "only pickled weights, which are not read" if pickles else f"no {SINGLE} and no {INDEX}"
    raise DataError(f"--model: {why}", do="use a folder with safetensors", path=folder)


class Shards:
    """The tensors of a folder by name."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tensors: dict[str, Stored] = {}
        for file, listed in _files(folder).items():
            header = _header(folder / file)
            missing = sorted(listed - set(header))
            if missing:
                raise DataError(
                    f"shard {file} lacks {len(missing)} tensors of the index, as {missing[0]}",
                    do="fetch the folder again",
                    path=folder,
                )
            twice = sorted(set(header) & set(self.tensors))
            if twice:
                raise DataError(f"{twice[0]} is in two shards", path=folder)
            self.tensors |= header

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of a tensor. Raises DataError where torch has none."""
        found = self.tensors[name].dtype
        if found not in DTYPES:
            raise DataError(f"{name} has dtype {found}, which is not read", path=self.folder)
        return DTYPES[found]

    def read(self, name: str, index: int | None = None) -> Tensor:
        """A tensor, or its slice `index` of the first dim."""
        stored = self.tensors[name]
        shape = stored.shape if index is None else stored.shape[1:]
        tensor = torch.empty(shape, dtype=self.dtype(name))
        raw = tensor.view(-1).view(torch.uint8).numpy()
        try:
            with open(stored.file, "rb") as file:
                file.seek(stored.offset + (index or 0) * raw.nbytes)
                count = file.readinto(raw.data)
        except OSError as error:
            raise DataError(f"{name} cannot be read: {error}", path=stored.file) from error
        if count != raw.nbytes:
            raise DataError(f"{name} is cut off", path=stored.file)
        return tensor


def plan(sizes: Mapping[str, int], largest: int) -> list[list[str]]:
    """Names in order, cut into shards of at most `largest` bytes (a larger tensor is alone)."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > largest:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


class Writer:
    """Shards whose tensors arrive in any order, whole or in slices of the first dim.

    `tensors`: name -> (dtype, shape). Files are made at once, with their headers; `close` checks
    that every byte has come and writes the index where there are several files.
    """

    def __init__(
        self,
        folder: Path,
        tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
        largest: int,
    ) -> None:
        self.folder = folder
        self._tensors = tensors
        sizes = {n: torch.Size(s).numel() * d.itemsize for n, (d, s) in tensors.items()}
        self.num_bytes = sum(sizes.values())
        self._missing = dict(sizes)
        self._place: dict[str, tuple[Path, int]] = {}
        shards = plan(sizes, largest)
        for number, names in enumerate(shards, 1):
            many = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            self._begin(folder / (many if len(shards) > 1 else SINGLE), names, sizes)
        self._is_split = len(shards) > 1

    def _begin(self, path: Path, names: Iterable[str], sizes: Mapping[str, int]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name in names:
            dtype, shape = self._tensors[name]
            ends = [offset, offset + sizes[name]]
            header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": ends}
            offset = ends[1]
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with open(path, "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(8 + len(text) + offset)
        for name in names:
            self._place[name] = (path, 8 + len(text) + header[name]["data_offsets"][0])

    def write(self, name: str, tensor: Tensor, index: int | None = None) -> None:
        """The whole tensor, or its slice `index` of the first dim."""
        dtype, shape = self._tensors[name]
        wanted = shape if index is None else shape[1:]
        assert tensor.dtype == dtype and tuple(tensor.shape) == tuple(wanted), (
            f"{name}: {tensor.dtype} {tuple(tensor.shape)}, planned {dtype} {wanted}"
        )
        raw = tensor.contiguous().view(-1).view(torch.uint8).numpy().data
        path, offset = self._place[name]
        with open(path, "r+b") as file:
            file.seek(offset + (index or 0) * len(raw))
            file.write(raw)
        self._missing[name] -= len(raw)

    def close(self) -> None:
        """The index, after a check that nothing is missing."""
        incomplete = [name for name, size in self._missing.items() if size]
        assert not incomplete, f"tensors not or twice written: {incomplete[:3]}"
        if self._is_split:
            table = {name: self._place[name][0].name for name in sorted(self._place)}
            index = {"metadata": {"total_size": self.num_bytes}, "weight_map": table}
            (self.folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
