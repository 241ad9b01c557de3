"""python -m tests.faults: break runs and files on purpose, and print what came of it."""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.faults.outcome import Outcome, folded

BROKEN = 1
"""Exit code where a row is not clean."""
ROOT = Path(__file__).resolve().parents[2]
TEST_LIMIT_S = 1200


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser("python -m tests.faults", description=__doc__)
    made.add_argument("--rows", default="all", help="all, or numbers: 1,3,8-10")
    made.add_argument("--kills", type=int, default=60, help="trials of row 1")
    made.add_argument("--seed", type=int, default=1, help="decides every fault")
    made.add_argument("--scale", type=float, default=1.0, help="times the cases of other rows")
    made.add_argument("--time-limit", type=float, default=None, help="seconds; later rows skip")
    made.add_argument("--no-tests", action="store_true", help="leave rows to pytest out")
    made.add_argument("--json", type=Path, default=None, help="file for all outcomes")
    made.add_argument("--keep", type=Path, default=None, help="folder for the trials")
    return made


def prepare_zygote() -> None:
    """Imports once what every rank needs; ranks are forked from here. Before the registry, whose
    rows import megatron-core.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    warnings.simplefilter("ignore", UserWarning)  # megatron-core about packages it does without
    import torch

    torch.set_num_threads(1)
    from megatron_ext.device import start

    start("cpu")
    import pretrain_moe  # noqa: F401
    from megatron_ext.train import loop, setup  # noqa: F401
    from tests.faults.ranks import become_subreaper

    become_subreaper()


class Matrix:
    """One run of the matrix."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        from tests.faults.bench import Bench

        self.args, self.folder = args, folder
        self.bench = Bench(folder / "runs", args.seed)
        self.begin = time.monotonic()
        self.tested: dict[str, tuple[int, int, int]] = {}

    def run(self, number: int) -> list[Outcome]:
        """One row."""
        from tests.faults.registry import ROWS

        row = ROWS[number]
        if row.missing:
            return [Outcome(number, row.title, "not built", row.missing)]
        limit = self.args.time_limit
        if limit is not None and time.monotonic() - self.begin > limit:
            return [Outcome(number, row.title, "skipped", "--time-limit")]
        if row.tests:
            return self._tests(number, row)
        if row.files is not None:
            count = max(10, int(row.cases * self.args.scale))
            return row.files(self.folder / f"row_{number}", self.args.seed, count)
        trials = self.args.kills if number == 1 else max(1, int(row.trials * self.args.scale))
        self.bench.begin(number)
        return row.runs(self.bench, trials)

    def _tests(self, number: int, row: Any) -> list[Outcome]:
        if self.args.no_tests:
            return [Outcome(number, row.title, "skipped", f"--no-tests: {' '.join(row.tests)}")]
        absent = [test for test in row.tests if not (ROOT / test.partition("::")[0]).exists()]
        if absent:
            return [Outcome(number, row.title, "not built", f"there is no {absent[0]}")]
        passed = failed = skipped = 0
        for test in row.tests:
            counts = self.tested.setdefault(test, run_test(test))
            passed, failed, skipped = (a + b for a, b in zip((passed, failed, skipped), counts))
        found = [Outcome(number, " ".join(row.tests), "passed", count=passed)] if passed else []
        if failed:
            found.append(Outcome(number, " ".join(row.tests), "failed", "pytest", count=failed))
        if skipped or not found:
            found.append(Outcome(number, row.title, "skipped", "pytest", count=max(1, skipped)))
        return found


def run_test(test: str) -> tuple[int, int, int]:
    """(passed, failed, skipped) of a test file."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *test.split()]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=TEST_LIMIT_S, check=False
    )
    last = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else ""
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (\w+)", last)}
    failed = counts.get("failed", 0) + counts.get("errors", 0) + counts.get("error", 0)
    if done.returncode not in (0, 1, 5):
        failed = max(1, failed)
    return counts.get("passed", 0), failed, counts.get("skipped", 0)


def main(argv: list[str] | None = None) -> int:
    """Runs the rows; 0 where each is clean."""
    args = parser().parse_args(argv)
    prepare_zygote()
    from tests.faults import dashboard
    from tests.faults.registry import chosen

    numbers = chosen(args.rows)
    folder = args.keep or Path(tempfile.mkdtemp(prefix="faults_"))
    folder.mkdir(parents=True, exist_ok=True)
    print(f"rows {args.rows}, kills {args.kills}, seed {args.seed}, trials in {folder}")
    print(dashboard.heading(), flush=True)
    matrix, outcomes = Matrix(args, folder), []
    for number in numbers:
        begin = time.monotonic()
        found = matrix.run(number)
        print(dashboard.row_line(number, found, time.monotonic() - begin), flush=True)
        outcomes += found
    lines = [*dashboard.figures(outcomes), "", *dashboard.verdict(outcomes)]
    print("\n".join(["", *lines, *dashboard.complaints(outcomes)]), flush=True)
    if args.json is not None:
        args.json.write_text(json.dumps([asdict(o) for o in folded(outcomes)], indent=1))
    if dashboard.is_clean(outcomes) and args.keep is None:
        shutil.rmtree(folder, ignore_errors=True)
    return 0 if dashboard.is_clean(outcomes) else BROKEN


if __name__ == "__main__":
    sys.exit(main())
