"""Reasons to leave the loop early: a signal, a time limit, a step."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable

from megatron_ext.errors import ConfigError


class StopRequest:
    """True once this rank was asked to stop; the loop adds all ranks' answers up, so that they stop
    together.
    """

    def __init__(self, train) -> None:
        self.by_signal: str | None = None
        minutes = train.exit_duration_in_mins
        self._deadline = None if minutes is None else time.monotonic() + 60 * minutes
        self._old: Callable | int | None = None
        self._signal = None
        if train.exit_signal_handler:
            self._signal = _signal_number(train.exit_signal)
            self._old = signal.signal(self._signal, self._on_signal)

    def _on_signal(self, number: int, frame) -> None:
        self.by_signal = signal.Signals(number).name

    def __call__(self) -> tuple[bool, bool]:
        """(by a signal, by the time limit), as this rank knows it."""
        timed_out = self._deadline is not None and time.monotonic() > self._deadline
        return self.by_signal is not None, timed_out

    def close(self) -> None:
        """Give the signal back to whoever had it."""
        if self._signal is not None:
            signal.signal(self._signal, self._old)


def _signal_number(name: str) -> int:
    text = str(name)
    if text.isdigit() and int(text) in set(signal.Signals):
        return int(text)
    if text.upper() in signal.Signals.__members__:
        return signal.Signals[text.upper()]
    raise ConfigError(f"--exit-signal {name} is not a signal", do="use SIGTERM, SIGUSR1 or SIGUSR2")
