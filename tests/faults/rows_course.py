"""Row 41: a run goes back to an older step and is killed at any moment of it, again and again: no
start after that ever takes a step of the course that was left, and every step is kept.
"""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from megatron_ext.checkpoint import aside, folder, identity
from megatron_ext.checkpoint.record import read_record
from tests.checkpoint.imagined import Folder
from tests.faults.cell import Case, Wrong, run_cases
from tests.faults.outcome import Outcome

CALLS = ("open", "rename", "replace", "fsync")


class Killed(BaseException):
    """Where the process would have been killed."""


@contextlib.contextmanager
def _killed_at(number: int) -> Iterator[None]:
    """Nothing happens from the `number`-th change of the disk on."""
    before, count = {name: getattr(os, name) for name in CALLS}, 0

    def counting(call: Callable) -> Callable:
        def wrapped(*args, **kwargs):
            nonlocal count
            count += 1
            if count > number:
                raise Killed
            return call(*args, **kwargs)

        return wrapped

    for name, call in before.items():
        setattr(os, name, counting(call))
    try:
        yield
    finally:
        for name, call in before.items():
            setattr(os, name, call)


def row_41(where: Path, seed: int, count: int) -> list[Outcome]:
    """Random courses, each gone back from up to three times."""
    state = random.Random(seed)
    cases: list[Case] = []
    for number in range(count):
        cases.append(
            (f"course {number}", _case(where / f"{number}" / "run", state.randrange(1 << 30)))
        )
    return run_cases(41, cases)


def _case(root: Path, seed: int) -> Callable[[], None]:
    def action() -> None:
        state, run = random.Random(seed), Folder(root)
        known, newest = run.begin(step=1), 1
        everything = 1
        for course in range(3):
            for _ in range(state.randrange(1, 4)):
                newest += state.randrange(1, 3)
                run.saved(newest, id=known.id, course=course)
                everything += 1
            target = state.choice(folder.steps(run.save))
            words = ("--load", run.save, "--ckpt-step", target, "--skip-samples", f"{course}-9")
            limit = state.choice((0, state.randrange(1, 40), 10**6))
            with contextlib.suppress(Killed), _killed_at(limit):
                _go_back(run, words)
            _restarted(run, words, target)
            newest = target
            kept = list(run.save.glob("step_*"))
            if len(kept) != everything:
                raise Wrong("silent", f"{len(kept)} steps are left of {everything}")

    return action


def _go_back(run: Folder, words: tuple) -> int:
    """What a start does before it trains; the step that it has loaded."""
    start = run.plan(*words)
    if not start.goes_back:
        return read_record(run.save / folder.step_name(start.step))["step"]
    step = words[words.index("--ckpt-step") + 1]
    aside.abandon_later(run.save, step)
    course = {"step": step, "command": start.command}
    identity.write(run.root, replace(start.identity, course=course))
    return step


def _restarted(run: Folder, words: tuple, target: int) -> None:
    """The same command again, twice: what it loads is the step that was asked for."""
    for _ in range(2):
        if (step := _go_back(run, words)) != target:
            raise Wrong("silent", f"went back to {target}, a restart took step {step}")
    if run.plan().step != target or folder.latest_step(run.save) != target:
        raise Wrong("silent", f"the newest step is {run.plan().step}, not {target}")
