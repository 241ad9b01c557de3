"""Ranks forked from this process, which has imported everything: started, waited for, cleared away.

The harness plays the launcher: when one rank ends badly the others get a moment and are killed. As
the subreaper of its descendants it also inherits what they leave behind, so that an orphan is seen.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from megatron_ext.mesh.forks import free_port

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
GRACE_S = 1.0
POLL_S = 0.01
RESIDUE_S = 10.0


@dataclass
class Ending:
    """How the ranks of one attempt ended."""

    codes: list[int] = field(default_factory=list)
    """Exit code of each rank, negative: a signal."""
    first: int = 0
    """Code of the rank that failed first."""
    hung: bool = False
    detected_at: float = 0.0
    gone_at: float = 0.0
    spawned_at: float = 0.0
    own: set[int] = field(default_factory=set)
    """Ranks that the harness killed."""

    @property
    def is_good(self) -> bool:
        """All ranks ended with 0."""
        return not self.hung and not any(self.codes)


def become_subreaper(is_one: bool = True) -> None:
    """Orphans of our ranks become our children (until called with False)."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, int(is_one))


def _child(
    action: Callable[[], None], rank: int, world: int, port: int, log: Path, extra: dict
) -> None:
    """Never returns."""
    code = 1
    try:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)  # pytest's own lead elsewhere
        sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(world),
            LOCAL_WORLD_SIZE=str(world),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
            **extra,
        )
        action()
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(bool(error.code))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class Ranks:
    """The processes of one attempt."""

    def __init__(
        self, action: Callable[[], None], world: int, logs: Path, attempt: int, extra: dict
    ) -> None:
        self.port = free_port()
        self.ending = Ending(codes=[0] * world, spawned_at=time.monotonic())
        self.rank_of: dict[int, int] = {}
        settings = {"PRETRAIN_MOE_ATTEMPT": str(attempt), **extra}
        sys.stdout.flush()
        sys.stderr.flush()
        for rank in range(world):
            pid = os.fork()
            if pid == 0:
                log = logs / f"attempt_{attempt}.rank_{rank}.log"
                _child(action, rank, world, self.port, log, settings)
            self.rank_of[pid] = rank

    def wait(self, limit_s: float, each: Callable[[Ranks], None] | None = None) -> Ending:
        """Until all have ended; past ``limit_s`` they are killed and the attempt counts as hung.

        ``each`` is called at every look, for faults that come from outside.
        """
        deadline = time.monotonic() + limit_s
        while self.rank_of:
            self._reap()
            if each is not None:
                each(self)
            now = time.monotonic()
            ending = self.ending
            if ending.detected_at and now > ending.detected_at + GRACE_S:
                self.kill()
            if now > deadline and self.rank_of:
                ending.hung = True
                self.kill()
            time.sleep(POLL_S)
        self.ending.gone_at = time.monotonic()
        return self.ending

    def _reap(self) -> None:
        for pid in list(self.rank_of):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if not ended:
                continue
            rank = self.rank_of.pop(pid)
            code = os.waitstatus_to_exitcode(status)
            self.ending.codes[rank] = code
            if code and not self.ending.detected_at:
                self.ending.detected_at = time.monotonic()
                self.ending.first = code

    def send(self, number: int, ranks: list[int] | None = None) -> None:
        """A signal to some ranks, or to all."""
        for pid, rank in list(self.rank_of.items()):
            if ranks is None or rank in ranks:
                os.kill(pid, number)

    def kill(self) -> None:
        """SIGKILL to all that live."""
        self.ending.own |= set(self.rank_of.values())
        self.send(signal.SIGKILL)


def children(parent: int | None = None) -> list[int]:
    """Living processes whose parent is this one, or another."""
    wanted = os.getpid() if parent is None else parent
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it has just ended
        if int(fields[1]) == wanted and fields[0] not in ("Z", "X"):
            found.append(int(entry.name))
    return found


def orphans(known: set[int], limit_s: float = RESIDUE_S) -> list[int]:
    """Descendants that still live ``limit_s`` after their ranks; they are killed."""
    deadline = time.monotonic() + limit_s
    while (left := [pid for pid in children() if pid not in known]) and time.monotonic() < deadline:
        time.sleep(0.05)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    _reap_zombies(known)
    return left


def _reap_zombies(known: set[int]) -> None:
    """Orphans that ended became our zombies: wait for those that nobody else waits for."""
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) in known:
            continue
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
            if int(fields[1]) == os.getpid() and fields[0] == "Z":
                os.waitpid(int(entry.name), os.WNOHANG)
        except (OSError, ChildProcessError):
            continue
