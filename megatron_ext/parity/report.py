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
from megatron_ext.parity.compare import TOLERANCES, Comparison, compare, tensor_difference
from megatron_ext.parity.measure import Measurement, assemble, measure


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
            lead = len(shape) - values.ndim
            index = tuple(place[:lead]) + tuple(
                slice(begin, begin + size) for begin, size in zip(place[lead:], values.shape)
            )
            expected = wanted[index]
            if tensor_difference(values, expected) > tolerance:
                return rank
    return None


def run_all(chosen: Sequence[Case], base: list[str], args: argparse.Namespace) -> Iterator[Row]:
    """One row per case; one-rank references are run once per set of model switches."""
    tolerance = TOLERANCES[args.dtype]
    references: dict[tuple[str, ...], dict[str, Any]] = {}
    for case in chosen:
        begin = time.monotonic()
        key = tuple(case.model_flags)
        try:
            if key not in references:
                references[key] = _whole(_run([*base, *case.model_flags], 1, args))
            flags = [*base, *case.model_flags, *case.layout_flags]
            got = _run(flags, case.layout.world_size, args)
        except RanksFailedError as error:
            seconds = time.monotonic() - begin
            yield Row(case.name, case.layout.world_size, None, None, seconds, str(error))
            continue
        comparison = compare(_whole(got), references[key], tolerance)
        wanted = references[key]["gradients"].get(comparison.worst_tensor)
        rank = None
        if not comparison.passed and wanted is not None:
            rank = first_rank_that_differs(got, comparison.worst_tensor, wanted, tolerance.gradient)
        yield Row(case.name, case.layout.world_size, comparison, rank, time.monotonic() - begin)


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
