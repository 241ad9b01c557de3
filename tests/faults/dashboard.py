"""The figures of a matrix run as text."""

from __future__ import annotations

from collections.abc import Sequence

from tests.faults.outcome import TRIED, Outcome, total
from tests.faults.registry import ROWS

COLUMNS = ("tried", "passed", "silent", "executed", "hung", "false", "failed")
TIMES = {
    "steps_lost": "steps lost a kill",
    "detect_s": "T1-T0 detection",
    "gone_s": "T2-T1 last rank gone",
    "rendezvous_s": "T5-T3 spawn to groups",
    "load_s": "T6-T5 model built, state loaded and verified",
    "first_step_s": "T7-T6 first new step",
    "mttr_s": "T7-T0 MTTR",
    "catch_up_s": "T8-T0 caught up",
    "blocked_s": "blocking time of a save",
    "slow_disk_blocked_s": "the same, fsync takes 0.2 s",
    "goodput": "goodput of the soak (share of wall time)",
}
BAD = ("silent", "executed", "hung", "false", "failed")


def percentile(values: Sequence[float], share: float) -> float:
    """Nearest rank."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def row_line(row: int, outcomes: Sequence[Outcome], seconds: float) -> str:
    """One line of the matrix."""
    cells = [total(outcomes, *TRIED)] + [total(outcomes, name) for name in COLUMNS[1:]]
    notes = [
        f"{count} {name}"
        for name in ("missed", "skipped", "not built")
        if (count := total(outcomes, name))
    ]
    if notes and not cells[0]:
        notes.append(outcomes[0].detail)
    numbers = " ".join(f"{cell:>8}" for cell in cells)
    return f"{row:>3}  {ROWS[row].title:<36}{numbers} {seconds:>7.1f}  {'; '.join(notes)}".rstrip()


def heading() -> str:
    """The names of the columns."""
    names = " ".join(f"{name:>8}" for name in COLUMNS)
    return f"row  {'fault':<36}{names} {'seconds':>7}"


def figures(outcomes: Sequence[Outcome]) -> list[str]:
    """p50, p95 and the largest of each figure."""
    lines = []
    for name, title in TIMES.items():
        values = [o.figures[name] for o in outcomes if name in o.figures]
        if values:
            p50, p95 = percentile(values, 0.5), percentile(values, 0.95)
            lines.append(
                f"{title:<46} p50 {p50:8.2f}  p95 {p95:8.2f}  max {max(values):8.2f}  "
                f"n {len(values)}"
            )
    return lines


def verdict(outcomes: Sequence[Outcome]) -> list[str]:
    """The last lines: sums, and how many trained to the same bits."""
    sums = "  ".join(f"{name} {total(outcomes, name)}" for name in BAD)
    stories = [outcome for outcome in outcomes if outcome.is_story]
    same, of = total(stories, "passed"), total(stories, *TRIED)
    left_out = "  ".join(
        f"{name} {total(outcomes, name)}" for name in ("missed", "skipped", "not built")
    )
    return [
        f"tried {total(outcomes, *TRIED)}  passed {total(outcomes, 'passed')}  {sums}",
        f"not tried: {left_out}",
        f"bitwise like the uninterrupted run: {same} of {of} runs",
    ]


def complaints(outcomes: Sequence[Outcome]) -> list[str]:
    """Every case that is not as it should be."""
    return [f"row {o.row} {o.verdict}: {o.case}: {o.detail}" for o in outcomes if o.verdict in BAD]


def is_clean(outcomes: Sequence[Outcome]) -> bool:
    """What exit code 0 means."""
    return not total(outcomes, *BAD)
