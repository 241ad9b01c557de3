"""Run the cases on forked ranks and put what came out into lines."""

from __future__ import annotations

import argparse
import contextlib
import os
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from megatron_ext.mesh.forks import RanksFailedError, run_ranks
from megatron_ext.parity.cases import Case
from megatron_ext.parity.compare import (
    TOLERANCES,
    Comparison,
    compare,
    rounding_of,
    tensor_difference,
)
from megatron_ext.parity.measure import Measurement, assemble, index_of, measure


@dataclass(frozen=True)
class Row:
    """One line of the table; `rank` is the first whose part of the worst gradient is out of
    tolerance.
    """

    case: str
    world_size: int
    comparison: Comparison | None
    rank: int | None
    seconds: float
    error: str | None = None

    @property
    def passed(self) -> bool:
        """True where the layout ran and agrees."""
        return self.comparison is not None and self.comparison.passed

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        return {**asdict(self), "passed": self.passed}


def _quiet_measure(argv: list[str], steps: int) -> Measurement:
    """`measure` without its chatter."""
    with open(os.devnull, "w") as sink, contextlib.redirect_stdout(sink):
        warnings.simplefilter("ignore")
        return measure(argv, steps)


def _run(argv: list[str], world_size: int, args: argparse.Namespace) -> list[Measurement]:
    return run_ranks(_quiet_measure, world_size, argv, args.steps, timeout_s=args.timeout_s)


def _whole(measurements: Sequence[Measurement]) -> dict[str, Any]:
    first = measurements[0]
    return {
        "losses": first.losses,
        "counts": first.counts_LE,
        "samples": sorted({i for one in measurements for i in one.samples}),
        "gradients": assemble([piece for one in measurements for piece in one.pieces]),
    }


def first_rank_that_differs(
    measurements: Sequence[Measurement], name: str, wanted: np.ndarray, tolerance: float
) -> int | None:
    """The first rank whose own part of the gradient `name` is out of tolerance."""
    for rank, one in enumerate(measurements):
        for key, shape, place, values in one.pieces:
            if key != name or len(shape) != wanted.ndim:
                continue
            expected = wanted[index_of(shape, place, values)]
            if tensor_difference(values, expected) > tolerance:
                return rank
    return None


def _reference(case: Case, base: list[str], args: argparse.Namespace) -> dict[str, Any]:
    """The one-rank run of a case's model; for bf16 also how far it is from fp32, per tensor."""
    reference = _whole(_run([*base, *case.model_flags], 1, args))
    if args.dtype == "bf16":
        exact = [flag for flag in base if flag != "--bf16"]
        fp32 = _whole(_run([*exact, *case.model_flags], 1, args))
        reference["rounding"] = rounding_of(reference["gradients"], fp32["gradients"])
    return reference


def _compare(case: Case, got: list[Measurement], reference: dict, dtype: str):
    """(comparison, first rank whose part of the worst gradient is out of tolerance)."""
    tolerance, rounding = TOLERANCES[dtype], reference.get("rounding", {})
    comparison = compare(_whole(got), reference, tolerance, rounding)
    tensor = comparison.worst_tensor
    wanted = reference["gradients"].get(tensor)
    if comparison.passed or wanted is None:
        return comparison, None
    limit = tolerance.of(tensor, rounding)
    return comparison, first_rank_that_differs(got, tensor, wanted, limit)


def run_all(chosen: Sequence[Case], base: list[str], args: argparse.Namespace) -> Iterator[Row]:
    """One row per case; one-rank references are run once per set of model switches."""
    references: dict[tuple[str, ...], dict[str, Any]] = {}
    for case in chosen:
        begin, size = time.monotonic(), case.layout.world_size
        key = tuple(case.model_flags)
        try:
            if key not in references:
                references[key] = _reference(case, base, args)
            got = _run([*base, *case.model_flags, *case.layout_flags], size, args)
        except RanksFailedError as error:
            yield Row(case.name, size, None, None, time.monotonic() - begin, str(error))
            continue
        comparison, rank = _compare(case, got, references[key], args.dtype)
        yield Row(case.name, size, comparison, rank, time.monotonic() - begin)


def line(row: Row) -> str:
    """One line of the table."""
    head = f"{'ok  ' if row.passed else 'FAIL'} {row.world_size:2d} ranks {row.seconds:6.1f} s"
    if row.comparison is None:
        last = [text for text in row.error.strip().splitlines() if text.strip()][-1].strip()
        return f"{head}  {row.case}: did not run: {last}"
    c = row.comparison
    counts = "equal" if c.flips == 0 else f"{c.flips:.1%} moved"
    text = (
        f"{head}  loss {c.loss:.0e}  gradient {c.gradient:.0e}  counts {counts}"
        f"  curve {c.curve:.0e}  {row.case}"
    )
    if c.reasons:
        where = f" (first on rank {row.rank})" if row.rank is not None else ""
        text += "".join(f"\n       {reason}" for reason in c.reasons) + where
    else:
        text += f"  [largest: {c.worst_tensor}]" if c.worst_tensor else ""
    return text


def summary(rows: Sequence[Row], seconds: float) -> str:
    """The last line."""
    failed = [row.case for row in rows if not row.passed]
    text = (
        f"{len(rows) - len(failed)} of {len(rows)} layouts are the same training, {seconds:.0f} s"
    )
    return text + (f"; failed: {', '.join(failed)}" if failed else "")
