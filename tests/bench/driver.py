"""Candidates in processes of their own, asked in turn: A B C A B C ...

A round is one turn of every candidate, so that whatever else the machine does meets all of them
alike; figures are medians over the rounds, and a comparison is the median of the quotients within a
round.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_ext.mesh.forks import free_port
from tests.bench.gate import SETTLE_S

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Candidate:
    """One line of a table: tests.bench.`module` with `name`, on `ranks` processes of `threads`."""

    label: str
    module: str
    name: str = ""
    python: str = sys.executable
    threads: int = 2
    ranks: int = 1
    more: dict[str, Any] = field(default_factory=dict)


@dataclass
class Result:
    """What came back; `error` where it did not run; `before`: losses of the steps to warm up."""

    candidate: Candidate
    facts: dict[str, Any] = field(default_factory=dict)
    before: list[float] = field(default_factory=list)
    rounds: list[dict[str, Any]] = field(default_factory=list)
    error: str = ""

    def seconds(self) -> list[float]:
        """Of a step, the median of each round."""
        return [statistics.median(one["seconds"]) for one in self.rounds]

    def losses(self) -> list[float]:
        """Of all steps in order."""
        return [*self.before, *(loss for one in self.rounds for loss in one["losses"])]

    def median(self, name: str) -> float:
        """Median over the rounds of what a round reports under a name."""
        return statistics.median(one[name] for one in self.rounds)


class Processes:
    """The processes of one candidate, one per rank."""

    def __init__(self, candidate: Candidate, spec: dict[str, Any], folder: Path) -> None:
        self.result = Result(candidate)
        self.log = folder / f"{candidate.module}-{candidate.label}".replace("/", "_").replace(
            " ", "_"
        )
        path = Path(f"{self.log}.json")
        path.write_text(json.dumps({**spec, **candidate.more}))
        port = str(free_port())
        self.running = []
        for rank in range(candidate.ranks):
            env = {
                **os.environ,
                "OMP_NUM_THREADS": str(candidate.threads),
                **{"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_PORT": port},
                **{name: str(candidate.ranks) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE")},
                "MASTER_ADDR": "127.0.0.1",
            }
            with open(f"{self.log}.{rank}.log", "w") as log:
                self.running.append(
                    subprocess.Popen(
                        [candidate.python, "-m", "tests.bench.worker"]
                        + [f"{candidate.module}:{candidate.name}", str(path)],
                        **{"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": log},
                        cwd=ROOT,
                        env=env,
                        text=True,
                        bufsize=1,
                    )
                )

    def _answers(self, limit_s: float) -> list[dict[str, Any]]:
        """One line of every rank, or [] and the error noted."""
        found, deadline = [], time.monotonic() + limit_s
        for rank, process in enumerate(self.running):
            left = max(0.0, deadline - time.monotonic())
            ready, _, _ = select.select([process.stdout], [], [], left)
            line = process.stdout.readline() if ready else ""
            answer = json.loads(line) if line else {"error": self._silent(rank, bool(ready))}
            if "error" in answer:
                self.result.error = answer["error"]
                self.close()
                return []
            found.append(answer)
        return found

    def _silent(self, rank: int, has_ended: bool) -> str:
        lines = Path(f"{self.log}.{rank}.log").read_text().strip().splitlines() or ["no output"]
        return f"{'ended' if has_ended else 'no answer in time'}: {lines[-1][:160]}"

    def wait_ready(self, limit_s: float) -> None:
        """Until every rank stands before its first step."""
        if answers := self._answers(limit_s):
            most = max(answer.get("imports_mib", 0.0) for answer in answers)
            self.result.facts = answers[0] | {"imports_mib": most}

    def turn(self, untimed: int, timed: int, limit_s: float) -> dict[str, Any] | None:
        """One turn; the figures of rank 0 and the most memory of any rank."""
        if self.result.error:
            return None
        for process in self.running:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(json.dumps({"untimed": untimed, "timed": timed}) + "\n")
                process.stdin.flush()
        answers = self._answers(limit_s)
        if not answers:
            return None
        both = [answer["peak_mib"] for answer in answers]
        return {
            **answers[0],
            "peak_mib": max(both),
            "cpu_s": sum(answer["cpu_s"] for answer in answers),
        }

    def close(self) -> None:
        """Close the pipes; whoever does not end at that is killed."""
        for process in self.running:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
        for process in self.running:
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            process.stdout.close()


@contextlib.contextmanager
def started(
    candidates: Sequence[Candidate], spec: dict[str, Any], limit_s: float, warm: int, say=print
) -> Iterator[list[Processes]]:
    """All candidates, loaded one after the other and warm."""
    with tempfile.TemporaryDirectory() as name:
        all_: list[Processes] = []
        try:
            for candidate in candidates:
                begin = time.monotonic()
                one = Processes(candidate, {**spec, "folder": name}, Path(name))
                all_.append(one)
                one.wait_ready(limit_s)
                first = one.turn(0, warm, limit_s) if warm else None
                one.result.before = first["losses"] if first else []
                state = one.result.error or f"ready after {time.monotonic() - begin:.0f} s"
                say(f"{candidate.label}: {state}", file=sys.stderr, flush=True)
            yield all_
        finally:
            for one in all_:
                one.close()


def interleaved(
    all_: Sequence[Processes], rounds: int, timed: int, limit_s: float, untimed: int = 1
) -> list[Result]:
    """`rounds` turns of everybody, in the same order each time."""
    for _ in range(rounds):
        for one in all_:
            found = one.turn(untimed, timed, limit_s)
            if found is not None:
                one.result.rounds.append(found)
            time.sleep(SETTLE_S)
    return [one.result for one in all_]


def faster(ours: Result, other: Result) -> float:
    """Median over the rounds of ours' rate by the other's; nan where one did not run. Several ranks
    do the work of as many steps.
    """
    if ours.error or other.error:
        return float("nan")
    work = ours.candidate.ranks / other.candidate.ranks
    return work * statistics.median(b / a for a, b in zip(ours.seconds(), other.seconds()))
