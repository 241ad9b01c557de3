"""Reasons to leave the loop early: a signal, a time limit.

`mesh.signals` says what signals ask for. They are caught from the first line of the program on, so
that one that comes while data or a checkpoint are read is not lost. One rank that was asked is
enough: the ranks add their answers up where they sum anyway, in each training step and each batch
of an evaluation, and between the parts of the start.

    kernel -> pipe (set_wakeup_fd) -> listener thread    says one line at once, or stops now
                                   -> main thread        asks between its steps

The thread hears a signal also while the main thread is inside C for long: a collective, a kernel, a
model being built. Before the training there is nothing to save, so the thread ends the process
where the main thread has not come to a safe point within `signals.START_DEADLINE_S`.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from megatron_ext.errors import (
    EXIT_REASON,
    ConfigError,
    Preempted,
    current_rank,
    exit_reason,
    report,
    write_exit_reason,
)
from megatron_ext.mesh import signals
from megatron_ext.mesh.attempt import has_launcher
from megatron_ext.mesh.signals import Asked, Means


class StopRequest:
    """True once this rank was asked to stop; a context manager, in which the signals are ours.

    Args:
        train: cfg.train; --exit-signal-handler adds --exit-signal to the signals,
            --exit-duration-in-mins a deadline.
    """

    def __init__(self, train: Any) -> None:
        minutes = train.exit_duration_in_mins
        self._deadline = None if minutes is None else time.monotonic() + 60 * minutes
        extra = [_signal_number(train.exit_signal)] if train.exit_signal_handler else []
        self._numbers = signals.ours(extra)
        self._asked, self._lock = Asked(), threading.Lock()
        self._doing: Callable[[], str] = lambda: "meeting the other ranks and reading the data"
        self._is_starting = True
        self._before: dict[int, Callable | int | None] = {}
        self._read: int | None = None  # end of the pipe, while the signals are ours

    @property
    def by_signal(self) -> str | None:
        """The name of the first signal."""
        self._hear()
        return self._asked.by and self._asked.by.name

    def starts(self, doing: str) -> None:
        """This comes now, before the training; there is nothing to save."""
        self._doing, self._is_starting = lambda: doing, True

    def trains(self, doing: Callable[[], str]) -> None:
        """From here on the main thread is asked often, and takes as long as its save needs."""
        self._doing, self._is_starting = doing, False

    def __enter__(self) -> StopRequest:
        self._read, self._write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        for number in self._numbers:
            self._before[number] = signal.signal(number, lambda number, frame: None)
        self._wakeup_before = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._thread.start()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, self._numbers)  # a launcher starts us with them
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        """What is saved is saved: where the run was asked to stop, by whichever rank, a repeated
        signal must not turn the 75 into another code while this process ends.
        """
        is_leaving = self.by_signal is not None or isinstance(error, Preempted)
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_IGN if is_leaving else handler)
        signal.set_wakeup_fd(self._wakeup_before)
        os.close(self._write)  # ends the thread
        self._thread.join()
        os.close(self._read)
        self._read = None

    def __call__(self) -> tuple[bool, bool]:
        """(by a signal, by the time limit), as this rank knows it."""
        timed_out = self._deadline is not None and time.monotonic() > self._deadline
        return self.by_signal is not None, timed_out

    def preempted(self, where: str, step: int, saved: str = "state saved") -> Preempted:
        """The error that ends the run now, with 75."""
        error = Preempted(
            f"stopped by {self.by_signal or 'a signal to another rank'} {where}, {saved}",
            do="start the same command again to go on",
        )
        error.step = step
        return error

    def _listen(self) -> None:
        """The thread's loop, until the pipe is closed."""
        while True:
            is_due = self._asked.by is not None and self._is_starting
            deadline = self._asked.at + signals.START_DEADLINE_S
            if is_due and time.monotonic() > deadline:
                self._leave()
            timeout = max(0.0, deadline - time.monotonic()) + 0.01 if is_due else None
            select.select([self._read], [], [], timeout)
            if self._hear():
                return

    def _hear(self) -> bool:
        """Take in what has come, on any thread; True where the pipe is closed."""
        with self._lock:
            try:
                numbers = b"" if self._read is None else os.read(self._read, 64)
            except BlockingIOError:
                return False
            for number in numbers:
                if number in self._numbers:
                    self._heard(number)
            return not numbers

    def _heard(self, number: int) -> None:
        means = self._asked.hear(number, time.monotonic())
        text = signals.line(number, means, self._doing(), self._is_starting)
        if text and current_rank() == 0 and not has_launcher():  # a launcher says it for its ranks
            sys.stderr.write(f"{text}\n")
            sys.stderr.flush()
        if means is Means.NOW:
            os._exit(128 + number)

    def _leave(self) -> None:
        """The main thread came to no safe point in time: end this process."""
        where = f"before the first step, while {self._doing()}"
        error = self.preempted(where, 0, "nothing new to save")
        error.every_rank = False  # this rank may be the only one that was asked
        path, rank = os.environ.get(EXIT_REASON), current_rank()
        if not path or write_exit_reason(exit_reason(error, rank), path):
            report(error, rank)
        os._exit(error.code)


def _signal_number(name: str) -> signal.Signals:
    text = str(name)
    if text.isdecimal() and int(text) in set(signal.Signals):
        return signal.Signals(int(text))
    if text.upper() in signal.Signals.__members__:
        return signal.Signals[text.upper()]
    raise ConfigError(f"--exit-signal {name} is not a signal", do="use SIGTERM, SIGUSR1 or SIGUSR2")
