"""The watch of a run: heartbeat, recorded collectives, hang watcher, stragglers, as one object.

    with watching(cfg.resilience, logs, layout) as watch:     setup.watch, pretrain_moe.py
        entering("data", step)                                train/loop.py, train/step.py
        ...
        watch.step_done(step, seconds)
        for finding in watch.findings(): ...

`entering` finds the watch of its context, so that functions which megatron-core calls need no
argument for it; outside a watched run it does nothing. All threads end with the context.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path

import torch

from megatron_ext.mesh.agree import first_rank
from megatron_ext.resilience import hang, watcher
from megatron_ext.resilience.collectives import Recorder, recording
from megatron_ext.resilience.heartbeat import (
    PHASES,
    Heartbeat,
    HeartbeatFile,
    beat_for_ever,
    heartbeat_path,
)
from megatron_ext.resilience.slowdown import Slow, Slowdowns
from megatron_ext.resilience.stacks import answering, stack_path
from megatron_ext.resilience.straggler import Finding, Stragglers

logger = logging.getLogger(__name__)
_NUMBER = {name: number for number, name in enumerate(PHASES)}


class NoWatch:
    """Nothing is watched."""

    def enter(self, phase: str, step: int | None = None) -> None:
        """Do nothing."""

    def step_done(self, step: int, seconds: float) -> None:
        """Do nothing."""

    def findings(self) -> list[Finding | Slow]:
        """None."""
        return []


class Watch(NoWatch):
    """What the training loop tells the watch, and asks it."""

    def __init__(self, file: HeartbeatFile, recorder: Recorder, found: queue.SimpleQueue) -> None:
        self._file, self._recorder, self._found = file, recorder, found
        self._step = self._micro_batch = 0
        self._blocked_s = 0.0

    def enter(self, phase: str, step: int | None = None) -> None:
        """The main thread is in `phase` from here on; each forward is a new micro-batch."""
        if step is not None:
            self._step, self._micro_batch = step, 0
            self._blocked_s = self._recorder.blocked_s
        if phase == "forward":
            self._micro_batch += 1
        self._file.enter(_NUMBER[phase], self._step, self._micro_batch)

    def step_done(self, step: int, seconds: float) -> None:
        """A training step took `seconds` since `enter(..., step)`."""
        blocked = self._recorder.blocked_s - self._blocked_s
        self._file.step_done(step, seconds, min(blocked, seconds))
        self.enter("idle")

    def findings(self) -> list[Finding | Slow]:
        """Stragglers found since the last call (rank 0)."""
        found = []
        while not self._found.empty():
            found.append(self._found.get())
        return found


_UNWATCHED = NoWatch()
_CURRENT: ContextVar[NoWatch | None] = ContextVar("watch", default=None)


def current() -> NoWatch:
    """The watch of this context."""
    return _CURRENT.get() or _UNWATCHED


def entering(phase: str, step: int | None = None) -> None:
    """Tell the watch of this context where the main thread is."""
    current().enter(phase, step)


def then(phase: str, function: Callable) -> Callable:
    """`function`, entering `phase` first."""

    def call(*args, **kwargs):
        entering(phase)
        return function(*args, **kwargs)

    return call


def _limits(settings) -> watcher.Limits | None:
    if settings.hang_limit_s <= 0:
        return None
    return watcher.Limits(settings.hang_limit_s, settings.hang_slow_limit_s)


def _evaluation(
    settings, stages: Sequence[int], rank: int, found: queue.SimpleQueue
) -> Callable[[Mapping[int, Heartbeat]], None] | None:
    """The straggler check of rank 0's watcher thread."""
    if rank != 0 or settings.straggler_interval <= 0 or len(stages) < 2:
        return None
    stragglers = Stragglers(settings.straggler_interval, settings.straggler_share, stages)
    slowdowns = Slowdowns(len(stages))

    def evaluate(beats: Mapping[int, Heartbeat]) -> None:
        for finding in [*stragglers.look(beats), *slowdowns.look(beats)]:
            found.put(finding)

    return evaluate


@contextlib.contextmanager
def _threads(targets: Sequence[Callable], stopped: threading.Event) -> Iterator[None]:
    """Daemon threads that end with the context."""
    threads = [threading.Thread(target=target, daemon=True) for target in targets]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stopped.set()
        for thread in threads:
            thread.join(timeout=10)


def _open(logs: Path, rank: int, world_size: int) -> tuple[HeartbeatFile, int, list[str]] | None:
    """(this rank's heartbeat, the token of this launch, each rank's host); None on all ranks, with
    one warning, where the folder cannot be written on any. Collective.
    """

    def new_token() -> int:
        with contextlib.suppress(OSError):
            hang.forget(logs)
        return time.time_ns()

    token = first_rank(new_token)
    file, error = None, None
    try:
        file = HeartbeatFile(heartbeat_path(logs, rank), rank, world_size, token)
        stack_path(logs, rank).write_text("")
    except OSError as refused:
        error = f"rank {rank}: {refused}"
    answers: list = [None] * world_size
    torch.distributed.all_gather_object(answers, (error, socket.gethostname()))
    failed = [text for text, _ in answers if text]
    if failed and rank == 0:
        logger.warning("no watch for hangs and stragglers: %s", failed[0])
    return None if failed else (file, token, [host for _, host in answers])


@contextlib.contextmanager
def watching(settings, logs: Path, stages: Sequence[int]) -> Iterator[NoWatch]:
    """Watch this run (`settings`: cfg.resilience). Collective: all ranks enter.

    `stages`: the pipeline stage of each rank. Over several hosts heartbeats are flushed to the
    shared folder. Nothing is started where both --hang-limit-s and --straggler-interval are 0.
    """
    limits, rank, world_size = _limits(settings), torch.distributed.get_rank(), len(stages)
    if limits is None and (settings.straggler_interval <= 0 or world_size < 2):
        yield _UNWATCHED
        return

    opened = _open(logs, rank, world_size)
    if opened is None:
        yield _UNWATCHED
        return
    file, token, hosts = opened
    found: queue.SimpleQueue = queue.SimpleQueue()
    recorder, stopped = Recorder(file), threading.Event()
    watch = Watch(file, recorder, found)
    evaluation = _evaluation(settings, stages, rank, found)
    thread = watcher.Watcher(logs, rank, hosts, token, limits, evaluation)
    targets = (
        lambda: beat_for_ever(file, stopped, len(set(hosts)) > 1),
        lambda: thread.run(stopped),
    )
    reset = _CURRENT.set(watch)
    watch.enter("start")
    with answering(stack_path(logs, rank)), recording(recorder), _threads(targets, stopped):
        try:
            yield watch
        finally:
            file.close()
            _CURRENT.reset(reset)
