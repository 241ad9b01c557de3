"""What the rows that train share: data, plans, references, and the verdict on a story."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

from tests.faults import program, trial
from tests.faults.outcome import Outcome, Verdict
from tests.faults.points import POINTS, RANK_ZERO
from tests.faults.ranks import Ranks
from tests.faults.trial import Plan, Story
from tests.ranks import fingerprint

COMMON_LAYOUT = "pp2 ep2 distopt"


class Bench:
    """A folder for trials, one seed, and the references that were already run."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.seed = folder, seed
        self.random = random.Random(seed)
        self.data = trial.write_data(folder / "data", seed)
        self._references: dict[tuple[str, ...], Story] = {}
        self._count = 0

    def begin(self, row: int) -> None:
        """The faults of a row do not depend on the rows before it."""
        self.random.seed(f"{self.seed} {row}")

    def plan(self, layout: str = COMMON_LAYOUT, *flags: str) -> Plan:
        """A new folder for a run of a layout."""
        self._count += 1
        out = self.folder / f"trial_{self._count:04d}"
        return Plan(out, self._flags(layout, flags))

    def _flags(self, layout: str, flags: tuple[str, ...]) -> tuple[str, ...]:
        seed = ("--seed", str(1 + self.seed % 10_000), "--data-path", str(self.data))
        return (*trial.LAYOUTS[layout].split(), *seed, *flags)

    def reference(self, layout: str = COMMON_LAYOUT, *flags: str) -> Story:
        """The uninterrupted run; run once for each set of flags."""
        key = (layout, *flags)
        if key not in self._references:
            plan = Plan(self.folder / f"ref_{len(self._references)}", self._flags(layout, flags))
            self._references[key] = trial.story(plan, attempts=1)
            if not self._references[key].endings[-1].is_good:
                raise RuntimeError(f"the reference run failed: {self._references[key].logs()}")
        return self._references[key]

    def kill(self) -> program.Fault:
        """A random kill: rank, point, step, call, byte."""
        draw = self.random
        point = draw.choice(list(POINTS))
        rank = 0 if point in RANK_ZERO else draw.randrange(trial.WORLD)
        in_loop = POINTS[point].per_step
        step = draw.randrange(1, trial.STEPS + 1) if in_loop else 0
        nth = draw.randrange(1, 5) if point in ("forward", "backward", "all-reduce") else 1
        if nth > 2 and step == trial.STEPS:
            nth -= 2  # a rank has two micro-batches a step, and there is no later step
        limit = draw.choice((1, 512, 4096, draw.randrange(1, 60_000)))
        return program.Fault(rank, point, step, nth, limit if point == "shard byte" else 0)


def judge(
    row: int,
    case: str,
    told: Story,
    reference: Story,
    expect: Callable[[Story], str] | None = None,
    logs: bool = True,
) -> Outcome:
    """The outcome of a story that must end like its reference, bit for bit, with nothing left.

    ``expect`` says what else is wrong with it, or nothing; ``logs``: it has a metrics.jsonl.
    """
    figures = trial.times(told)
    if blocked := [mark["blocked_s"] for mark in told.marks("saved")]:
        figures["blocked_s"] = max(blocked)
    verdict, detail = _verdict(told, reference, expect)
    if (
        verdict == "passed"
        and logs
        and (again := fingerprint.repeated_steps(told.plan.out / "run"))
    ):
        verdict, detail = "failed", f"metrics.jsonl has steps {again} twice"
    if verdict == "passed":
        trial.clear(told.plan)
    else:
        detail += f" [{told.plan.out}]"
    return Outcome(row, case, verdict, detail, figures, is_story=True)


def _verdict(
    told: Story, reference: Story, expect: Callable[[Story], str] | None
) -> tuple[Verdict, str]:
    if any(ending.hung for ending in told.endings):
        return "hung", f"attempt codes {[ending.codes for ending in told.endings]}"
    if not told.endings[-1].is_good:
        fatal = (told.fatals() or [_last_line(told)])[-1]
        return "failed", f"did not recover in {len(told.endings)} attempts: {fatal}"
    if difference := trial.difference(told, reference):
        return "silent", difference
    if told.residue:
        return "failed", f"left behind: {', '.join(told.residue)}"
    wrong = expect(told) if expect is not None else ""
    return ("failed", wrong) if wrong else ("passed", "")


def _last_line(told: Story) -> str:
    lines = [line for line in told.logs().splitlines() if line.strip()]
    return lines[-1] if lines else "no output"


def at_step(step: int, action: Callable[[Ranks], None], plan: Plan) -> Callable[[Ranks], None]:
    """Acts once from outside when rank 0 has finished ``step``."""
    done: list[bool] = []

    def look(ranks: Ranks) -> None:
        if done:
            return
        lines = Story(plan).lines("history")
        if lines and lines[-1]["step"] >= step:
            done.append(True)
            action(ranks)

    return look
