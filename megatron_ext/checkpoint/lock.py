"""One writer a folder: `lease.json` names the host and process that may save here.

Taken by rank 0 with O_EXCL, touched every few seconds while the run lives, removed at its end. A
lease is stale, and is taken over, when its process is gone (seen from the same host and process-id
namespace) or, seen from elsewhere, when it has not been touched for two minutes of the file
server's own clock.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import socket
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_ext.checkpoint.folder import disk_error
from megatron_ext.errors import LockedError

LEASE = "lease.json"
_GUARD = ".lease.guard"
BEAT_S = 10.0
STALE_S = 120.0

_log = logging.getLogger(__name__)


def _started(pid: int) -> str | None:
    """When a process started, in clock ticks since boot (a pid may be used again); None if there is
    none.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in ("Z", "X") else fields[19]


def _namespace() -> str:
    """Identifies the kernel boot and the process-id namespace: within it, pids mean the same."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return "unknown"


class Lease:
    """The right to write into one folder, held by this process from `take` to `release`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.path = directory / LEASE
        self.identity = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": _started(os.getpid()),
            "namespace": _namespace(),
            "job": os.environ.get("SLURM_JOB_ID"),
            "uuid": uuid.uuid4().hex,
        }
        self._stop = threading.Event()

    @contextlib.contextmanager
    def _guard(self) -> Iterator[int]:
        """One process at a time looks at the lease and changes it, where there is flock."""
        descriptor = os.open(self.directory / _GUARD, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            with contextlib.suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield descriptor
        finally:
            os.close(descriptor)

    def take(self) -> None:
        """Take the lease. Raises LockedError (73) while another run holds it, DiskError (74) if
        nothing can be written.
        """
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            with self._guard() as guard:
                self._clear_stale(guard)
                descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
                with os.fdopen(descriptor, "w") as file:
                    json.dump(self.identity, file)
        except OSError as error:
            raise disk_error(error, self.directory) from error
        threading.Thread(target=self._beat, name="lease", daemon=True).start()

    def _clear_stale(self, guard: int) -> None:
        """Remove a lease without an owner; refuse if it has one."""
        holder = read_lease(self.path)
        if holder is None:
            return
        os.utime(guard)
        age_s = os.fstat(guard).st_mtime - self.path.stat().st_mtime
        who = f"host {holder.get('host')} pid {holder.get('pid')}"
        if holder.get("job"):
            who += f" job {holder['job']}"
        if is_alive(holder, self.identity, age_s):
            raise LockedError(
                f"another run saves into this folder: {who}, last sign {age_s:.0f} s ago",
                do=f"stop that run, or --save another folder; if it is gone, remove {self.path}",
                path=self.directory,
            )
        _log.warning("took over the stale lease of %s in %s", who, self.directory)
        self.path.unlink()

    def _beat(self) -> None:
        """Touch the lease until released; a failing touch is not worth a run, the next save will
        say more.
        """
        while not self._stop.wait(BEAT_S):
            with contextlib.suppress(OSError):
                os.utime(self.path)

    def is_mine(self) -> bool:
        """False once another run has taken over (this process was stopped for long, or somebody
        removed the file).
        """
        holder = read_lease(self.path)
        return holder is not None and holder.get("uuid") == self.identity["uuid"]

    def check(self) -> None:
        """Raises LockedError if the lease was lost."""
        if not self.is_mine():
            raise LockedError(
                "the lease on this folder was lost to another run or removed",
                do="start again with --save another folder, or when the other run is done",
                path=self.directory,
            )

    def release(self) -> None:
        """Give the folder free; nothing happens if the lease was lost."""
        self._stop.set()
        with contextlib.suppress(OSError):
            if self.is_mine():
                self.path.unlink()


def read_lease(path: Path) -> dict[str, Any] | None:
    """Who holds the folder; None for nobody. An unreadable lease belongs to an unknown holder: only
    its age counts.
    """
    try:
        holder = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        return {}
    return holder if isinstance(holder, dict) else {}


def is_alive(holder: dict[str, Any], me: dict[str, Any], age_s: float) -> bool:
    """Whether the holder still runs: its process, where it can be seen from here, else the age of
    its last sign.
    """
    can_see = me["namespace"] != "unknown" and holder.get("namespace") == me["namespace"]
    if can_see and isinstance(holder.get("pid"), int):
        return _started(holder["pid"]) == holder.get("started")
    return age_s < STALE_S
