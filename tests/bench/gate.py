"""A candidate's side of a comparison: it takes a step when it is its turn and blocks otherwise.

    driver -> {"untimed": 1, "timed": 4}            worker -> {"seconds": [...], "loss": [...], ...}

`Gate.step()` is called before every step. Within a turn it only notes the time, so that a step is
the time from one call to the next, whatever the candidate does between them; at the end of a turn
it answers and blocks on the pipe. torch's threads sleep then (libgomp spins for some milliseconds
only), and the first steps of a turn, which find cold caches, are not counted.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TextIO

SETTLE_S = 0.02  # after an answer, before the next candidate starts


def memory_mib(name: str = "VmRSS") -> float:
    """VmRSS (now) or VmHWM (most so far) of this process."""
    with open("/proc/self/status") as status:
        return next(float(line.split()[1]) for line in status if line.startswith(name)) / 1024


def private_stdout() -> TextIO:
    """The pipe to the driver; whatever else is printed goes to stderr."""
    pipe = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return pipe


@dataclass
class Gate:
    """`facts` go to the driver with "ready"; `losses` are those of the steps of a turn."""

    pipe: TextIO
    facts: dict[str, Any] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    parts: Callable[[], dict[str, Any]] = dict
    _seconds: list[float] = field(default_factory=list)
    _cpu: float = 0.0
    _begin: float = 0.0
    _untimed: int = 0
    _timed: int = 0
    _is_ready: bool = False

    def imported(self) -> None:
        """Call after the imports: what follows is the candidate's own memory."""
        self.facts["imports_mib"] = memory_mib()

    def loss(self, value: float) -> None:
        """The loss of the step that was just taken."""
        self.losses.append(float(value))

    def step(self) -> None:
        """Call before each step."""
        now = time.perf_counter()
        if self._untimed > 0:
            self._untimed -= 1
            self._cpu = time.process_time()
        elif self._timed > 0:
            self._seconds.append(now - self._begin)
            self._timed -= 1
        if not self._untimed and not self._timed:
            self._answer()
            self._wait()
        self._begin = time.perf_counter()

    def _answer(self) -> None:
        if not self._is_ready:
            self._is_ready = True
            self._say({"ready": True, **self.facts})
            return
        self._say(
            {
                "seconds": self._seconds,
                "cpu_s": (time.process_time() - self._cpu) / max(1, len(self._seconds)),
                "losses": self.losses,
                "peak_mib": memory_mib("VmHWM"),
                **self.parts(),
            }
        )
        self._seconds, self.losses = [], []

    def _say(self, message: dict[str, Any]) -> None:
        self.pipe.write(json.dumps(message) + "\n")
        self.pipe.flush()

    def _wait(self) -> None:
        line = sys.stdin.readline()
        if not line:
            os._exit(0)  # the driver is done; a run that saves at its end would only take time
        turn = json.loads(line)
        self._untimed, self._timed = turn["untimed"], turn["timed"]
        if not self._untimed:
            self._cpu = time.process_time()
