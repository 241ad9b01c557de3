"""What a rank did when, within one step: spans with their parents, in seconds at its end.

    data | forward (all_to_all, collectives inside) | pipeline_wait | backward | optimizer | save

Spans of one kind do not overlap: a span's own time is its length without that of the spans inside
it, so that the kinds of a step add up to at most the step, and the rest is Python's and the
schedule's own. Everything runs on the main thread, or on autograd's while the main one waits, so
one stack of open spans is enough.

On a CPU the clock is time.perf_counter. On CUDA work is asynchronous: a moment is a CUDA event on
the current stream and read after the step's own sync, so lengths are those of the compute stream
(where it waits for a collective, that is the collective's span).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from megatron_ext.observe.kinds import KINDS


class HostClock:
    """Moments are seconds of this process's monotonic clock."""

    def now(self) -> float:
        """The moment."""
        return time.perf_counter()

    def seconds(self, moments: list[float]) -> list[float]:
        """Moments as seconds on the host's clock."""
        return moments


class CudaClock:
    """Moments are events on the current stream; `seconds` waits for the last of them."""

    def __init__(self) -> None:
        self._free: list[Any] = []
        self._base = torch.cuda.Event(enable_timing=True)
        self._base.record()
        self._base.synchronize()
        self._base_s = time.perf_counter()

    def now(self) -> Any:
        """The moment."""
        event = self._free.pop() if self._free else torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, moments: list[Any]) -> list[float]:
        """Moments as seconds on the host's clock; the events are used again."""
        torch.cuda.synchronize()
        found = [self._base_s + self._base.elapsed_time(one) / 1000 for one in moments]
        self._free.extend(set(moments))
        return found


@dataclass
class Span:
    """One thing that a rank did. start and end are moments of the clock, after `resolve` seconds of
    the host's monotonic clock; parent is the index of the span around it, or -1.
    """

    kind: str
    name: str
    parent: int
    start: Any
    end: Any = None
    args: dict[str, Any] = field(default_factory=dict)


class Recorder:
    """The spans since the last `take`."""

    def __init__(self, clock: HostClock | CudaClock) -> None:
        self.clock = clock
        self.spans: list[Span] = []
        self._open: list[int] = [-1]

    @contextlib.contextmanager
    def span(self, kind: str, name: str = "", **args: Any) -> Iterator[Span]:
        """What is done inside is of this kind."""
        made = Span(kind, name or kind, self._open[-1], self.clock.now(), None, args)
        self._open.append(len(self.spans))
        self.spans.append(made)
        try:
            yield made
        finally:
            self._open.pop()
            made.end = self.clock.now()

    def add(self, kind: str, name: str, start: Any, end: Any, args: dict[str, Any]) -> None:
        """A span that is over already."""
        self.spans.append(Span(kind, name, self._open[-1], start, end, args))

    def take(self) -> list[Span]:
        """The spans so far, in seconds, and forget them; nothing may be open."""
        spans, self.spans, self._open = self.spans, [], [-1]
        times = self.clock.seconds([moment for one in spans for moment in (one.start, one.end)])
        for index, one in enumerate(spans):
            one.start, one.end = times[2 * index], times[2 * index + 1]
        return spans


def own_seconds(spans: list[Span]) -> dict[str, float]:
    """Kind -> seconds spent in it and in no span inside it; all KINDS are there."""
    total = dict.fromkeys(KINDS, 0.0)
    for one in spans:
        length = one.end - one.start
        total[one.kind] += length
        if one.parent >= 0:
            total[spans[one.parent].kind] -= length
    return total
