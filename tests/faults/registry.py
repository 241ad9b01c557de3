"""The rows: what each does here, or which test stands for it, or that it is not built."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.faults import (
    rows_checkpoint,
    rows_course,
    rows_data,
    rows_hostile,
    rows_kill,
    rows_lease,
    rows_limits,
    rows_read,
    rows_trust,
    rows_watch,
)
from tests.faults.bench import Bench
from tests.faults.outcome import Outcome

FileRow = Callable[[Path, int, int], list[Outcome]]
RunRow = Callable[[Bench, int], list[Outcome]]


@dataclass(frozen=True)
class Row:
    """One row of the matrix."""

    title: str
    files: FileRow | None = None
    """Needs one process: (folder, seed, cases)."""
    cases: int = 0
    runs: RunRow | None = None
    """Trains: (bench, trials)."""
    trials: int = 0
    tests: tuple[str, ...] = ()
    """Tests that stand for the row, as pytest names them."""
    missing: str = ""
    """Why there is nothing."""


LAUNCH = "tests/launch"
KILLED_LAUNCHER = "test_a_killed_launcher_takes_its_ranks_with_it"

ROWS: dict[int, Row] = {
    1: Row("kill -9 of a rank at a named point", runs=rows_kill.row_1, trials=60),
    2: Row("kill -9 of the writer", runs=rows_kill.row_2, trials=2),
    3: Row("crash states of a save", tests=("tests/checkpoint/test_crash.py",)),
    4: Row("SIGTERM, SIGUSR1, SIGUSR2", runs=rows_kill.row_4, trials=6),
    5: Row("walltime shorter than a save", runs=rows_kill.row_5, trials=3),
    6: Row("kill -9 of the launcher", tests=(f"{LAUNCH}/test_local.py::{KILLED_LAUNCHER}",)),
    7: Row("disk full, failing, read-only", runs=rows_limits.row_7, trials=4),
    8: Row("corrupt shard", runs=rows_checkpoint.row_8, trials=1000),
    9: Row("truncated, missing, extra files", runs=rows_checkpoint.row_9, trials=500),
    10: Row("half-written folders, wrong latest", runs=rows_checkpoint.row_10, trials=7),
    11: Row("--load without a checkpoint", runs=rows_limits.row_11, trials=3),
    12: Row("NaN or Inf in the loss", tests=("tests/resilience/test_nonfinite.py",)),
    13: Row("NaN in one expert or router", tests=("tests/resilience/test_nonfinite.py",)),
    14: Row("bit flips in memory", tests=("tests/resilience/test_replicas.py",)),
    15: Row("hangs", tests=("tests/resilience/test_hang.py",)),
    16: Row("stragglers", tests=("tests/resilience/test_straggler.py",)),
    17: Row("slow disk", runs=rows_limits.row_17, trials=1),
    18: Row("corrupt .idx", files=rows_data.row_18, cases=2000),
    19: Row("corrupt .bin", files=rows_data.row_19, cases=2000),
    20: Row("ids outside the vocabulary", files=rows_data.row_20, cases=2000),
    21: Row("index caches", files=rows_data.row_21, cases=200),
    22: Row("wrong world size or batch", tests=("tests/config/test_checks.py",)),
    23: Row("another layout", tests=("tests/checkpoint/test_layouts.py",)),
    24: Row("other data, model, schedule", tests=("tests/checkpoint/test_same_run.py",)),
    25: Row("hostile pickles and YAML", files=rows_hostile.row_25, cases=200),
    26: Row("bombs", files=rows_hostile.row_26, cases=1000),
    27: Row("path traversal", runs=rows_checkpoint.row_27, trials=500),
    28: Row("foreign owner of a folder", runs=rows_checkpoint.row_28, trials=2),
    29: Row("two runs, one folder", files=rows_lease.row_29, cases=60),
    30: Row("clock jumps", runs=rows_limits.row_30, trials=4),
    31: Row("/dev/shm full", runs=rows_limits.row_31, trials=2),
    32: Row("few file handles", runs=rows_limits.row_32, trials=3),
    33: Row("orphans of a killed parent", tests=(f"{LAUNCH}/test_local.py::{KILLED_LAUNCHER}",)),
    34: Row("port in use", runs=rows_limits.row_34, trials=1),
    35: Row("restart in place", tests=("tests/launch/test_restarts.py",)),
    36: Row(
        "the same step fails again",
        tests=(f"{LAUNCH}/test_restarts.py::test_a_run_that_fails_three_times_at_one_step_stops",),
    ),
    37: Row("logs cannot be written", runs=rows_limits.row_37, trials=1),
    38: Row("metrics after a rollback", runs=rows_kill.row_38, trials=1),
    39: Row("stop and start at any step", runs=rows_kill.row_39, trials=7),
    40: Row("soak", runs=rows_kill.row_40, trials=1),
    41: Row("a rollback that is killed", files=rows_course.row_41, cases=200),
    42: Row("stopped ranks", runs=rows_watch.row_42, trials=6),
    43: Row("foreign or torn kept files", files=rows_trust.row_43, cases=300),
    44: Row("a failing fast tier", runs=rows_trust.row_44, trials=6),
    45: Row("a disk that refuses to be read", files=rows_read.row_45, cases=500),
}


def chosen(text: str) -> list[int]:
    """Row numbers of ``all`` or ``1,3,8-10``. Raises ValueError."""
    if text == "all":
        return list(ROWS)
    numbers: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        numbers += range(int(first), int(last or first) + 1)
    unknown = sorted(set(numbers) - set(ROWS))
    if unknown:
        raise ValueError(f"no row {unknown[0]}: rows are 1 to {max(ROWS)}")
    return list(dict.fromkeys(numbers))
