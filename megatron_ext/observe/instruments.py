"""Everything that measures a training while it runs, on every rank: time split, memory, traces.

with instruments(...) as measure:
    measure.before(n)                        profiler, clocks of a traced step
    with measure.data(): ...                 the rest is found by itself: observe.watch
    record |= measure.after(n, seconds)      time and memory at --log-interval
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from megatron_ext.config import RunConfig
from megatron_ext.observe import memory, timers, trace_schedule
from megatron_ext.observe.attempt import Attempts
from megatron_ext.observe.profile import Profile
from megatron_ext.observe.spans import CudaClock, HostClock, Recorder, Span
from megatron_ext.observe.watch import Calls, Passes, watching

log = logging.getLogger(__name__)
HISTORY_ENTRIES = 100_000
"""Allocations that --record-memory-history keeps."""


class Instruments:
    """See the module's docstring; made by `instruments`."""

    def __init__(self, cfg: RunConfig, root: Path, state: Any, device: torch.device) -> None:
        self._observe, self._root, self._state, self._device = cfg.observe, root, state, device
        self._rank = torch.distributed.get_rank()
        self.recorder = Recorder(CudaClock() if device.type == "cuda" else HostClock())
        self.calls = Calls(self.recorder)
        self.passes = Passes(self.recorder, state.chunks)
        self.profile = Profile(cfg.observe, root / "traces", self._rank)
        self._split = timers.TimeSplit()
        self._memory: dict[str, int] | None = None
        self._offset_s = self._saved_s = 0.0
        self._is_started = False
        self._attempt = Attempts()
        if cfg.observe.record_memory_history and device.type == "cuda":
            torch.cuda.memory._record_memory_history(max_entries=HISTORY_ENTRIES)

    def before(self, step: int) -> None:
        """A step is about to begin. Before a traced one (--trace-schedule) all ranks meet."""
        self.profile.before(step)
        is_traced = step in (self._observe.trace_schedule or ())
        self._offset_s = self._offset() if is_traced else 0.0
        self._saved_s = timers.saved_seconds(self.recorder.take())
        self.passes.start_step()
        self.calls.whole.clear()
        self.calls.keeps_whole = is_traced

    def after(self, step: int, seconds: float) -> dict[str, float]:
        """A step is over: its keys of time and memory at --log-interval; the first one of a process
        says when it began. Collective.
        """
        is_traced, self.calls.keeps_whole = self.calls.keeps_whole, False
        whole = self._whole() if is_traced else []
        spans = self.recorder.take()
        self._split.add(spans, self._saved_s, seconds)
        if is_traced:
            self._write_trace(step, spans, whole)
        start = {} if self._is_started else {"started_unix_s": round(time.time() - seconds, 3)}
        self._is_started = True
        return start if step % self._observe.log_interval else {**start, **self._values(step)}

    def explaining(self) -> contextlib.AbstractContextManager:
        """Memory that does not suffice inside becomes a page of logs/ and a ResourceError."""
        return memory.on_out_of_memory(self._state, self._root / "logs", self._rank, self._device)

    def data(self) -> contextlib.AbstractContextManager:
        """What is done inside waits for data."""
        return self.recorder.span("data")

    def _values(self, step: int) -> dict[str, float]:
        if self._memory is None:  # the optimizer has its states after the first step
            self._memory = memory.split(self._state)
        num_steps, seconds = self._split.take()
        held = {**self._memory, "peak": memory.peak_bytes(self._device)}
        mine = [*seconds, *(float(held[name]) for name in timers.MEMORY)]
        table = timers.gathered(mine, self._device)
        if self._rank == 0:
            self._attempt("ranks.json", timers.write_ranks, self._root, step, num_steps, table)
        return timers.record_of(table)

    def lines(self, record: dict[str, Any]) -> list[str]:
        """What the console says of it: the split with --timing-log-level 1 and above."""
        is_asked = self._observe.timing_log_level >= 1 and "time_data_s" in record
        return [timers.line_of(record)] if is_asked else []

    def _offset(self) -> float:
        machine = trace_schedule.machine_id()
        return trace_schedule.exchange(time.perf_counter, machine, self._device)

    def _whole(self) -> list[trace_schedule.Whole]:
        """The collectives of the step, in seconds."""
        moments = [moment for one in self.calls.whole for moment in one[2:4]]
        times = self.recorder.clock.seconds(moments)
        return [
            (kind, name, times[2 * at], times[2 * at + 1], more)
            for at, (kind, name, _, _, more) in enumerate(self.calls.whole)
        ]

    def _write_trace(self, step: int, spans: list[Span], whole: list[trace_schedule.Whole]) -> None:
        traces = self._root / "traces"
        write, more = trace_schedule.write_rank, (self._offset_s, spans, whole)
        self._attempt("traces", write, traces, step, self._rank, *more)
        torch.distributed.barrier()
        if self._rank == 0:
            world = torch.distributed.get_world_size()
            missing = self._attempt("traces", trace_schedule.merge, traces, step, world)
            if missing:
                log.warning("the trace of step %d lacks ranks %s: no shared disk", step, missing)

    def close(self) -> None:
        """Write what is under way."""
        self._attempt("traces", self.profile.close)


@contextlib.contextmanager
def instruments(
    cfg: RunConfig, root: Path, state: Any, checkpointer: Any, device: torch.device
) -> Iterator[Instruments]:
    """Within it the training is measured, and memory that does not suffice is explained."""
    made = Instruments(cfg, root, state, device)
    with (
        made.explaining(),  # evaluations, too
        watching(made.recorder, made.calls, made.passes, state.optimizer, checkpointer),
    ):
        try:
            yield made
        finally:
            made.close()
