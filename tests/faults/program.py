"""The test program of one rank: pretrain_moe.py, watched and broken from outside.

Each rank writes into OUT, one JSON object a line:

    history_R.jsonl   a step: loss and gradient norm as hexadecimal floats, hash of the sample ids
    marks_R.jsonl     when something happened (monotonic clock): start, groups, loaded, step, fault
    final_R.json      hashes of all that the run's state consists of, after the last step
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.faults import points
from tests.ranks import fingerprint


@dataclass(frozen=True)
class Fault:
    """One kill: who, where, when."""

    rank: int
    point: str
    step: int = 0
    """Points inside the loop act from this step on (the step that is being computed)."""
    nth: int = 1
    """At which call of the point."""
    limit: int = 0
    """For ``shard byte``: the byte of the file."""
    number: int = signal.SIGKILL

    def __str__(self) -> str:
        where = f" byte {self.limit}" if self.limit else ""
        return f"{self.point}{where}: rank {self.rank} step {self.step} call {self.nth}"


class Witness:
    """Writes what this rank lives through."""

    def __init__(self, out: Path, attempt: int) -> None:
        self.out, self.attempt = out, attempt
        self.rank = int(os.environ["RANK"])
        self.step = 0

    def line(self, kind: str, **values: Any) -> None:
        """One line, written in one call, so that a kill leaves whole lines."""
        record = {"attempt": self.attempt, **values}
        path = self.out / f"{kind}_{self.rank}.jsonl"
        with open(path, "a", encoding="utf-8") as stream:
            stream.write(json.dumps(record) + "\n")

    def mark(self, what: str, **values: Any) -> None:
        """A moment."""
        self.line("marks", what=what, at=time.monotonic(), **values)


Prepare = Callable[["Witness"], None]
"""What is done to a rank before its program starts: limits, wrappers, a full disk."""


def run(
    argv: list[str],
    out: Path,
    attempt: int,
    fault: Fault | None = None,
    prepare: Prepare | None = None,
) -> None:
    """pretrain_moe.py on this rank, with the fault where it is this rank's."""
    import pretrain_moe

    witness = Witness(out, attempt)
    witness.mark("start")
    random.seed(witness.rank)  # a fork seeds it anew; nothing draws from it, but it is in the state
    if prepare is not None:
        prepare(witness)
    mine = fault if fault is not None and fault.rank == witness.rank else None
    observe(witness, mine)
    if mine is not None and mine.point not in ("before optimizer", "after optimizer"):
        arm(witness, mine)
    pretrain_moe.main(argv)


def arm(witness: Witness, fault: Fault, optimizer: Any = None) -> None:
    """Puts the fault at its point."""
    point = points.POINTS[fault.point]
    calls = [0]

    def act() -> None:
        if point.per_step and witness.step + 1 < fault.step:
            return
        calls[0] += 1
        if calls[0] == fault.nth:
            strike(witness, fault)

    if point.event:
        points.watch(point, act)
        return
    owner, name = (optimizer, "step") if optimizer is not None else points.find(point.wrap)
    if fault.point == "all-reduce":
        _break_inside_all_reduce(owner, act)
    else:
        points.wrap(owner, name, act, point.after)


def strike(witness: Witness, fault: Fault) -> None:
    """Ends this process now, or at byte ``limit`` of the next file."""
    witness.mark("fault", point=fault.point, pid=os.getpid())
    if fault.point == "shard byte":
        points.end_at_byte(fault.limit)
    else:
        os.kill(os.getpid(), fault.number)


def _break_inside_all_reduce(distributed: Any, act: Callable[[], None]) -> None:
    """The others are inside the collective, and so is this rank: it has sent and not received."""
    inner = distributed.all_reduce

    def outer(*args: Any, **settings: Any) -> Any:
        work = inner(*args, **{**settings, "async_op": True})
        act()
        if settings.get("async_op") or work is None:
            return work
        return work.wait() and None

    distributed.all_reduce = outer


def observe(witness: Witness, fault: Fault | None) -> None:
    """Wraps what tells of progress: groups, load, each step, the end."""
    from megatron_ext.checkpoint.store import Checkpointer
    from megatron_ext.train import loop

    groups = points.find("megatron.core.parallel_state:initialize_model_parallel")
    points.wrap(*groups, lambda: witness.mark("groups"), after=True)
    _watch_load(witness, Checkpointer)
    _watch_saves(witness, Checkpointer)
    _watch_steps(witness, loop)
    _watch_training(witness, loop, fault)


def _watch_load(witness: Witness, checkpointer: type) -> None:
    inner = checkpointer.load

    def load(self: Any, state: Any, *args: Any, **settings: Any) -> Any:
        result = inner(self, state, *args, **settings)
        witness.step = state.progress.step
        witness.mark("loaded", step=state.progress.step)
        return result

    checkpointer.load = load


def _watch_saves(witness: Witness, checkpointer: type) -> None:
    inner = checkpointer.save

    def save(self: Any, state: Any, *args: Any, **settings: Any) -> Any:
        begin = time.monotonic()
        result = inner(self, state, *args, **settings)
        witness.mark("saved", step=state.progress.step, blocked_s=time.monotonic() - begin)
        return result

    checkpointer.save = save


def _watch_steps(witness: Witness, loop: Any) -> None:
    """Notes the sample ids that each step reads and, when it is shown to the observers, what it
    gave.
    """
    from megatron_ext.observe.observers import Observers

    ids: list[int] = []
    to_device, show = loop.to_device, Observers.step

    def reading(batch: Any, *args: Any) -> Any:
        ids.extend(batch.sample_ids_B.tolist())
        return to_device(batch, *args)

    def step(self: Any, record: dict[str, Any], *args: Any, **settings: Any) -> Any:
        witness.step = record["step"]
        witness.line(
            "history",
            step=record["step"],
            loss=float(record["lm_loss"]).hex(),
            grad_norm=float(record["grad_norm"]).hex(),
            samples=hashlib.sha256(json.dumps(ids).encode()).hexdigest()[:16],
            seconds=record["step_time_s"],
            at=time.monotonic(),
        )
        ids.clear()
        return show(self, record, *args, **settings)

    loop.to_device, Observers.step = reading, step


def _watch_training(witness: Witness, loop: Any, fault: Fault | None) -> None:
    inner = loop.train

    def train(run: Any, *args: Any) -> Any:
        if fault is not None and fault.point in ("before optimizer", "after optimizer"):
            arm(witness, fault, run.state.optimizer)
        result = inner(run, *args)
        marks = fingerprint.state_marks(run.state)
        (witness.out / f"final_{witness.rank}.json").write_text(json.dumps(marks))
        return result

    loop.train = train
