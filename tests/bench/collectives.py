"""gloo's collectives and the faster ones of --gloo-collectives, interleaved, on one machine.

    python -m tests.bench collectives --ranks 2 4 --rounds 5 --json collectives.json

Size: bytes of a rank's whole tensor (what all_reduce sums, reduce_scatter and all_to_all take,
all_gather and broadcast give). ms: median over the rounds of the slowest rank, of small ones the
mean of several calls in a row. Floor: what every rank reads of its input and writes of its output,
all ranks together, at the machine's copy rate (read and written bytes) of the same run. One thread
a rank. Where a faster form is only for larger sizes (gloo_collectives.py), its column is gloo's own
again, measured again.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

from megatron_ext.mesh.forks import run_ranks
from tests.bench import ceilings, table

KINDS = ("plain", "messages", "shared")
IN_A_ROW = 2 << 20
"""Bytes that are exchanged between two readings of the clock, at least one call."""
SAME_AS_PLAIN = {"all_reduce", "all_to_all", "broadcast"}  # of messages
OPS = ("all_reduce", "reduce_scatter", "all_gather", "all_to_all", "broadcast")
HEAD = (
    *("ranks", "collective", "dtype", "size", *(f"{kind} ms" for kind in KINDS)),
    *("messages by plain", "shared by plain", "floor ms", "shared of floor"),
)


def calls(dtype: str, num_bytes: int, ranks: int) -> dict[str, Callable[[], Any]]:
    """One call of each collective over tensors that stay."""
    import torch
    import torch.distributed as dist

    kind = getattr(torch, dtype)
    numel = num_bytes // kind.itemsize // ranks * ranks
    whole, other = torch.ones(numel, dtype=kind), torch.zeros(numel, dtype=kind)
    piece = torch.zeros(numel // ranks, dtype=kind)
    zeros = torch.zeros(numel, dtype=kind)
    return {
        "all_reduce": lambda: dist.all_reduce(zeros),
        "reduce_scatter": lambda: dist.reduce_scatter_single(piece, whole),
        "all_gather": lambda: dist.all_gather_single(other, piece),
        "all_to_all": lambda: dist.all_to_all_single(other, whole),
        "broadcast": lambda: dist.broadcast(other, src=0),
    }


def measure(sizes: Sequence[int], dtypes: Sequence[str], rounds: int) -> list[dict[str, Any]]:
    """On each rank: seconds of every collective, kind by kind within a round."""
    import torch
    import torch.distributed as dist

    from megatron_ext.device.select import keep_large_blocks
    from megatron_ext.mesh.gloo_collectives import faster

    keep_large_blocks()
    dist.init_process_group("gloo")
    found = []
    for dtype in dtypes:
        for size in sizes:
            made = calls(dtype, size, dist.get_world_size())
            seconds: dict[tuple[str, str], list[float]] = {}
            for _ in range(rounds):
                for kind in KINDS:
                    with faster(kind, 60.0):
                        dist.all_reduce(torch.zeros(1))  # meet
                        for op, call in made.items():
                            if kind == "messages" and op in SAME_AS_PLAIN:
                                continue
                            call()
                            seconds.setdefault((op, kind), []).append(
                                _timed(call, max(1, IN_A_ROW // size))
                            )
            found += [
                {"collective": op, "kind": kind, "dtype": dtype, "bytes": size, "seconds": each}
                for (op, kind), each in seconds.items()
            ]
    dist.destroy_process_group()
    return found


def _timed(call: Callable[[], Any], times: int) -> float:
    """Seconds of one of `times` calls."""
    import torch.distributed as dist

    dist.barrier()
    begin = time.perf_counter()
    for _ in range(times):
        call()
    return (time.perf_counter() - begin) / times


def slowest(of_ranks: Sequence[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The same lines with the slowest rank of each round."""
    return [
        lines[0] | {"seconds": [max(one) for one in zip(*(line["seconds"] for line in lines))]}
        for lines in zip(*of_ranks)
    ]


def touched(op: str, ranks: int) -> float:
    """Input read and output written by a rank, mean over ranks, in sizes of the whole tensor."""
    if op in ("reduce_scatter", "all_gather"):
        return 1 + 1 / ranks
    return 1.0 if op == "broadcast" else 2.0


def row(ranks: int, op: str, dtype: str, size: int, lines: list, copy_gb_s: float) -> list[Any]:
    """A line of the table."""
    ms = {
        line["kind"]: 1000 * statistics.median(line["seconds"])
        for line in lines
        if (line["collective"], line["dtype"], line["bytes"]) == (op, dtype, size)
    }
    floor = 1000 * ranks * touched(op, ranks) * size / (copy_gb_s * 1e9)

    def ratio(kind: str) -> str | None:
        return f"{ms['plain'] / ms[kind]:.2f}x" if kind in ms else None

    label = f"{size >> 10} KiB" if size < 1 << 20 else f"{size >> 20} MiB"
    return [
        *(ranks, op, dtype, label),
        *(f"{ms[kind]:.2f}" if kind in ms else None for kind in KINDS),
        *(ratio("messages"), ratio("shared")),
        *(f"{floor:.2f}", f"{floor / ms['shared']:.0%}"),
    ]


def main(argv: list[str]) -> int:
    """The table, and --json."""
    parser = table.parser("collectives", __doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--kib", type=int, nargs="+", default=[64, 1024, 4096, 16384, 65536])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    args = parser.parse_args(argv)
    sizes, found, rows = [1024 * size for size in args.kib], [], []
    limits = {"copy GB/s": ceilings.copy_gb_s()}
    for ranks in args.ranks:
        of_ranks = run_ranks(measure, ranks, sizes, args.dtypes, args.rounds, timeout_s=600)
        lines = slowest(of_ranks)
        found += [{"ranks": ranks, **line} for line in lines]
        rows += [
            row(ranks, op, dtype, size, lines, limits["copy GB/s"])
            for op in OPS
            for dtype in args.dtypes
            for size in sizes
        ]
    where = table.machine()
    print(f"{where['cpu']}, {where['cores']} cores, load {where['load']}, {args.rounds} rounds\n")
    print(table.markdown(HEAD, rows))
    print("\n" + ceilings.as_line(limits))
    table.write_json(args.json, {"table": "collectives", "ceilings": limits, "lines": found})
    return 0
