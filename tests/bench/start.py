"""How a rank starts, what it holds, and how a run grows.

    python -m tests.bench start                                    # all parts
    python -m tests.bench start --parts start experts --rounds 5 --json start.json

    start     imports, --dry-run, until the first step: time and memory (start_rank.py)
    experts   step time with 8 to 256 experts, as many of them active   (growth.py)
    ranks     CPU seconds a token with 1 to 16 gloo processes           (growth.py)
    sequence  step time with 512 to 8192 tokens in a sequence           (growth.py)
    logs      bytes written a step, by layers and experts               (log_volume.py)

Medians over --rounds rounds, candidates in turn. On two cores everything takes about ten minutes.
"""

from __future__ import annotations

import argparse
from typing import Any

from tests.bench import ceilings, growth, log_volume, start_rank, table
from tests.bench.shapes import add_flags, config_file

PARTS = ("start", *growth.PARTS, "logs")


def _size(text: str) -> tuple[int, int]:
    layers, experts = text.split("x")
    return int(layers), int(experts)


def options() -> argparse.ArgumentParser:
    """The flags."""
    parser = table.parser("start", __doc__)
    many: dict[str, Any] = {"nargs": "+", "type": int}
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    add_flags(parser, sequences="of a step, for experts")
    parser.add_argument("--steps", type=int, default=2, help="timed steps of a turn")
    parser.add_argument("--warm", type=int, default=2, help="steps before the first round")
    parser.add_argument("--threads", type=int, default=2, help="of a single process")
    parser.add_argument("--experts", **many, default=[8, 16, 32, 64, 128, 256])
    parser.add_argument("--ranks", **many, default=[1, 2, 4, 8, 16])
    parser.add_argument("--layouts", nargs="+", choices=("dp", "ep"), default=["dp", "ep"])
    parser.add_argument("--lengths", **many, default=[512, 1024, 2048, 4096, 8192])
    parser.add_argument("--tokens", type=int, default=8192, help="of a step, for sequence")
    parser.add_argument(
        "--sizes", nargs="+", type=_size, default=[(2, 8), (8, 8), (2, 64), (8, 64), (2, 256)],
        help="layers x experts, for logs",
    )  # fmt: skip
    return parser


def measured(part: str, args: argparse.Namespace) -> growth.Table:
    """One part."""
    if part in growth.PARTS:
        return growth.PARTS[part](args)
    if part == "start":
        lines = start_rank.measure(config_file(args.model), args.rounds)
        title = f"Start of a rank that trains {args.model}"
        return growth.Table(title, start_rank.HEAD, start_rank.rows(lines), lines, {})
    lines = log_volume.lines(args.sizes)
    rows = log_volume.rows(lines)
    return growth.Table("Bytes that a run writes about itself", log_volume.HEAD, rows, lines, {})


def main(argv: list[str]) -> int:
    """Measure and print."""
    args = options().parse_args(argv)
    found: dict[str, Any] = {}
    where = table.machine()
    print(f"{where['cpu']}, {where['cores']} cores, load {where['load']}, {args.rounds} rounds")
    for part in args.parts:
        made = measured(part, args)
        print(f"\n{made.title}\n\n{table.markdown(made.head, made.rows)}", flush=True)
        if made.limits:
            print(f"\n{ceilings.as_line(made.limits)}", flush=True)
        found[part] = {"lines": made.lines, "ceilings": made.limits}
    table.write_json(args.json, {"table": "start", "parts": found})
    return 0
