"""Row 29: several runs save into one folder at once: one holds the lease, the others leave with 73
and the holder's name; when it is killed the next one takes over.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

from megatron_ext.checkpoint.lock import LEASE, Lease
from megatron_ext.errors import LockedError
from tests.faults.cell import Case, Wrong, run_cases
from tests.faults.outcome import Outcome

HELD, LOCKED, OTHER = 10, 73, 1


def row_29(folder: Path, seed: int, count: int) -> list[Outcome]:
    """Runs that start together, a killed holder, a lease of a dead process, garbage in its file."""
    state = random.Random(seed)
    cases: list[Case] = []
    for number in range(count):
        where = folder / f"{number}"
        where.mkdir(parents=True)
        kind = state.choice(("together", "together", "garbage", "twin"))
        if kind == "garbage":
            cases.append((f"garbage: {number}", _garbage(where, state.randbytes(40))))
        else:
            cases.append((f"{kind}: {number}", _together(where, state.randrange(2, 6))))
    return run_cases(29, cases)


def _take_and_wait(folder: Path, gate: float) -> None:
    """In a child: waits for the moment, takes the lease, and holds it until it is killed."""
    while time.monotonic() < gate:
        continue
    try:
        Lease(folder).take()
    except LockedError as error:
        os._exit(LOCKED if "host " in str(error) and "pid " in str(error) else OTHER)
    Path(folder / f"held_{os.getpid()}").touch()
    time.sleep(60)


def _start(folder: Path, many: int) -> list[int]:
    gate, pids = time.monotonic() + 0.02, []
    for _ in range(many):
        pid = os.fork()
        if pid == 0:
            try:
                _take_and_wait(folder, gate)
            finally:
                os._exit(OTHER)
        pids.append(pid)
    return pids


def _together(folder: Path, many: int) -> Callable[[], None]:
    def action() -> None:
        for _ in range(2):  # the second time the lease is that of a dead process
            pids = _start(folder, many)
            holders = _holders(folder, pids)
            for pid in holders:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            if len(holders) != 1:
                raise Wrong("silent" if holders else "failed", f"{len(holders)} writers at once")

    return action


def _holders(folder: Path, pids: list[int]) -> list[int]:
    """Those that hold the lease once all others have ended; the others must have ended with 73."""
    waiting, deadline = set(pids), time.monotonic() + 15
    while len(waiting) > 1 and time.monotonic() < deadline:
        for pid in list(waiting):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended and os.waitstatus_to_exitcode(status) != LOCKED:
                raise Wrong("failed", f"exit code {os.waitstatus_to_exitcode(status)}")
            waiting -= {pid} if ended else set()
        time.sleep(0.002)
    while waiting and not any((folder / f"held_{pid}").exists() for pid in waiting):
        if time.monotonic() > deadline:
            raise Wrong("hung", "nobody holds the lease")
        time.sleep(0.002)
    return sorted(waiting)


def _garbage(folder: Path, content: bytes) -> Callable[[], None]:
    """A lease that cannot be read belongs to somebody until it is old."""

    def action() -> None:
        path = folder / LEASE
        path.write_bytes(content)
        try:
            Lease(folder).take()
        except LockedError:
            os.utime(path, (1, 1))
            Lease(folder).take()
            return
        raise Wrong("silent", "taken while its holder was unknown and fresh")

    return action
