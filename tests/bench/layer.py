"""One MoE layer forward and backward: ours, the peers', and a dense product of equal FLOPs.

    python -m tests.bench layer --peers --json layer.json            # two small shapes on a CPU
    python -m tests.bench layer --device cuda --peers                # the published shapes on a GPU
    python -m tests.bench layer --shape 4096,512,384,32,4

A shape is tokens, hidden size, expert width, experts, top-k. Each candidate is a process of its
own; rounds are interleaved. FLOPs: 6 * tokens * top-k * hidden * width forward, twice that
backward; the router is not counted. 'grouped product' is torch.nn.functional.grouped_mm of
tokens * top-k rows in `experts` equal groups (the three products of a SwiGLU expert), 'dense
product' the same FLOPs with one weight for all rows: what the expert products could reach.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import torch

from tests.bench import ceilings, table
from tests.bench.driver import Candidate, Result, faster, interleaved, started
from tests.bench.peers import candidates as peers
from tests.bench.shapes import Shape, dtype_of

CPU_SHAPES = ((2048, 256, 256, 16, 2), (2048, 512, 384, 32, 4))
CUDA_SHAPES = (
    (24576, 1536, 256, 128, 8),
    (32768, 4096, 512, 128, 8),
    (32768, 4096, 2048, 64, 4),
)
SEQUENCE = 512
SECONDS_TO_LOAD, SECONDS_OF_A_TURN = 300, 300
HEAD = (
    *("candidate", "forward ms", "backward ms", "forward", "backward", "of the ceiling"),
    *("peak MiB", "ours is", "notes"),
)


def shape_of(numbers: tuple[int, ...]) -> Shape:
    """A decoder of one layer around the numbers of a shape."""
    tokens, hidden, width, experts, topk = numbers
    return Shape(
        hidden=hidden,
        layers=1,
        heads=max(1, hidden // 64),
        experts=experts,
        topk=topk,
        width=width,
        vocabulary=1024,
        sequence=min(SEQUENCE, tokens),
        batch=tokens // min(SEQUENCE, tokens),
        aux=0.01,
    )


def forward_flops(shape: Shape) -> float:
    """Three matrices of hidden x width for each of the top-k rows of a token."""
    return 6.0 * shape.tokens * shape.topk * shape.hidden * shape.width


def label_of(numbers: tuple[int, ...]) -> str:
    """(tokens, hidden, width, experts, top-k)."""
    return "(" + ", ".join(map(str, numbers)) + ")"


def candidates(args: argparse.Namespace, device: str) -> list[Candidate]:
    """Ours, the floors, the peers (CUDA: those in this environment as well)."""
    found = [
        Candidate("ours", "layer_worker", "ours", threads=args.threads),
        Candidate("dense product", "layer_worker", "dense", threads=args.threads),
        Candidate("grouped product", "layer_worker", "grouped", threads=args.threads),
    ]
    if device == "cuda":
        label = "ours, --moe-kernels triton"
        found.insert(1, Candidate(label, "layer_worker", "ours triton", threads=args.threads))
    return found + peers.candidates(args, "layer_worker", "megatron" if device == "cuda" else "")


def times(result: Result) -> tuple[float, float]:
    """Forward and backward seconds, medians over the rounds."""
    return result.median("forward_s"), result.median("backward_s")


def row(result: Result, ours: Result, shape: Shape, ceiling: float, unit: float) -> list[Any]:
    """A line of the table."""
    if result.error or not result.rounds:
        return [result.candidate.label, *["-"] * (len(HEAD) - 2), f"not run: {result.error}"]
    forward, backward = times(result)
    flops = forward_flops(shape)
    return [
        result.candidate.label,
        f"{forward * 1000:.2f}",
        f"{backward * 1000:.2f}",
        f"{flops / forward / unit:,.1f}",
        f"{2 * flops / backward / unit:,.1f}",
        f"{3 * flops / (forward + backward) / ceiling:.0%}",
        f"{max(one['peak_mib'] for one in result.rounds):,.0f}",
        "" if result is ours else f"{faster(ours, result):.2f}x",
        result.facts.get("note", ""),
    ]


def measured_shape(args: argparse.Namespace, numbers: tuple[int, ...], device: str):
    """(results, shape, ceiling FLOP/s) of one shape."""
    shape = shape_of(numbers)
    spec = {
        "shape": shape.to_dict(),
        "dtype": args.dtype,
        "threads": args.threads,
        "device": device,
        "tune": args.tune_peers,
    }
    with started(candidates(args, device), spec, SECONDS_TO_LOAD, args.warm) as all_:
        results = interleaved(all_, args.rounds, args.steps, SECONDS_OF_A_TURN)
    dtype = dtype_of(args.dtype)
    if device == "cuda":
        side = 8192
        a, b = (torch.randn(side, side, device="cuda", dtype=dtype) for _ in range(2))

        def product() -> None:
            torch.mm(a, b)
            torch.cuda.synchronize()

        return results, shape, 2 * side**3 / ceilings.seconds_of(product, 5)
    torch.set_num_threads(args.threads)
    both = [ceilings.matmul_gflops(dtype, name) for name in ("highest", "medium")]
    return results, shape, max(both) * 1e9


def main(argv: list[str]) -> int:
    """Measure and print a table for each shape; 1 where ours did not run."""
    parser = table.parser("layer", __doc__)
    parser.add_argument("--shape", action="append", help="tokens,hidden,width,experts,topk")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--steps", type=int, default=10, help="timed repetitions of a turn")
    parser.add_argument("--warm", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    peers.add_flags(parser)
    args = parser.parse_args(argv)
    given = [tuple(map(int, text.split(","))) for text in args.shape or []]
    shapes = given or (CPU_SHAPES if args.device == "cpu" else CUDA_SHAPES)
    unit, name = (1e12, "TFLOP/s") if args.device == "cuda" else (1e9, "GFLOP/s")
    found, is_bad = [], False
    for numbers in shapes:
        results, shape, ceiling = measured_shape(args, numbers, args.device)
        rows = [row(result, results[0], shape, ceiling, unit) for result in results]
        print(f"\n{label_of(numbers)} {args.dtype} {args.device}, {name}:\n")
        print(table.markdown(HEAD, rows))
        print(f"\ndense product of this run: {ceiling / unit:,.1f} {name}", flush=True)
        is_bad = is_bad or bool(results[0].error)
        found.append(
            {
                "shape": numbers,
                "ceiling": ceiling,
                "candidates": [as_json(result, shape) for result in results],
            }
        )
    content = {"table": "layer", "dtype": args.dtype, "tuned_peers": args.tune_peers}
    table.write_json(args.json, {**content, "shapes": found})
    return int(is_bad)


def as_json(result: Result, shape: Shape) -> dict[str, Any]:
    """A candidate's figures."""
    base = {"name": result.candidate.label, "error": result.error, **result.facts}
    if result.error or not result.rounds:
        return base
    forward, backward = times(result)
    return base | {
        "forward_s": forward,
        "backward_s": backward,
        "forward_flop_s": forward_flops(shape) / forward,
        "backward_flop_s": 2 * forward_flops(shape) / backward,
        "peak_mib": statistics.median(one["peak_mib"] for one in result.rounds),
    }
