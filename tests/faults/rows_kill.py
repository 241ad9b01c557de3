"""Row 1 and its relatives: kill -9 of a rank at a named point, signals, a walltime that is too
short. Afterwards the same command runs again, and every step and the final state must be those of
the uninterrupted run.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable

from tests.faults import program, trial
from tests.faults.bench import COMMON_LAYOUT, Bench, at_step, judge
from tests.faults.outcome import TRIED, Outcome, total
from tests.faults.ranks import Ranks, children
from tests.faults.trial import LAYOUTS, Story

PREEMPTED = 75
MTBF_S = 4.0
"""Mean seconds between the kills of the soak."""
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


def row_1(bench: Bench, kills: int) -> list[Outcome]:
    """Seeded kills; every fourth in another layout than the common one. For one whose point the run
    never reached another is drawn.
    """
    others = [name for name in LAYOUTS if name != COMMON_LAYOUT]
    outcomes: list[Outcome] = []
    while total(outcomes, *TRIED) < kills and len(outcomes) < 2 * kills:
        number = len(outcomes)
        layout = others[number // 4 % len(others)] if number % 4 == 3 else COMMON_LAYOUT
        outcomes.append(one_kill(bench, layout))
    return outcomes


def one_kill(bench: Bench, layout: str) -> Outcome:
    """One fault and the recovery from it."""
    fault, reference = bench.kill(), bench.reference(layout)
    told = trial.story(bench.plan(layout), fault)
    case = f"{fault} [{layout}]"
    if not told.marks("fault", 0):
        return Outcome(1, case, "missed", "this run does not come there")
    return judge(1, case, told, reference, _lost_little)


def _lost_little(told: Story) -> str:
    """At most the save interval and the save in flight are computed again."""
    lost = trial.times(told).get("steps_lost", 0)
    most = 2 * trial.INTERVAL
    return f"{lost} steps lost, {most} at most" if lost > most else ""


def row_2(bench: Bench, count: int) -> list[Outcome]:
    """Writers are threads of a rank and die with it (row 1): no rank ever has a child process that
    could die alone.
    """
    outcomes = []
    for _ in range(count):
        seen: set[int] = set()

        def look(running: Ranks, seen: set[int] = seen) -> None:
            seen.update(pid for parent in running.rank_of for pid in children(parent))

        told = trial.story(bench.plan(), each=look)

        def expect(story: Story, seen: set[int] = seen) -> str:
            return f"ranks had children {sorted(seen)}" if seen else ""

        outcomes.append(judge(2, "no writer process", told, bench.reference(), expect))
    return outcomes


def row_4(bench: Bench, count: int) -> list[Outcome]:
    """A signal to one rank or to all, once or twice: saved, code 75, then bit for bit."""
    return [_signalled(bench, number) for number in range(count)]


def _signalled(bench: Bench, number: int) -> Outcome:
    draw = bench.random
    which = SIGNALS[number % len(SIGNALS)]
    ranks = None if draw.random() < 0.4 else [draw.randrange(trial.WORLD)]
    step, twice = draw.randrange(1, trial.STEPS - 1), draw.random() < 0.5
    plan = bench.plan()

    def send(running: Ranks) -> None:
        running.send(which, ranks)
        if twice:
            time.sleep(0.02)
            running.send(which, ranks)

    told = trial.story(plan, each=at_step(step, send, plan))
    to = "all ranks" if ranks is None else f"rank {ranks[0]}"
    case = f"{which.name} to {to} after step {step}{' twice' if twice else ''}"
    return judge(4, case, told, bench.reference(), _left_with_75)


def _left_with_75(told: Story) -> str:
    codes = told.endings[0].codes
    if told.endings[0].is_good:
        return ""  # it came in the last step: the run was already done
    if set(codes) != {PREEMPTED}:
        return f"exit codes {codes} instead of 75"
    done = [line["step"] for line in told.lines("history") if line["attempt"] == 0]
    loaded = told.marks("loaded", 1)
    if not loaded or loaded[0]["step"] != max(done):
        return f"resumed from {loaded[0]['step'] if loaded else 'nothing'}, reached {max(done)}"
    return ""


def row_5(bench: Bench, count: int) -> list[Outcome]:
    """The warning comes, and the kill before the save can be done: nothing older is lost."""
    outcomes = []
    for _ in range(count):
        grace_s = bench.random.choice((0.0, 0.02, 0.05, 0.1, 0.3))
        step = bench.random.randrange(1, trial.STEPS - 1)
        plan = bench.plan()

        def warn(running: Ranks, grace_s: float = grace_s) -> None:
            running.send(signal.SIGUSR1)
            time.sleep(grace_s)
            running.kill()

        told = trial.story(plan, each=at_step(step, warn, plan))
        case = f"SIGUSR1 after step {step}, kill {grace_s} s later"
        outcomes.append(judge(5, case, told, bench.reference()))
    return outcomes


def row_39(bench: Bench, count: int) -> list[Outcome]:
    """Stopped and started after each step: in the warm-up, at an evaluation, at the last step."""
    outcomes = []
    for step in range(1, min(trial.STEPS, count + 1)):
        plan = bench.plan()

        def stop(running: Ranks) -> None:
            running.send(signal.SIGTERM)

        told = trial.story(plan, each=at_step(step, stop, plan))
        outcomes.append(judge(39, f"stop after step {step}", told, bench.reference()))
    return outcomes


def row_38(bench: Bench, count: int) -> list[Outcome]:
    """After going back, metrics.jsonl has each step once and in order (`judge` looks at it after
    every story; here the run goes back by a kill just before a save).
    """
    outcomes = []
    for _ in range(count):
        fault = program.Fault(bench.random.randrange(trial.WORLD), "forward", trial.STEPS)
        told = trial.story(bench.plan(), fault)
        outcomes.append(judge(38, str(fault), told, bench.reference()))
    return outcomes


def row_40(bench: Bench, count: int) -> list[Outcome]:
    """Poisson kills of random ranks until the run is through; goodput against wall time."""
    return [_soak(bench) for _ in range(count)]


def _soak(bench: Bench, kills: int = 4) -> Outcome:
    reference, plan = bench.reference(), bench.plan()
    begin = time.monotonic()
    told = Story(plan)
    for number in range(kills + 1):
        delay = bench.random.expovariate(1 / MTBF_S) if number < kills else None
        told.endings.append(trial.attempt(plan, number, each=_poisson(bench, delay)))
        if told.endings[-1].is_good:
            break
    wall = time.monotonic() - begin
    found = judge(40, f"{len(told.endings) - 1} kills", told, reference)
    found.figures["goodput"] = trial.STEPS * reference.step_s() / wall
    return found


def _poisson(bench: Bench, delay: float | None) -> Callable[[Ranks], None]:
    begin, victim = time.monotonic(), bench.random.randrange(trial.WORLD)
    done: list[bool] = []

    def look(running: Ranks) -> None:
        if delay is not None and not done and time.monotonic() > begin + delay:
            done.append(True)
            running.send(signal.SIGKILL, [victim])

    return look
