"""Predicted against measured step times of gloo layouts on this machine; no test.

    python -m tests.planner.measure [STEPS]      prints the table of docs/planner.md

One number is fitted: the speed of a core, so that the prediction of the first row (one rank) is its
measurement.  All other numbers are those of configs/clusters/this-machine.yaml, which
`python -m megatron_ext.planner calibrate` writes.  Each measurement is the fastest
step after the first two, of the slowest rank: what the machine does when others leave it alone.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from megatron_ext.config import parse
from megatron_ext.costs.cluster import Cluster, load
from megatron_ext.device import start
from megatron_ext.planner.step_time import step
from tests.ranks.harness import run_ranks
from tests.ranks.tiny import TINY

SIZE = (
    "--num-layers 4 --hidden-size 256 --ffn-hidden-size 512 --moe-ffn-hidden-size 256"
    " --seq-length 256 --max-position-embeddings 256 --global-batch-size 8"
)
TP, PP, EP, CP = (
    f"--{name}-parallel-size"
    for name in ("tensor-model", "pipeline-model", "expert-model", "context")
)
SP, ETP1, DIST = (
    "--sequence-parallel",
    "--expert-tensor-parallel-size 1",
    ("--use-distributed-optimizer"),
)
VPP = "--num-virtual-stages-per-pipeline-rank 2"
LAYOUTS = [
    (1, ""),
    (1, "--micro-batch-size 4"),
    (1, "--num-layers 8"),
    (1, "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"),
    (2, ""),
    (2, DIST),
    (2, f"{EP} 2"),
    (2, f"{EP} 2 {DIST}"),
    (2, f"{TP} 2 {SP}"),
    (2, f"{TP} 2 {SP} {ETP1}"),
    (2, f"{PP} 2"),
    (2, f"{PP} 2 {VPP}"),
    (2, f"{CP} 2"),
    (2, "--micro-batch-size 4"),
    (4, DIST),
    (4, f"{EP} 4 {DIST}"),
    (4, f"{EP} 2 {DIST}"),
    (4, f"{TP} 2 {SP} {ETP1}"),
    (4, f"{TP} 2 {SP} {EP} 2 {ETP1}"),
    (4, f"{PP} 2 {EP} 2 {DIST}"),
    (4, f"{PP} 4"),
    (4, f"{PP} 2 {TP} 2 {SP}"),
    (4, f"{CP} 2 {EP} 2"),
]


def timed(argv: list[str]) -> list[float]:
    """Seconds of each step on this rank."""
    from megatron_ext.train import loop
    from pretrain_moe import main

    stock, times = loop.train_step, []

    def train_step(*args, **kwargs):
        torch.distributed.barrier()
        begin = time.perf_counter()
        result = stock(*args, **kwargs)
        times.append(time.perf_counter() - begin)
        return result

    loop.train_step = train_step
    main(argv)
    return times


def measured(argv: list[str], ranks: int, steps: int) -> float:
    """Seconds of the fastest step of the slowest rank."""
    with tempfile.TemporaryDirectory() as folder:
        words = [*argv, "--train-iters", str(steps), "--run-dir", str(Path(folder) / "run")]
        every = run_ranks(timed, ranks, words, timeout_s=300)
    return min(max(times) for times in list(zip(*every))[2:])


def faster(cluster: Cluster, factor: float) -> Cluster:
    """The cluster with all of a core's rates times `factor`."""
    part = cluster.parts[0]
    gpu = replace(
        part.gpu,
        peak_tflops=part.gpu.peak_tflops * factor,
        memory_gb_per_s=part.gpu.memory_gb_per_s * factor,
        kernel_us=part.gpu.kernel_us / factor,
    )
    return replace(cluster, parts=(replace(part, gpu=gpu),))


def main() -> None:
    """Measure, predict, print."""
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 10
    start("cpu")
    cluster = load("this-machine")
    rows = []
    for ranks, extra in LAYOUTS:
        argv = [*TINY, *SIZE.split(), *extra.split()]
        cfg = parse([*argv, "--dry-run"], {"WORLD_SIZE": str(ranks)})
        seconds = measured(argv, ranks, steps)
        if not rows:
            cluster = faster(cluster, step(cfg, cluster).seconds / seconds)
        guess = step(cfg, cluster).seconds
        rows.append(guess / seconds - 1)
        print(f"| {ranks} | `{extra or '-'}` | {seconds:.3f} | {guess:.3f} | {rows[-1]:+.0%} |")
        sys.stdout.flush()
    errors = [abs(row) for row in rows[1:]]
    summary = {
        "mean": sum(errors) / len(errors),
        "worst": max(errors),
        "load": os.getloadavg(),
        "peak_tflops": cluster.parts[0].gpu.peak_tflops,
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
