"""The ways a run may end badly: one class per exit code, one ``FATAL`` line per cause.

A user's mistake raises a `Fatal`; `exit_on_fatal` turns it into::

    FATAL 64 rank=0 what=... path=... do=...

on stderr and the exit code, with no traceback.  A traceback is left for our own bugs.
The codes follow sysexits.h (64 usage, 65 bad data or checkpoint, 69 rendezvous, 70 bug,
73 locked, 74 disk, 75 preempted, 76 numeric, 77 silent corruption, 78 hang).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

INTERNAL_BUG = 70
"""Exit code of a bug: an exception that is not a `Fatal` keeps its traceback."""


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


class LockedError(Fatal):
    """Another run holds the directory (73)."""

    code = 73


class DiskError(Fatal):
    """Full, read-only or failing storage (74)."""

    code = 74


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


def one_line(text: str) -> str:
    """Collapses line breaks, so that a cause quoted from a library stays one line."""
    return " ".join(text.split())


def current_rank(environ: dict[str, str] | os._Environ[str] = os.environ) -> int:
    """The rank by the launcher's environment (RANK of torchrun, SLURM_PROCID of srun), else 0."""
    for name in ("RANK", "SLURM_PROCID"):
        if environ.get(name, "").isdigit():
            return int(environ[name])
    return 0


def report(error: Fatal, rank: int) -> None:
    """Prints the ``FATAL`` lines on stderr; errors that all ranks share only from rank 0."""
    if error.every_rank and rank != 0:
        return
    text = "".join(f"FATAL {error.code} rank={rank} {line}\n" for line in error.lines())
    sys.stderr.write(text)
    sys.stderr.flush()


@contextmanager
def exit_on_fatal() -> Iterator[None]:
    """Wraps a program: a `Fatal` becomes its lines on stderr and its exit code.

    Other exceptions pass through with their traceback.
    """
    try:
        yield
    except Fatal as error:
        sys.stdout.flush()
        report(error, current_rank())
        raise SystemExit(error.code) from None
