"""When each action of a program runs: the makespan, the bubble and the waiting of every rank.

A rank runs its list in order, one action at a time.  F of virtual stage s waits for F of stage s-1
of the same micro-batch and its message, B for B of stage s+1 (the last stage: for its own F).
With overlapped point-to-point a message costs its receiver only the time it is late; otherwise
sender and receiver both spend it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from megatron_ext.pipeline.program import Action, Program


@dataclass(frozen=True)
class Event:
    """One action with its times in seconds."""

    rank: int
    action: Action
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """A simulated step of the pipeline.

    Attributes:
        makespan: first start to last end of all ranks.
        busy: seconds that each rank computes.
        sent: seconds of exposed messages of each rank.
    """

    events: tuple[Event, ...]
    makespan: float
    busy: tuple[float, ...]
    sent: tuple[float, ...]

    @property
    def bubble_share(self) -> float:
        """Idle share of the rank that computes most."""
        return 1 - max(self.busy) / self.makespan if self.makespan else 0.0


class DeadlockError(AssertionError):
    """The program's actions wait for each other."""


def simulate(
    program: Program,
    duration: Callable[[int, Action], float],
    message: Callable[[int, int], float] = lambda a, b: 0.0,
    overlapped: bool = True,
) -> Timeline:
    """Run a program.

    Args:
        duration: (rank, action) -> seconds.
        message: (sending rank, receiving rank) -> seconds of one message.
    """
    pp = len(program)
    last = max((a.chunk for actions in program for a in actions), default=0) * pp + pp - 1
    links = {(a, b): message(a, b) for a in range(pp) for b in ((a + 1) % pp, (a - 1) % pp)}
    ends: dict[tuple[str, int, int], float] = {}
    clock, busy, sent = [0.0] * pp, [0.0] * pp, [0.0] * pp
    events: list[Event] = []
    waiting = [list(reversed(actions)) for actions in program]
    while any(waiting):
        before = len(events)
        for rank, action in _startable(waiting, ends, pp, last, links):
            start = max(clock[rank], _ready(ends, rank, action, pp, last, links))
            cost = 0.0 if overlapped else _sending(rank, action, pp, last, links)
            end = start + duration(rank, action)
            busy[rank] += end - start
            sent[rank] += cost
            clock[rank] = end + cost
            ends[action.kind, action.chunk * pp + rank, action.micro_batch] = end
            events.append(Event(rank, action, start, end))
        if len(events) == before:
            raise DeadlockError("the actions wait for each other")
    return Timeline(tuple(events), max(clock, default=0.0), tuple(busy), tuple(sent))


def _startable(waiting: list[list[Action]], ends, pp: int, last: int, links):
    """Takes from each rank's list, one after the other, the actions whose inputs are there."""
    for rank, actions in enumerate(waiting):
        while actions and _ready(ends, rank, actions[-1], pp, last, links) is not None:
            yield rank, actions.pop()


def _ready(ends, rank: int, action: Action, pp: int, last: int, links) -> float | None:
    """When the input of an action is there; None: not yet known."""
    stage = action.chunk * pp + rank
    if action.kind == "F":
        if stage == 0:
            return 0.0
        source = stage - 1
    elif stage == last:
        return ends.get(("F", stage, action.micro_batch))
    else:
        source = stage + 1
    done = ends.get((action.kind, source, action.micro_batch))
    return None if done is None else done + links.get((source % pp, rank), 0.0)


def _sending(rank: int, action: Action, pp: int, last: int, links) -> float:
    """What a blocking sender spends."""
    stage = action.chunk * pp + rank
    target = stage + 1 if action.kind == "F" else stage - 1
    return links.get((rank, target % pp), 0.0) if 0 <= target <= last else 0.0
