"""The file of one rank: the standard safetensors layout, known before a byte is written.

    8 bytes: length of the header | JSON header, padded with spaces | the tensors' bytes

A piece is named like its tensor where it is the whole one, else `name@place` (`fc1.weight@0_48`),
so any safetensors reader opens the file. Nothing in it can be executed.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_ext.checkpoint.spots import Spot

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}
TORCH_DTYPES = {name: dtype for dtype, name in DTYPES.items()}
HEADER_LIMIT = 100_000_000
"""Bytes; the safetensors package refuses more."""
_ALIGN = 64


def file_name(rank: int) -> str:
    """`rank_00003.safetensors`."""
    return f"rank_{rank:05d}.safetensors"


@dataclass(frozen=True)
class Layout:
    """Where the pieces of a file lie: `places` are (index of the spot, offset in the file)."""

    header: bytes
    places: tuple[tuple[int, int], ...]
    num_bytes: int


def _entry_name(spot: Spot) -> str:
    return spot.name if spot.is_whole else f"{spot.name}@{'_'.join(map(str, spot.place))}"


def arrange(spots: Sequence[Spot]) -> Layout:
    """Wide dtypes first, so that every tensor is aligned; otherwise in the given order. Pure: rank
    0 knows from the plan where each rank puts its pieces.
    """
    order = sorted(range(len(spots)), key=lambda i: -spots[i].dtype.itemsize)
    entries: dict[str, dict] = {}
    starts, position = [], 0
    for index in order:
        spot = spots[index]
        stop = position + spot.num_bytes
        entries[_entry_name(spot)] = {
            "dtype": DTYPES[spot.dtype],
            "shape": list(spot.size),
            "data_offsets": [position, stop],
        }
        starts.append((index, position))
        position = stop
    assert len(entries) == len(spots), "two pieces of a file have one name"
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGN)
    header = struct.pack("<Q", len(text)) + text
    places = tuple((index, len(header) + start) for index, start in starts)
    return Layout(header, places, len(header) + position)
