"""What signals ask of a run: the same rule for the launcher and for each rank, without torch.

    SIGINT (Ctrl-C), SIGTERM, SIGHUP, SIGUSR1, SIGUSR2    finish the step, save, leave with 75
    the same again                                        nothing: Slurm and docker send it twice
    Ctrl-C again, SAME_PRESS_S after the last one         stop now, nothing is saved (130)
    any other again, REPEAT_S after the first             stop now (128 + its number)
    before there is anything to save                      leave with 75, in START_DEADLINE_S at most

"Now" costs the step that is under way and a save that is not finished; the newest finished
checkpoint is whole.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable
from enum import Enum

from megatron_ext.errors import Preempted, report

SAVE_AND_LEAVE = (
    signal.SIGTERM,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGINT,
    signal.SIGHUP,
)
SAME_PRESS_S = 0.8
"""A key that is held down repeats after 0.25 to 0.7 s: all of that is one Ctrl-C."""
REPEAT_S = 600.0
"""From then on a repeated SIGTERM, SIGHUP, SIGUSR1 or SIGUSR2 is meant: Slurm sends the last one up
to some minutes after its warning."""
START_DEADLINE_S = 5.0
"""docker kills 10 s, Slurm 30 s after SIGTERM."""


class Means(Enum):
    """What one more signal means."""

    SAVE = "the first: save and leave"
    AGAIN = "known already"
    SAME_PRESS = "a key that is held down"
    NOW = "stop now"


class Asked:
    """What the signals so far ask for; pure."""

    def __init__(self) -> None:
        self.by: signal.Signals | None = None
        """The first signal."""
        self.at = 0.0
        """When it came, on the caller's clock."""
        self._pressed_at: float | None = None

    def hear(self, number: int, now: float) -> Means:
        """Another signal, at `now`."""
        last_press = self._pressed_at
        if number == signal.SIGINT:
            self._pressed_at = now
        if self.by is None:
            self.by, self.at = signal.Signals(number), now
            return Means.SAVE
        if number != signal.SIGINT:
            return Means.NOW if now - self.at > REPEAT_S else Means.AGAIN
        if last_press is None:
            return Means.AGAIN
        return Means.NOW if now - last_press > SAME_PRESS_S else Means.SAME_PRESS


def line(number: int, means: Means, doing: str, is_starting: bool) -> str:
    """What the person who sent it reads at once; "" where nothing is new.

    `doing`: what the run does now; `is_starting`: there is nothing to save yet.
    """
    name = signal.Signals(number).name
    again = "Ctrl-C again" if number == signal.SIGINT else "Ctrl-C twice"
    if means is Means.SAME_PRESS:
        return ""
    if means is Means.NOW:
        return f"{name} again: stopped now, in {doing}; the newest finished checkpoint is whole"
    begin = f"{name}: " if means is Means.SAVE else f"{name}, asked already: "
    if is_starting:
        how = f"nothing to save yet ({doing}), leaving within {START_DEADLINE_S:g} s with 75"
        return f"{begin}{how}, {again} to stop now"
    return f"{begin}saving after this step (now {doing}), then leaving with 75; {again} to stop now"


def ours(extra: Iterable[int] = ()) -> set[int]:
    """The signals to catch: not SIGHUP where nohup has it ignored, unless `extra` names it."""
    is_nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    caught = set(SAVE_AND_LEAVE) - ({signal.SIGHUP} if is_nohup else set())
    return caught | set(extra)


def ignore_all() -> None:
    """The exit code of this process is decided: no signal that still comes changes it."""
    for number in SAVE_AND_LEAVE:
        signal.signal(number, signal.SIG_IGN)


def leave_at_once() -> None:
    """From here on a signal ends this process: there is nothing to save, nor a rank, yet."""

    def leave(number: int, frame: object) -> None:
        name = signal.Signals(number).name
        report(Preempted(f"{name} came before the ranks started", do="start again"), 0)
        os._exit(Preempted.code)

    for number in ours():
        signal.signal(number, leave)
