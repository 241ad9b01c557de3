"""Ranks that are stopped (SIGSTOP), any set but all, at any moment, while saves go on in the
background: the others notice within the normal limit, name them, and the run goes on bit for bit.
(All of them: the launcher's, tests/launch/test_outside.py.)
"""

from __future__ import annotations

import signal
import time

from tests.faults import trial
from tests.faults.bench import COMMON_LAYOUT, Bench, at_step, judge
from tests.faults.outcome import Outcome
from tests.faults.ranks import Ranks
from tests.faults.trial import Story

HANG = 78
LIMIT_S = 4.0
LATE_S = 10.0
"""How much later than the limit the verdict may be."""


def row_42(bench: Bench, count: int) -> list[Outcome]:
    """The slow limit is an hour: a rank without beats must not have it, whatever the others do."""
    return [_stopped(bench) for _ in range(count)]


def _stopped(bench: Bench) -> Outcome:
    draw = bench.random
    victims = sorted(draw.sample(range(trial.WORLD), draw.randrange(1, trial.WORLD)))
    step, delay = draw.randrange(1, trial.STEPS), draw.uniform(0, 0.3)
    limits = ("--hang-limit-s", f"{LIMIT_S:g}", "--hang-slow-limit-s", "3600")
    plan = bench.plan(COMMON_LAYOUT, *limits)
    stopped_at: list[float] = []

    def stop(running: Ranks) -> None:
        time.sleep(delay)
        stopped_at.append(time.monotonic())
        running.send(signal.SIGSTOP, victims)

    def expect(told: Story) -> str:
        ending = told.endings[0]
        if ending.is_good or not stopped_at:
            return ""  # the run was through already
        codes = {rank: code for rank, code in enumerate(ending.codes) if rank not in victims}
        if set(codes.values()) != {HANG}:
            return f"codes of those that ran: {codes}"
        seconds = ending.detected_at - stopped_at[0]
        if seconds > LIMIT_S + LATE_S:
            return f"noticed after {seconds:.1f} s"
        lines = told.fatals(0)
        ranks = ", ".join(map(str, victims))
        if len(lines) != 1 or f"{ranks}: the process is stopped (SIGSTOP), in " not in lines[0]:
            return f"does not name rank {ranks}: {lines}"
        return ""

    told = trial.story(plan, each=at_step(step, stop, plan))
    case = f"ranks {victims} stopped {delay:.2f} s after step {step}"
    return judge(42, case, told, bench.reference(), expect)
