"""Who wants to know of each collective and send, without touching the code that makes them.

torch.distributed's functions, whoever bound them when, end in a method of `ProcessGroup` and then
in `Work.wait`. `wrapping` replaces these methods of the two classes and puts them back on the way
out; uses may nest. `listening` does it for those who want to be told, which costs about two
microseconds a call.

    listener.now()                                   before and after, whatever it takes for a clock
    listener.called(op, group, args, work, t0, t1)   the method returned: it ran, or is under way
    listener.waited(work, t0, t1)                    Work.wait returned

Threads of ours (a checkpoint in the background) are left out: only the main thread and autograd's
threads, which Python did not start, are heard. Collectives inside compiled graphs
(torch.ops._c10d_functional) are not seen; megatron-core has none.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

from torch._C._distributed_c10d import ProcessGroup, Work

METHODS = {
    "allreduce": "all_reduce",
    "allreduce_coalesced": "all_reduce",
    "allgather": "all_gather",
    "allgather_coalesced": "all_gather",
    "allgather_into_tensor_coalesced": "all_gather",
    "_allgather_base": "all_gather",
    "all_gather_single": "all_gather",
    "all_gather_single_coalesced": "all_gather",
    "reduce_scatter": "reduce_scatter",
    "_reduce_scatter_base": "reduce_scatter",
    "reduce_scatter_single": "reduce_scatter",
    "reduce_scatter_single_coalesced": "reduce_scatter",
    "reduce_scatter_tensor_coalesced": "reduce_scatter",
    "alltoall": "all_to_all",
    "alltoall_base": "all_to_all",
    "all_to_all_single": "all_to_all",
    "broadcast": "broadcast",
    "reduce": "reduce",
    "gather": "gather",
    "scatter": "scatter",
    "barrier": "barrier",
    "monitored_barrier": "barrier",
    "send": "send",
    "recv": "recv",
    "recv_anysource": "recv",
}
"""Methods of ProcessGroup -> names of people; torch versions lack some."""


_WORK_WAIT = vars(Work)["wait"]


class Pending:
    """The handle of an asynchronous collective of ours: `works` of gloo, then `finish` once.

    Not a `Work`, whose `wait` C++ calls; listeners hear of this one's as they do of Work's.
    """

    def __init__(
        self, works: Sequence[Any], finish: Callable[[], None], keep: tuple[Any, ...] = ()
    ) -> None:
        self._works, self._finish = list(works), finish
        self._keep = keep  # tensors that are on their way

    @classmethod
    def of(cls, parts: Sequence[Pending], is_async: bool) -> Pending | None:
        """One handle for all of `parts`; None, after all of them, where the caller has no use for
        one.
        """
        whole = cls([], lambda: [part.finish() for part in parts])
        if is_async:
            return whole
        whole.finish()
        return None

    def finish(self) -> None:
        """`wait` that nobody hears."""
        works, self._works = self._works, []
        for work in works:
            _WORK_WAIT(work)
        self._finish()
        self._finish, self._keep = lambda: None, ()

    def wait(self, timeout: Any = None) -> bool:
        """Return when the result is there."""
        self.finish()
        return True


WAITED = (Work, Pending)
"""The classes whose `wait` ends a collective."""


class Listener(Protocol):
    """What `listening` calls; see the module's docstring."""

    def now(self) -> Any:
        """A moment, in whatever the listener understands."""

    def called(self, op: str, group: Any, args: tuple, work: Any, start: Any, end: Any) -> None:
        """A method of a group returned; `work` is None where nothing is left to wait for."""

    def waited(self, work: Any, start: Any, end: Any) -> None:
        """Work.wait returned."""


def is_heard() -> bool:
    """True on the main thread and on threads that C++ started, such as autograd's."""
    thread = threading.current_thread()
    return thread is threading.main_thread() or isinstance(thread, threading._DummyThread)


def _method(listener: Listener, op: str, stock: Callable) -> Callable:
    def call(self, *args, **kwargs):
        if not is_heard():
            return stock(self, *args, **kwargs)
        start = listener.now()
        work = stock(self, *args, **kwargs)
        listener.called(op, self, args, work, start, listener.now())
        return work

    return call


def _wait(listener: Listener, stock: Callable) -> Callable:
    def wait(self, *args, **kwargs):
        if not is_heard():
            return stock(self, *args, **kwargs)
        start = listener.now()
        result = stock(self, *args, **kwargs)
        listener.waited(self, start, listener.now())
        return result

    return wait


@contextlib.contextmanager
def patched(methods: Mapping[tuple[type, str], Callable]) -> Iterator[None]:
    """Within it, classes have these methods; (class, name) -> method."""
    # of the class's own dictionary: what getattr returns for a method of pybind11 does not bind
    # again when it is put back
    stock = {(owner, name): vars(owner)[name] for owner, name in methods}
    try:
        for (owner, name), method in methods.items():
            setattr(owner, name, method)
        yield
    finally:
        for (owner, name), method in stock.items():
            setattr(owner, name, method)


def wrapping(
    method: Callable[[str, Callable], Callable], wait: Callable[[Callable], Callable]
) -> contextlib.AbstractContextManager[None]:
    """Within it, each method of METHODS is `method(op, stock)`, each `wait` is `wait(stock)`."""
    stock = vars(ProcessGroup)
    ours = {
        (ProcessGroup, name): method(op, stock[name])
        for name, op in METHODS.items()
        if name in stock
    }
    return patched(ours | {(kind, "wait"): wait(vars(kind)["wait"]) for kind in WAITED})


def listening(listener: Listener) -> contextlib.AbstractContextManager[None]:
    """Within it, `listener` hears of every call."""
    return wrapping(partial(_method, listener), partial(_wait, listener))
