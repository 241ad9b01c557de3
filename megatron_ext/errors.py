"""The ways a run may end badly: one class per exit code, one ``FATAL`` line per cause.

A user's mistake raises a `Fatal`; `exit_on_fatal` turns it into::

    FATAL 64 rank=0 what=... path=... do=...

on stderr and the exit code, with no traceback.  A traceback is left for our own bugs.
The codes follow sysexits.h (64 usage, 65 bad data or checkpoint, 69 rendezvous, 70 bug,
73 locked, 74 disk, 75 preempted, 76 numeric, 77 silent corruption, 78 hang).

The first rank that fails also writes ``exit_reason.json`` (its path is in the environment), so that
a launcher above torchrun or srun, which turn codes into others, can return the right one.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from megatron_ext import ulimits
from megatron_ext.packages import missing_package

INTERNAL_BUG = 70
"""Exit code of a bug: an exception that is not a `Fatal` keeps its traceback."""

BY_CTRL_C = 130
"""Exit code of a program that Ctrl-C ended at once, as shells say it."""

EXIT_REASON = "PRETRAIN_MOE_EXIT_REASON"
"""Environment variable: the file in which the first rank that fails says why."""

LOST_PEER_GRACE_S = 2.0
"""How long a rank whose connection broke waits for the rank that failed first to say why."""


class Fatal(Exception):  # noqa: N818 - the line it prints starts with FATAL
    """Ends the run with ``code`` and one line.

    Args:
        what: the cause: flag or file, its value, the broken rule with its numbers.
        do: the way out.
        path: the file or folder concerned, if there is one.
    """

    code = INTERNAL_BUG
    every_rank = False
    """True where each rank finds the same error by itself, so that only rank 0 prints it."""
    step: int | None = None
    """The step in which it happened, where known: see `during_step`."""

    def __init__(self, what: str, do: str = "", path: str | os.PathLike[str] | None = None):
        self.what = what
        self.do = do
        self.path = None if path is None else str(path)
        super().__init__(what)

    def __str__(self) -> str:
        path = f" path={self.path}" if self.path else ""
        do = f" do={self.do}" if self.do else ""
        return one_line(f"what={self.what}{path}{do}")

    def lines(self) -> list[str]:
        """The text of each ``FATAL`` line, without its prefix."""
        return [str(self)]


@dataclass(frozen=True)
class Violation:
    """One broken rule: what was asked, the rule with its numbers, and what would work."""

    flag: str
    value: object
    rule: str
    use: str

    def __str__(self) -> str:
        """``what=--flag value rule do=way out``."""
        value = "" if self.value is None else f" {self.value}"
        return one_line(f"what={self.flag}{value} {self.rule} do={self.use}")


class ConfigError(Fatal):
    """Usage or layout (64).  May carry several violations: all are reported together."""

    code = 64
    every_rank = True

    def __init__(
        self,
        what: str = "",
        do: str = "",
        path: str | os.PathLike[str] | None = None,
        violations: Sequence[Violation] = (),
    ):
        self.violations = tuple(violations)
        super().__init__(what or "; ".join(f"{v.flag} {v.rule}" for v in violations), do, path)

    def lines(self) -> list[str]:
        return [str(v) for v in self.violations] or [str(self)]


class DataError(Fatal):
    """Bad or hostile data or checkpoint (65)."""

    code = 65


class RendezvousError(Fatal):
    """The ranks did not find each other: port, address, store (69)."""

    code = 69


class ResourceError(Fatal):
    """A limit of this machine: open files, processes, threads (69)."""

    code = 69


class LostPeer(Fatal):  # noqa: N818 - the consequence of another rank's end
    """The connection to another rank broke: that rank has ended (69)."""

    code = 69


class LockedError(Fatal):
    """Another run holds the directory (73)."""

    code = 73


class DiskError(Fatal):
    """Full, read-only or failing storage (74)."""

    code = 74


class MissingPackage(ConfigError):  # noqa: N818 - what is wrong, as the others say it
    """A package is not installed (64), perhaps on one node only: every rank says so."""

    every_rank = False


class Preempted(Fatal):  # noqa: N818 - not an error: the state is saved
    """Asked to stop, state saved: requeue (75)."""

    code = 75
    every_rank = True


class NumericError(Fatal):
    """A NaN or Inf that the same inputs reproduce (76)."""

    code = 76


class CorruptionError(Fatal):
    """Silent data corruption suspected: requeue without this node (77)."""

    code = 77


class HangError(Fatal):
    """A rank makes no progress (78)."""

    code = 78


def words_of(error: OSError) -> str:
    """What the system says, and which limit it is where it is one of this process."""
    limit = ulimits.file_limit() if error.errno == errno.EFBIG else ""
    said = os.strerror(error.errno) if error.errno else str(error)
    return f"{said}: {limit}, no file may be larger" if limit else said


def one_line(text: str) -> str:
    """Collapses line breaks, so that a cause quoted from a library stays one line."""
    return " ".join(text.split())


def current_rank(environ: dict[str, str] | os._Environ[str] = os.environ) -> int:
    """The rank by the launcher's environment (RANK of torchrun, SLURM_PROCID of srun), else 0: also
    where that is not the whole of a launch, but what an earlier one left in a shell.
    """
    for name, of in (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS")):
        rank, world = environ.get(name, ""), environ.get(of, "")
        is_one = rank.isdecimal() and world.isdecimal() and int(rank) < int(world)
        if is_one and "MASTER_ADDR" in environ:
            return int(rank)
    return 0


def report(error: Fatal, rank: int) -> None:
    """Prints the ``FATAL`` lines on stderr; errors that all ranks share only from rank 0."""
    if error.every_rank and rank != 0:
        return
    step = "" if error.step is None else f" step={error.step}"
    text = "".join(f"FATAL {error.code} rank={rank}{step} {line}\n" for line in error.lines())
    sys.stderr.write(text)
    sys.stderr.flush()


def exit_reason(error: Fatal, rank: int) -> dict[str, object]:
    """The content of exit_reason.json."""
    return {
        "code": error.code,
        "rank": rank,
        "step": error.step,
        "what": one_line(error.what),
        "path": error.path,
        "do": one_line(error.do),
        "time": time.time(),
        "host": socket.gethostname(),
        "pid": os.getpid(),
    }


def write_exit_reason(reason: dict[str, object], path: str | os.PathLike[str]) -> bool:
    """Write whole or not at all, and only where no rank has before; False where one had or where
    the disk refuses.
    """
    temporary = Path(f"{path}.{socket.gethostname()}.{os.getpid()}")
    try:
        temporary.write_text(json.dumps(reason) + "\n", encoding="utf-8")
        os.link(temporary, path)
    except OSError:
        return False
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
    return True


def read_exit_reason(path: str | os.PathLike[str] | None) -> dict[str, object] | None:
    """What the first rank that failed wrote, if one did."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8")) if path else None
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and isinstance(found.get("code"), int) else None


def note_exit_reason(error: Fatal, rank: int) -> None:
    """Write exit_reason.json where the environment names it; not for what another rank reports."""
    path = os.environ.get(EXIT_REASON)
    if path and error.lines() and not (error.every_rank and rank != 0):
        write_exit_reason(exit_reason(error, rank), path)


@contextmanager
def during_step(step: Callable[[], int]) -> Iterator[None]:
    """Errors that leave the block carry ``step()``, unless they know their step already; the reason
    is on disk before this rank closes its connections, which the others take for an error.
    """
    try:
        yield
    except Exception as error:
        if getattr(error, "step", None) is None:
            error.step = step()
        fatal = as_fatal(error)
        if not isinstance(fatal, LostPeer):
            note_exit_reason(fatal, current_rank())
        raise


_LIMITS = (
    (errno.EMFILE, "this process may open no more files", "raise ulimit -n, 1024 at least"),
    (errno.ENFILE, "this machine may open no more files", "raise fs.file-max"),
)
_LOST = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "remote process exited",
    "Socket Timeout",
    "recvValue failed",
    "Failed to recv",
    "Timed out waiting",
    "Wait timeout",
    "connectFullMesh failed",
)


def _translated(error: Exception) -> Fatal | None:
    """The `Fatal` that stands for an exception of the system or of the collectives, if any does."""
    missing = missing_package(error)
    if missing:
        return MissingPackage(*missing)
    found = _of_system(error)
    limit = "" if isinstance(found, LostPeer) else ulimits.used_up()
    if limit:  # whatever the error looks like
        first_line = str(error).split("\n")[0].split("Exception raised from")[0][:300]
        return ResourceError(f"{limit}: {type(error).__name__} {first_line}", do=ulimits.RAISE)
    return _of_memory(error) or found


def _of_memory(error: Exception) -> Fatal | None:
    """For memory that does not suffice, in Python or in a library of C++."""
    if not isinstance(error, MemoryError) and "bad_alloc" not in str(error):
        return None
    return ResourceError(
        f"memory does not suffice: {type(error).__name__} {error}",
        do="free memory, raise the limit (ulimit -v), or ask for less",
    )


def _of_system(error: Exception) -> Fatal | None:
    """For limits of the system and for a connection to another rank that broke."""
    for number, what, do in _LIMITS:
        if isinstance(error, OSError) and error.errno == number:
            return ResourceError(f"{what}: {error}", do=do)
    text = str(error)
    if "can't start new thread" in text:
        return ResourceError("no more threads: can't start new thread", do="raise ulimit -u")
    is_collective = any(word in text for word in ("gloo", "NCCL", "nccl", "TCPStore", "c10d"))
    if not (isinstance(error, RuntimeError) and is_collective):
        return None
    if any(word in text for word in _LOST):
        first_line = text.split("\n")[0][:200]
        return LostPeer(
            f"the connection to another rank broke: {first_line}",
            do="look at that rank's last words; start again with --load, or launch with --restarts",
        )
    return None


def leave_uncaught(kind: type[BaseException], error: BaseException, trace) -> None:
    """sys.excepthook of all our programs: a package that is missing where a program is imported, so
    before its `exit_on_fatal`, is one line, too.
    """
    missing = missing_package(error)
    limit = "" if missing else ulimits.used_up()
    if missing:
        raise SystemExit(_leave(MissingPackage(*missing), current_rank()))
    if limit and isinstance(error, (MemoryError, ImportError, OSError)):
        found = ResourceError(f"{limit}: {type(error).__name__} {error}", do=ulimits.RAISE)
        raise SystemExit(_leave(found, current_rank()))
    sys.__excepthook__(kind, error, trace)


def as_fatal(error: Exception) -> Fatal:
    """What the FATAL line and exit_reason.json say of any exception, with its step."""
    if isinstance(error, Fatal):
        return error
    fatal = _translated(error)
    if fatal is None:
        fatal = Fatal(f"{type(error).__name__}: {error}", do="a bug: report the traceback below")
    fatal.step = getattr(error, "step", None)
    return fatal


def _leave(error: Fatal, rank: int) -> int:
    """Say why, once for all ranks, and return the exit code."""
    path = os.environ.get(EXIT_REASON)
    if isinstance(error, LostPeer) and path:
        deadline = time.monotonic() + LOST_PEER_GRACE_S
        while time.monotonic() < deadline and not os.path.exists(path):
            time.sleep(0.05)
        reason = read_exit_reason(path)
        if reason is not None:
            return int(str(reason["code"]))
    if error.every_rank and rank != 0 and "TORCHELASTIC_RUN_ID" in os.environ:
        time.sleep(LOST_PEER_GRACE_S)  # torchrun ends rank 0, who speaks for all, when one has left
    note_exit_reason(error, rank)
    report(error, rank)
    return error.code


@contextmanager
def exit_on_fatal() -> Iterator[None]:
    """Wraps a program: a `Fatal` becomes its lines on stderr and its exit code; any other exception
    one line, its traceback and `INTERNAL_BUG`; Ctrl-C, where nobody catches it, ends it with 130.
    """
    try:
        yield
    except KeyboardInterrupt:
        sys.stdout.flush()
        raise SystemExit(BY_CTRL_C) from None
    except Exception as error:
        sys.stdout.flush()
        fatal = as_fatal(error)
        code = _leave(fatal, current_rank())
        if type(fatal) is Fatal:
            traceback.print_exception(error)
        raise SystemExit(code) from None
