"""Reasons to leave the loop early: a signal, a time limit.

SIGTERM, SIGUSR1 and SIGUSR2 (and a first Ctrl-C) ask for: finish the step, save, leave with 75.
They are caught from the first line of the program on, so that a signal while data or a checkpoint
are read is not lost; asking again changes nothing, so that it cannot kill the save. A second Ctrl-C
kills. One rank that was asked is enough: the ranks add their answers up where they sum anyway, in
each training step and each batch of an evaluation, and between the parts of the start.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any

from megatron_ext.errors import ConfigError, Preempted

SAVE_AND_LEAVE = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)


class StopRequest:
    """True once this rank was asked to stop; a context manager, in which the signals are ours.

    Args:
        train: cfg.train; --exit-signal-handler adds --exit-signal to the signals,
            --exit-duration-in-mins a deadline.
    """

    def __init__(self, train: Any) -> None:
        self.by_signal: str | None = None
        minutes = train.exit_duration_in_mins
        self._deadline = None if minutes is None else time.monotonic() + 60 * minutes
        self._numbers = set(SAVE_AND_LEAVE)
        if train.exit_signal_handler:
            self._numbers.add(_signal_number(train.exit_signal))
        self._before: dict[int, Callable | int | None] = {}

    def __enter__(self) -> StopRequest:
        for number in self._numbers:
            self._before[number] = signal.signal(number, self._on_signal)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, self._numbers)  # a launcher starts us with them
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: object) -> None:
        if number == signal.SIGINT and self.by_signal == "SIGINT":
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        self.by_signal = signal.Signals(number).name

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


def _signal_number(name: str) -> signal.Signals:
    text = str(name)
    if text.isdigit() and int(text) in set(signal.Signals):
        return signal.Signals(int(text))
    if text.upper() in signal.Signals.__members__:
        return signal.Signals[text.upper()]
    raise ConfigError(f"--exit-signal {name} is not a signal", do="use SIGTERM, SIGUSR1 or SIGUSR2")
