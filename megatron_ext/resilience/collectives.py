"""Every collective and send that Python starts, written into the rank's heartbeat.

torch.distributed's functions, whoever bound them when, end in a method of `ProcessGroup` and then
in `Work.wait`: `recording` replaces these methods of the two classes, once, and puts them back on
the way out. A call costs 4 microseconds. (`mesh.calls` tells listeners of calls that are over; a
watch must know of those that never end.)

    enter    the method is called: the rank arrives at collective #seq of the group
    blocked  from the call to its return, and inside Work.wait
    exit     Work.wait returned

gloo: enter and exit are the collective's. NCCL: the method and `wait` only enqueue, so enter is
when the host enqueued it, exit says nothing, and blocked time is about 0: a hang is located by the
sequence numbers alone, stragglers are not seen. Calls from threads of ours (a checkpoint in the
background) are left out: only the main thread and autograd's threads count as progress. Collectives
inside compiled graphs (torch.ops._c10d_functional) are not seen; megatron-core has none.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from torch._C._distributed_c10d import ProcessGroup, Work

from megatron_ext.mesh.calls import wrapping
from megatron_ext.resilience.heartbeat import OPS, POINT_TO_POINT, HeartbeatFile
from megatron_ext.resilience.members import shorten


def _num_bytes(value: Any) -> int:
    """Bytes of the first tensor argument, or of all tensors of a list."""
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, (list, tuple)):
        return sum(_num_bytes(one) for one in value)
    return 0


class Recorder:
    """Numbers the calls of each group and keeps their times; see the module's docstring."""

    def __init__(self, file: HeartbeatFile) -> None:
        self.blocked_s = 0.0
        """Time that the recorded threads were blocked in collectives, ever growing."""
        self._file = file
        self._groups: dict[int, tuple[int, ProcessGroup, tuple[int, ...]]] = {}
        self._next: dict[tuple[int, int, int], int] = {}
        self._pending: dict[int, int] = {}  # id of a Work -> its entry
        self._records: dict[int, bool] = {threading.main_thread().ident: True}

    def _is_recorded(self) -> bool:
        ident = threading.get_ident()
        known = self._records.get(ident)
        if known is None:  # threads of C++, such as autograd's, are dummies to Python
            known = isinstance(threading.current_thread(), threading._DummyThread)
            self._records[ident] = known
        return known

    def _group(self, group: ProcessGroup) -> tuple[int, ProcessGroup, tuple[int, ...]]:
        known = self._groups.get(id(group))
        if known is None:
            try:
                ranks = tuple(torch.distributed.get_process_group_ranks(group))
            except (KeyError, ValueError, RuntimeError):
                ranks = ()  # a group that torch does not list
            name = group.group_name
            desc = {"": name, "undefined": f"pg {name}"}.get(group.group_desc, group.group_desc)
            number = self._file.add_group(desc, name, shorten(ranks))
            known = self._groups[id(group)] = (number, group, ranks)
        return known

    def _peer(self, op: str, args: tuple, ranks: tuple[int, ...]) -> int:
        """Global rank of the other side of a send or recv."""
        if op not in POINT_TO_POINT or len(args) < 2 or not isinstance(args[1], int):
            return -1
        return ranks[args[1]] if args[1] < len(ranks) else args[1]

    def call(self, op: str, stock: Callable, group: ProcessGroup, args: tuple, kwargs: dict):
        """Run one method of `group` and record it."""
        if not self._is_recorded():
            return stock(group, *args, **kwargs)
        number, _, ranks = self._group(group)
        peer = self._peer(op, args, ranks)
        key = (number, OPS.index(op) if peer >= 0 else -1, peer)
        seq = self._next[key] = self._next.get(key, 0) + 1
        size = _num_bytes(args[0]) if args else 0
        entry = self._file.enter_collective(number, OPS.index(op), peer, seq, size)
        start = time.perf_counter()
        try:
            work = stock(group, *args, **kwargs)
        finally:
            self.blocked_s += time.perf_counter() - start
            self._file.wait(-1)
        if work is None:
            self._file.exit_collective(entry)
        else:
            self._pending[id(work)] = entry
            if len(self._pending) > 4096:  # handles that nobody waited for
                self._pending.pop(next(iter(self._pending)))
        return work

    def wait(self, stock: Callable, work: Work, args: tuple, kwargs: dict):
        """Run Work.wait and record how long it blocked."""
        entry = self._pending.pop(id(work), None)
        if entry is None or not self._is_recorded():
            return stock(work, *args, **kwargs)
        self._file.wait(entry)
        start = time.perf_counter()
        result = stock(work, *args, **kwargs)
        self.blocked_s += time.perf_counter() - start
        self._file.exit_collective(entry)
        return result


def recording(recorder: Recorder) -> contextlib.AbstractContextManager[None]:
    """Within it, every call goes through `recorder`."""

    def method(op: str, stock: Callable) -> Callable:
        return lambda group, *args, **kwargs: recorder.call(op, stock, group, args, kwargs)

    def wait(stock: Callable) -> Callable:
        return lambda work, *args, **kwargs: recorder.wait(stock, work, args, kwargs)

    return wrapping(method, wait)
