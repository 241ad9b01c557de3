"""Fills a span recorder from a training that knows nothing of it.

    megatron-core's forward_step, backward_step     "forward", "backward" with micro-batch and chunk
    ProcessGroup's methods and Work.wait            "all_to_all", "pipeline_wait", "collectives"
    the optimizer's methods (UPDATING)                "optimizer"
    checkpointer.save, poll, before_update          "save": only what blocks the training

Each is replaced on the way in and put back on the way out.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from megatron.core.pipeline_parallel import schedules

from megatron_ext.mesh.calls import listening
from megatron_ext.observe.kinds import KIND_OF_OP
from megatron_ext.observe.spans import Recorder

UPDATING = ("prepare_grads", "get_grad_norm", "step_with_ready_grads", "step")
"""Methods of an optimizer that take time."""

SAVING = ("save", "poll", "before_update")
"""Methods of a checkpointer that may block the training."""


def _first(value: Any) -> Any:
    """The tensor that names an output: schedules pass it alone or as a list's first."""
    return value[0] if isinstance(value, (list, tuple)) and value else value


def _num_bytes(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    return sum(map(_num_bytes, value)) if isinstance(value, (list, tuple)) else 0


class Passes:
    """Names forward and backward passes: the backward of an output has its forward's numbers."""

    def __init__(self, recorder: Recorder, chunks: Sequence[Any]) -> None:
        self._recorder = recorder
        self._chunk_of = {id(chunk): index for index, chunk in enumerate(chunks)}
        self._outputs: dict[int, dict[str, int]] = {}
        self._next: dict[int, int] = {}

    def start_step(self) -> None:
        """Micro-batches are counted from 0 again."""
        self._outputs.clear()
        self._next.clear()

    def forward(self, stock: Callable) -> Callable:
        """`stock` (megatron-core's forward_step), recorded."""

        def forward_step(forward_step_func, data_iterator, model, *args, **kwargs):
            chunk = self._chunk_of.get(id(model), 0)
            micro_batch = self._next.get(chunk, 0)
            self._next[chunk] = micro_batch + 1
            what = {"micro_batch": micro_batch, "chunk": chunk}
            with self._recorder.span("forward", f"F{micro_batch}", **what):
                result = stock(forward_step_func, data_iterator, model, *args, **kwargs)
            self._outputs[id(_first(result[0]))] = what
            return result

        return forward_step

    def backward(self, stock: Callable) -> Callable:
        """`stock` (megatron-core's backward_step), recorded."""

        def backward_step(input_tensor, output_tensor, *args, **kwargs):
            what = self._outputs.pop(id(_first(output_tensor)), {})
            with self._recorder.span("backward", f"B{what.get('micro_batch', '')}", **what):
                return stock(input_tensor, output_tensor, *args, **kwargs)

        return backward_step


class Calls:
    """Hears of collectives (mesh.calls.Listener): a span for each time that the rank is held up,
    and one record of each collective from its call until it was waited for.
    """

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._pending: dict[int, tuple[str, str, Any, dict]] = {}
        self.whole: list[tuple[str, str, Any, Any, dict]] = []
        """(kind, name, start, end, args) of the step, while `keeps_whole`."""
        self.keeps_whole = False

    def now(self) -> Any:
        """A moment of the recorder's clock."""
        return self._recorder.clock.now()

    def called(self, op: str, group: Any, args: tuple, work: Any, start: Any, end: Any) -> None:
        """A collective was started, and is over where `work` is None."""
        kind = KIND_OF_OP.get(op, "collectives")
        more = self._describe(op, group, args) if self.keeps_whole else {}
        self._recorder.add(kind, op, start, end, more)
        if work is not None:
            self._pending[id(work)] = (kind, op, start, more)
            if len(self._pending) > 4096:  # handles that nobody waits for
                self._pending.pop(next(iter(self._pending)))
        elif self.keeps_whole:
            self.whole.append((kind, op, start, end, more))

    def waited(self, work: Any, start: Any, end: Any) -> None:
        """The rank waited for a collective."""
        kind, op, called, more = self._pending.pop(id(work), ("collectives", "wait", start, {}))
        self._recorder.add(kind, op, start, end, more)
        if self.keeps_whole:
            self.whole.append((kind, op, called, end, more))

    def _describe(self, op: str, group: Any, args: tuple) -> dict[str, Any]:
        more = {"group": group.group_desc, "bytes": _num_bytes(args[0]) if args else 0}
        if op in ("send", "recv") and len(args) > 1 and isinstance(args[1], int):
            more["peer"] = torch.distributed.get_global_rank(group, args[1])
        return more


def _timed(recorder: Recorder, kind: str, name: str, stock: Callable) -> Callable:
    def call(*args, **kwargs):
        with recorder.span(kind, name):
            return stock(*args, **kwargs)

    return call


@contextlib.contextmanager
def _methods(owner: Any, recorder: Recorder, kind: str, names: Sequence[str]) -> Iterator[None]:
    """Within it, these methods of one object are recorded, where it has them."""
    found = [name for name in names if hasattr(owner, name)]
    try:
        for name in found:
            setattr(owner, name, _timed(recorder, kind, name, getattr(owner, name)))
        yield
    finally:
        for name in found:
            vars(owner).pop(name, None)


@contextlib.contextmanager
def watching(
    recorder: Recorder, calls: Calls, passes: Passes, optimizer: Any, checkpointer: Any
) -> Iterator[None]:
    """Within it, what the training does becomes spans."""
    stock = schedules.forward_step, schedules.backward_step
    with contextlib.ExitStack() as stack:
        stack.enter_context(listening(calls))
        stack.enter_context(_methods(optimizer, recorder, "optimizer", UPDATING))
        stack.enter_context(_methods(checkpointer, recorder, "save", SAVING))
        try:
            schedules.forward_step = passes.forward(stock[0])
            schedules.backward_step = passes.backward(stock[1])
            yield
        finally:
            schedules.forward_step, schedules.backward_step = stock
