"""One writer a folder: `lease.json` names the host and process that may write here.

Linked into its place whole, touched every few seconds while the run lives, removed at its end. A
lease is stale, and is taken over, when its process is gone (seen from the same host and process-id
namespace) or, seen from elsewhere, when it has not been touched for two minutes of the file
server's own clock. Where only that age can tell, who wants the folder waits: until the holder is
seen to touch its lease (refused), or until it is stale.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ext.checkpoint.folder import write_new
from megatron_ext.errors import DiskError, LockedError
from megatron_ext.state_files import read_bytes

LEASE = "lease.json"
_GUARD = ".lease.guard"
BEAT_S = 10.0
STALE_S = 120.0
LOOK_S = 1.0
"""Between two looks at a lease whose holder cannot be seen."""
WAITING = (
    "%s is held by %s, which cannot be seen from here (last sign %.0f s ago): waiting for another"
    " sign of it, %.0f s at most"
)
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK)

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


@dataclass(frozen=True)
class _Sign:
    """What a lease whose holder cannot be seen from here showed in one look."""

    owner: str | None
    touched_ns: int
    age_s: float
    who: str


_NOBODY = "nobody"
_AGAIN = _Sign(_NOBODY, 0, 0.0, "")
"""The lease has just come or gone: look again."""


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
        descriptor = os.open(self.directory / _GUARD, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            with contextlib.suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield descriptor
        finally:
            os.close(descriptor)

    def take(self) -> None:
        """Take the lease; waits, and says so once, where only time can tell whether another run
        holds it. Raises LockedError (73) while one does, DiskError (74) if nothing can be written.
        """
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            first, has_said = None, False
            while (seen := self._look(first)) is not None:
                if seen.owner is not _NOBODY and not has_said:
                    left_s = STALE_S - seen.age_s
                    _log.warning(WAITING, self.directory, seen.who, seen.age_s, left_s)
                    has_said = True
                first = seen
                time.sleep(LOOK_S)
        except OSError as error:
            raise DiskError(
                f"cannot write into the folder: {error.strerror}",
                do="free space, or --run-dir and --save folders that can be written",
                path=error.filename or self.directory,
            ) from error
        threading.Thread(target=self._beat, name="lease", daemon=True).start()

    def _look(self, first: _Sign | None) -> _Sign | None:
        """None: the lease is ours now. Else what was seen when the wait for its holder began."""
        with self._guard() as guard:
            holder = read_lease(self.path)
            if holder is not None:
                try:
                    seen = self._sign(holder, guard)
                except FileNotFoundError:  # given free between the two looks
                    return _AGAIN
                if is_alive(holder, self.identity, seen.age_s):
                    is_same = first is not None and seen.owner == first.owner
                    has_moved = is_same and seen.touched_ns > first.touched_ns
                    if has_moved or is_seen(holder, self.identity):
                        raise self._held(seen)
                    return first if is_same else seen
                _log.warning("took over the stale lease of %s in %s", seen.who, self.directory)
                self.path.unlink()
            return None if self._create() else _AGAIN

    def _sign(self, holder: dict[str, Any], guard: int) -> _Sign:
        os.utime(guard)
        info = self.path.stat()
        age_s = os.fstat(guard).st_mtime - info.st_mtime
        who = f"host {holder.get('host')} pid {holder.get('pid')}" if holder else "an unknown run"
        who += f" job {holder['job']}" if holder.get("job") else ""
        return _Sign(holder.get("uuid"), info.st_mtime_ns, age_s, who)

    def _held(self, seen: _Sign) -> LockedError:
        return LockedError(
            f"another run holds this folder: {seen.who}, last sign {seen.age_s:.0f} s ago",
            do="stop that run, or --run-dir and --save another folder;"
            f" if it is gone, remove {self.path}",
            path=self.directory,
        )

    def _create(self) -> bool:
        """The lease with its whole content, or False where there is one already."""
        temporary = self.directory / f".{LEASE}.{self.identity['uuid'][:8]}"
        write_new(temporary, json.dumps(self.identity).encode())
        try:
            os.link(temporary, self.path)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in _NO_LINKS or self.path.exists():
                raise
            os.rename(temporary, self.path)
        finally:
            temporary.unlink(missing_ok=True)
        self._sweep()
        return True

    def _sweep(self) -> None:
        """Remove what processes that were killed in `_create` left."""
        for left in self.directory.glob(f".{LEASE}.*"):
            with contextlib.suppress(OSError):
                if time.time() - left.stat().st_mtime > STALE_S:
                    left.unlink()

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
                do="start again with another --run-dir and --save, or when the other run is done",
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
        holder = json.loads(read_bytes(path))
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        return {}
    return holder if isinstance(holder, dict) else {}


def is_seen(holder: dict[str, Any], me: dict[str, Any]) -> bool:
    """Whether the holder's process can be looked up from here."""
    is_here = me["namespace"] != "unknown" and holder.get("namespace") == me["namespace"]
    return is_here and isinstance(holder.get("pid"), int)


def is_alive(holder: dict[str, Any], me: dict[str, Any], age_s: float) -> bool:
    """Whether the holder still runs: its process, where it can be seen from here, else the age of
    its last sign.
    """
    if is_seen(holder, me):
        return _started(holder["pid"]) == holder.get("started")
    return age_s < STALE_S


class Leases:
    """The right to write into several folders; one that is named twice is taken once."""

    def __init__(self, directories: Iterable[Path]) -> None:
        places = {path.resolve(): path for path in directories}
        self._leases = [Lease(path) for path in places.values()]

    def take(self) -> None:
        """All or none. Raises what `Lease.take` does."""
        for number, lease in enumerate(self._leases):
            try:
                lease.take()
            except BaseException:
                for taken in self._leases[:number]:
                    taken.release()
                raise

    def check(self) -> None:
        """Raises LockedError if one was lost."""
        for lease in self._leases:
            lease.check()

    def release(self) -> None:
        """Give all folders free."""
        for lease in reversed(self._leases):
            lease.release()
