"""What came of one fault."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

Verdict = Literal[
    "passed", "silent", "executed", "hung", "false", "failed", "missed", "skipped", "not built"
]
"""passed: as the row asks; silent: a damaged thing was taken as good; executed: its code ran;
hung: no end in time; false: a good thing was refused; failed: any other wrong end; missed: the
fault's point was never reached, so nothing was tried; skipped: this machine cannot; not built.
"""
TRIED = ("passed", "silent", "executed", "hung", "false", "failed")


@dataclass(frozen=True)
class Outcome:
    """One case of one row."""

    row: int
    case: str
    verdict: Verdict
    detail: str = ""
    figures: dict[str, float] = field(default_factory=dict)
    """Seconds and counts that the dashboard gathers: steps_lost, detect_s, mttr_s, ..."""
    count: int = 1
    """Cases that this outcome stands for (rows that try thousands add equal ones up)."""
    is_story: bool = False
    """It is a whole run, compared bit for bit with its reference."""


def total(outcomes: Iterable[Outcome], *verdicts: str) -> int:
    """How many cases ended so."""
    return sum(outcome.count for outcome in outcomes if outcome.verdict in verdicts)


def folded(outcomes: Iterable[Outcome]) -> list[Outcome]:
    """Passed cases of the same kind (the words before ':') become one line with their count."""
    counts: dict[tuple[int, str], int] = {}
    kept = []
    for outcome in outcomes:
        if outcome.verdict == "passed" and not outcome.figures and not outcome.is_story:
            key = (outcome.row, outcome.case.partition(":")[0])
            counts[key] = counts.get(key, 0) + outcome.count
        else:
            kept.append(outcome)
    passed = [Outcome(row, case, "passed", count=count) for (row, case), count in counts.items()]
    return passed + kept
