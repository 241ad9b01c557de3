"""What this machine can do at most, measured among the candidates in the same run.

Dense products of 2048 x 2048 x 2048 (2 * 2048**3 FLOPs) in bf16, in fp32, and in fp32 through
oneDNN (torch's precision "medium", which stays fp32 where the CPU has no AMX); a copy of 128 MiB
(read and written bytes); O_DIRECT writes of 64 MiB and fsync. Medians of a few repetitions.
"""

from __future__ import annotations

import mmap
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

SIDE, COPIED, WRITTEN, BLOCK = 2048, 128 << 20, 64 << 20, 16 << 20


def seconds_of(action: Callable[[], object], repeat: int) -> float:
    """Median seconds of an action after one that is not counted."""
    action()
    found = []
    for _ in range(repeat):
        begin = time.perf_counter()
        action()
        found.append(time.perf_counter() - begin)
    return statistics.median(found)


def matmul_gflops(dtype: torch.dtype, precision: str = "highest", side: int = SIDE) -> float:
    """GFLOP/s of a square product."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        a, b = (torch.randn(side, side).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        return 2 * side**3 / seconds_of(lambda: torch.mm(a, b, out=out), 3) / 1e9
    finally:
        torch.set_float32_matmul_precision(before)


def copy_gb_s(num_bytes: int = COPIED) -> float:
    """GB/s of a copy, read and written bytes together."""
    a = torch.zeros(num_bytes, dtype=torch.uint8)
    b = torch.zeros_like(a)
    return 2 * num_bytes / seconds_of(lambda: b.copy_(a), 3) / 1e9


def direct_write_s(path: Path, num_bytes: int) -> float:
    """Seconds of O_DIRECT writes of `num_bytes`, rounded up to blocks, and fsync; raises OSError
    where the file system has none.
    """
    memory = mmap.mmap(-1, BLOCK)
    memory.write(os.urandom(BLOCK))
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_DIRECT", 0)
    begin = time.perf_counter()
    descriptor = os.open(path, flags)
    try:
        for _ in range(-(-num_bytes // BLOCK)):
            os.write(descriptor, memory)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return time.perf_counter() - begin


def direct_write_gb_s(folder: str | None = None, num_bytes: int = WRITTEN) -> float:
    """GB/s of `direct_write_s` into `folder`; nan where the file system has none."""
    with tempfile.TemporaryDirectory(dir=folder) as name:
        try:
            _, second = (direct_write_s(Path(name) / "direct", num_bytes) for _ in range(2))
        except OSError:
            return float("nan")
    return num_bytes / second / 1e9


def measure(side: int = SIDE) -> dict[str, float]:
    """All of them."""
    return {
        "bf16 GFLOP/s": matmul_gflops(torch.bfloat16, side=side),
        "fp32 GFLOP/s": matmul_gflops(torch.float32, side=side),
        "fp32 oneDNN GFLOP/s": matmul_gflops(torch.float32, "medium", side=side),
        "copy GB/s": copy_gb_s(),
        "O_DIRECT GB/s": direct_write_gb_s(),
    }


def medians(rounds: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Of the rounds of the candidate that measures (limits.py)."""
    found = [one["ceilings"] for one in rounds]
    return {name: statistics.median(one[name] for one in found) for name in found[0]}


def of_dtype(found: dict[str, float], dtype: str) -> float:
    """The ceiling, GFLOP/s, that a step of this precision is held against: the faster of the two in
    fp32.
    """
    if dtype == "bf16":
        return found["bf16 GFLOP/s"]
    return max(found["fp32 GFLOP/s"], found["fp32 oneDNN GFLOP/s"])


def as_line(found: dict[str, float]) -> str:
    """One line under a table."""
    return "ceilings measured in this run: " + ", ".join(
        f"{name.rsplit(' ', 1)[0]} {value:,.1f} {name.rsplit(' ', 1)[1]}"
        for name, value in found.items()
    )
