"""Row 29: several runs save into one folder at once: one holds the lease, the others leave with 73
and the holder's name; when it is killed the next one takes over. A holder that cannot be seen (a
container that is gone, an unreadable lease) is waited for and replaced; one that still touches its
lease is not; a process killed while it takes the lease leaves a whole one or none.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from megatron_ext.checkpoint import lock
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
        kind = (*KINDS, "together")[number] if number <= len(KINDS) else state.choice(KINDS)
        cases.append((f"{kind}: {number}", _case(kind, where, state)))
    return run_cases(29, cases)


KINDS = ("together", "unreadable", "gone elsewhere", "alive elsewhere", "killed in it")


def _case(kind: str, folder: Path, state: random.Random) -> Callable[[], None]:
    if kind == "together":
        return _together(folder, state.randrange(2, 6))
    if kind == "unreadable":
        return _waited_for(folder, state.choice((b"", b"{", state.randbytes(40))))
    if kind == "killed in it":
        return _killed(folder, [state.uniform(0, 0.02) for _ in range(10)])
    there = {"host": "elsewhere", "pid": state.randrange(1, 9), "namespace": "boot/pid:[1]"}
    content = json.dumps({**there, "uuid": "another"}).encode()
    return _waited_for(folder, content) if kind == "gone elsewhere" else _alive(folder, content)


@contextlib.contextmanager
def _quick() -> Iterator[None]:
    """The lease's times, shortened."""
    before = lock.BEAT_S, lock.STALE_S, lock.LOOK_S
    lock.BEAT_S, lock.STALE_S, lock.LOOK_S = 0.1, 1.0, 0.02
    try:
        yield
    finally:
        lock.BEAT_S, lock.STALE_S, lock.LOOK_S = before


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


def _waited_for(folder: Path, content: bytes) -> Callable[[], None]:
    """A holder of which only the age of its lease is known has it until that is old."""

    def action() -> None:
        (folder / LEASE).write_bytes(content)
        begin = time.monotonic()
        with _quick():
            Lease(folder).take()
            if time.monotonic() - begin < lock.STALE_S / 2:
                raise Wrong("silent", "taken while its holder was unknown and fresh")

    return action


def _alive(folder: Path, content: bytes) -> Callable[[], None]:
    def action() -> None:
        path, stop = folder / LEASE, threading.Event()
        path.write_bytes(content)

        def beat() -> None:
            while not stop.wait(lock.BEAT_S):
                os.utime(path)

        with _quick():
            thread = threading.Thread(target=beat)
            thread.start()
            try:
                Lease(folder).take()
            except LockedError:
                return
            finally:
                stop.set()
                thread.join()
        raise Wrong("silent", "taken although its holder still touched it")

    return action


def _killed(folder: Path, delays: list[float]) -> Callable[[], None]:
    """Each time the file is a whole lease or not there, and the next run gets it at once."""

    def action() -> None:
        path = folder / LEASE
        for delay in delays:
            pid = os.fork()
            if pid == 0:
                while True:
                    lease = Lease(folder)
                    lease.take()
                    lease.release()
            time.sleep(delay)
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            if path.exists() and "uuid" not in (lock.read_lease(path) or {}):
                raise Wrong("failed", f"half a lease: {path.read_bytes()!r}")
            begin = time.monotonic()
            Lease(folder).take()
            if time.monotonic() - begin > lock.BEAT_S / 2:
                raise Wrong("failed", "a dead holder was waited for")
            path.unlink()

    return action
