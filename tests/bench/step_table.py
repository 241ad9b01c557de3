"""The table and the JSON of step.py."""

from __future__ import annotations

import argparse
import math
import statistics
from dataclasses import dataclass, field
from typing import Any

from tests.bench import ceilings, table
from tests.bench.driver import Result, faster
from tests.bench.shapes import Shape

HEAD = (
    *("candidate", "tokens/s", "ms", "MFU", "peak MiB", "- imports", "parameters", "loss"),
    *("ours is", "notes"),
)


@dataclass
class Found:
    """Ceilings and ours over the rounds of all groups; the others with ours' rate by theirs."""

    limits: Result
    ours: Result
    others: list[tuple[Result, float]] = field(default_factory=list)

    def add(self, group: list[Result]) -> None:
        """The results of one group: ceilings, ours, others."""
        for mine, more in zip((self.limits, self.ours), group):
            mine.facts, mine.before = more.facts or mine.facts, mine.before or more.before
            mine.rounds += more.rounds
            mine.error = mine.error or more.error
        self.others += [(other, faster(group[1], other)) for other in group[2:]]


def row(result: Result, quotient: float, shape: Shape, ceiling: float) -> list[Any]:
    """A line of the table; `quotient`: ours' rate by this one's."""
    label = result.candidate.label
    if result.error or not result.rounds:
        return [label, *["-"] * (len(HEAD) - 2), f"not run: {result.error}"]
    seconds = statistics.median(result.seconds())
    rate = shape.tokens * result.candidate.ranks / seconds
    peak = max(one["peak_mib"] for one in result.rounds)
    losses = result.losses()
    return [
        label,
        f"{rate:,.0f}",
        f"{seconds * 1000:.1f}",
        f"{rate * shape.flops_per_token / 1e9 / ceiling:.1%}",
        f"{peak:,.0f}",
        f"{peak - result.facts.get('imports_mib', 0):,.0f}",
        f"{result.facts.get('parameters', 0):,}",
        f"{losses[0]:.2f} to {losses[-1]:.2f}",
        "" if math.isnan(quotient) else f"{quotient:.2f}x",
        result.facts.get("note", ""),
    ]


def report(found: Found, shape: Shape, args: argparse.Namespace) -> str:
    """The table and the lines under it."""
    if found.limits.error:
        return f"the ceilings were not measured: {found.limits.error}"
    measured = ceilings.medians(found.limits.rounds)
    ceiling = ceilings.of_dtype(measured, args.dtype)
    where, others = table.machine(), found.others
    rows = [row(found.ours, math.nan, shape, ceiling)]
    rows += [row(other, quotient, shape, ceiling) for other, quotient in others]
    settings = "ours" if args.tune_peers else "torch's defaults"
    lines = [
        f"{args.model} {args.dtype}: {shape.batch} x {shape.sequence} tokens a step,"
        f" {args.threads} threads, {args.rounds} rounds of {args.steps} steps; {where['cpu']},"
        f" {where['cores']} cores, load {where['load']}; allocator and oneDNN of peers: {settings}",
        "",
        table.markdown(HEAD, rows),
        "",
        ceilings.as_line(measured),
        f"MFU: {shape.flops_per_token / 1e6:.2f} MFLOP a token against {ceiling:,.0f} GFLOP/s"
        + ("" if args.dtype == "bf16" else " (the faster of the two fp32 products)"),
    ]
    table.write_json(
        args.json,
        {
            "table": "step",
            "model": args.model,
            "dtype": args.dtype,
            "threads": args.threads,
            "tuned_peers": args.tune_peers,
            "shape": shape.to_dict(),
            "ceilings": measured,
            "candidates": [
                _as_json(other, quotient, shape, ceiling)
                for other, quotient in [(found.ours, 1.0), *others]
            ],
        },
    )
    return "\n".join(lines)


def _as_json(result: Result, quotient: float, shape: Shape, ceiling: float) -> dict[str, Any]:
    base: dict[str, Any] = {"name": result.candidate.label, "error": result.error}
    if result.error or not result.rounds:
        return base
    rate = shape.tokens * result.candidate.ranks / statistics.median(result.seconds())
    return base | {
        "tokens_per_s": rate,
        "mfu": rate * shape.flops_per_token / 1e9 / ceiling,
        "peak_mib": max(one["peak_mib"] for one in result.rounds),
        "cpu_s_per_step": result.median("cpu_s"),
        "ours_by_this": None if math.isnan(quotient) else quotient,
        "losses": result.losses(),
        "seconds": [one["seconds"] for one in result.rounds],
        **result.facts,
    }
