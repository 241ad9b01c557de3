"""Measure this machine in under two minutes and write configs/clusters/this-machine.yaml.

Measured: a large and a small matrix product (peak and half_rows), a large copy, an empty operation,
and all-gathers of two sizes on two gloo ranks (bandwidth and latency).  ``kernel_us`` is four times
the empty operation, autograd included; tests/planner/measure.py fits it to one training step.
torch is imported here only.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from statistics import median

from megatron_ext.costs.cluster import FOLDER

REPEATS = 7


def _seconds(run, repeats: int = REPEATS) -> float:
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return median(times)


def _product_rate(torch, rows: int, size: int) -> float:
    """FLOP/s of rows x size times size x size in fp32 on one thread."""
    a, b = torch.randn(rows, size), torch.randn(size, size)
    return 2 * rows * size * size / _seconds(lambda: a @ b)


def _gather_seconds(sizes: list[int]) -> list[float]:
    """On a gloo rank: median seconds of an all-gather of each size (bytes in all)."""
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    found = []
    for size in sizes:
        part = torch.ones(size // 4 // dist.get_world_size())
        out = torch.empty(part.numel() * dist.get_world_size())
        found.append(_seconds(lambda part=part, out=out: dist.all_gather_into_tensor(out, part)))
    dist.destroy_process_group()
    return found


def measure() -> dict:
    """The values of a cluster file."""
    import torch

    from megatron_ext.mesh.forks import run_ranks

    torch.set_num_threads(1)
    peak = _product_rate(torch, 1024, 1024)
    small = _product_rate(torch, 64, 256)
    big = torch.randn(16 << 20)
    copy = _seconds(lambda: big.clone())
    tiny = torch.ones(8)
    empty = _seconds(lambda: [tiny + 1 for _ in range(100)]) / 100
    sizes = [1 << 12, 1 << 24]
    first, second = run_ranks(_gather_seconds, 2, sizes)[0]
    rate = (sizes[1] - sizes[0]) / 2 / max(second - first, 1e-9)
    cores = len(os.sched_getaffinity(0))
    share = min(1.0, small / peak)
    half = 64 * (1 / share**0.5 - 1)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    gpu = {
        "name": "one-core",
        "peak_tflops": round(peak / 1e12, 5),
        "memory_gb": round(memory / cores, 2),
        "memory_gb_per_s": round(2 * big.numel() * 4 / copy / 1e9, 2),
        "gemm_efficiency": 1.0,
        "attention_efficiency": 0.3,
        "half_rows": round(half, 1),
        "half_width": round(half, 1),
        "kernel_us": round(4 * empty * 1e6, 2),
    }
    link = {"gb_per_s": round(rate / 1e9, 3), "latency_us": round(first * 1e6, 1)}
    ranks = 64
    return {
        "gpu": gpu,
        "gpus_per_node": ranks,
        "domain": ranks,
        "nodes": 1,
        "cores": cores,
        "reserve_gb": 0.5,
        "inside": link,
        "network": dict(link),
    }


def calibrate(name: str | None = None) -> str:
    """Measure, write the file, and say what was found."""
    import yaml

    path = Path(name) if name else FOLDER / "this-machine.yaml"
    start = time.monotonic()
    values = measure()
    text = yaml.safe_dump(values, sort_keys=False, default_flow_style=None)
    path.write_text(f"# Written by `python -m megatron_ext.planner calibrate`.\n{text}", "utf-8")
    return f"{text}written to {path} after {time.monotonic() - start:.0f} s"
