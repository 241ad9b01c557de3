"""The processes of one attempt: started, signalled, waited for; when one fails the others end.

Each has a process group of its own (Ctrl-C comes from here, once; what a rank leaves behind is
killed with its group) and dies with this process (PR_SET_PDEATHSIG).
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from launch import warm
from launch.outside import Outside
from megatron_ext.errors import ResourceError
from megatron_ext.mesh import signals

FATAL_CODES = range(64, 80)
GRACE_S = 10
"""How long the others may go on after a rank ended with a FATAL code: they end by themselves."""
GRACE_AFTER_SAVE_S = 60
"""The same after code 75: ranks that saved together leave one after the other."""
PREEMPTED = 75
PR_SET_PDEATHSIG, PR_SET_NAME = 1, 15


@dataclass(frozen=True)
class Failure:
    """The process that failed first: rank (None: srun), process id, exit code (128 + n: signal)."""

    rank: int | None
    pid: int
    code: int

    def __str__(self) -> str:
        who = "srun" if self.rank is None else f"rank {self.rank}"
        return f"{who} (process {self.pid}) {_ending(self.code)}"


def _ending(code: int) -> str:
    if code <= 128:
        return f"ended with exit code {code}"
    number = code - 128
    name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
    hint = ", often a lack of memory" if number == signal.SIGKILL else ""
    return f"was killed by {name}{hint}"


class Ranks:
    """The living processes of one attempt.

    Args:
        failed: called with the first `Failure`, as soon as it is known.
    """

    def __init__(self, failed: Callable[[Failure], None]) -> None:
        self._failed = failed
        self._libc = ctypes.CDLL(None)
        self._parent = os.getpid()
        self._rank_of: dict[int, int | None] = {}
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})  # `wait` sleeps until one comes

    def fork(self, rank: int, environment: Mapping[str, str], flags: Sequence[str]) -> None:
        """Start the program as a copy of this process, which has imported it: see warm.py."""
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, signals.SAVE_AND_LEAVE)
        try:
            pid = os.fork()
        except OSError as error:
            raise _no_process(rank, error) from error
        if pid == 0:
            self._become_rank(rank, environment)
            warm.run(list(flags))
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        self._rank_of[pid] = rank

    def _become_rank(self, rank: int, environment: Mapping[str, str]) -> None:
        self._in_child()
        for number in (*signals.ours(), signal.SIGALRM):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.environ.clear()
        os.environ.update(environment)
        self._libc.prctl(PR_SET_NAME, f"rank {rank}".encode())

    def spawn(
        self,
        rank: int | None,
        command: Sequence[str],
        environment: Mapping[str, str],
        descriptors: Sequence[int] = (),
    ) -> None:
        """Start a command; `descriptors` stay open in it."""
        try:
            process = subprocess.Popen(
                list(command),
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                pass_fds=tuple(descriptors),
                preexec_fn=lambda: self._before_exec(rank),
            )
        except OSError as error:
            raise _no_process(rank, error) from error
        process.returncode = 0  # waited for below with waitpid; Popen must not do it again
        self._rank_of[process.pid] = rank

    def _before_exec(self, rank: int | None) -> None:
        self._in_child()
        if rank is None:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, signals.SAVE_AND_LEAVE)
        else:  # the program catches them from its first line on; until then they wait
            signal.pthread_sigmask(signal.SIG_BLOCK, signals.SAVE_AND_LEAVE)

    def _in_child(self) -> None:
        os.setpgid(0, 0)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
        self._libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != self._parent:
            os._exit(1)

    def __bool__(self) -> bool:
        """True while one lives."""
        return bool(self._rank_of)

    def pids(self) -> dict[int, int]:
        """Rank -> process id of those that live (none of srun's, which are not ours)."""
        return {rank: pid for pid, rank in self._rank_of.items() if rank is not None}

    def wait(self, outside: Outside | None = None) -> Failure | None:
        """Wait for all; the first that failed. `outside` looks at them meanwhile."""
        first = None
        poll_s = outside.poll_s if outside else None
        while self._rank_of:
            pid, status = os.waitpid(-1, os.WNOHANG if poll_s else 0)
            if not pid:
                signal.sigtimedwait({signal.SIGCHLD}, poll_s)
                if outside.is_over(time.monotonic()):
                    self.kill()
                continue
            if pid not in self._rank_of:
                continue
            rank = self._rank_of.pop(pid)
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(pid, signal.SIGKILL)  # what the rank left behind
            code = os.waitstatus_to_exitcode(status)
            if code and first is None:
                first = Failure(rank, pid, 128 - code if code < 0 else code)
                self._end_the_others(first)
        signal.alarm(0)
        return first

    def _end_the_others(self, first: Failure) -> None:
        if first.code in FATAL_CODES:
            signal.alarm(GRACE_AFTER_SAVE_S if first.code == PREEMPTED else GRACE_S)
            if first.code == PREEMPTED:  # it may be the only one that was asked
                self.send(signal.SIGUSR1)
        else:
            self.kill()
        self._failed(first)

    def kill(self) -> None:
        """End all now."""
        self.send(signal.SIGKILL)

    def send(self, number: int) -> None:
        """Send a signal to all, with their process groups."""
        for pid in list(self._rank_of):
            with suppress(ProcessLookupError):  # it has just ended; waitpid tells how
                os.killpg(pid, number)


def _no_process(rank: int | None, error: OSError) -> ResourceError:
    return ResourceError(
        f"cannot start {'srun' if rank is None else f'rank {rank}'}: {error.strerror}",
        do="raise the limits of processes (ulimit -u, pids.max of the cgroup) or memory",
    )
