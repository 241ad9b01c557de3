"""Cases that need one process: run one after the other in a forked child, which may hang, eat
memory or die without taking the matrix down.

A case is (name, function); the function returns nothing when all is as it should be, raises
`Wrong` with a verdict otherwise. A canary file tells whether something hostile was executed.
"""

from __future__ import annotations

import os
import pickle
import resource
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, Pipe
from pathlib import Path

from megatron_ext.errors import Fatal
from tests.faults.outcome import Outcome, Verdict

Case = tuple[str, Callable[[], None]]
LIMIT_S = 20.0
MEMORY_MIB = 512
"""What one case may add to the resident memory of the child."""


class Wrong(Exception):  # noqa: N818 - a verdict, not an error
    """A case that ended in another way than its row asks."""

    def __init__(self, verdict: Verdict, detail: str) -> None:
        super().__init__(detail)
        self.verdict, self.detail = verdict, detail


def refused(
    action: Callable[[], object], path: Path | str | None = None, codes: Sequence[int] = (65,)
) -> None:
    """``action`` must raise one Fatal: right code, one line, a remedy, and the file by name."""
    try:
        action()
    except Fatal as error:
        text = str(error)
        if error.code not in codes:
            raise Wrong("failed", f"code {error.code}: {text}") from None
        if "\n" in text or (path is not None and str(path) not in text):
            raise Wrong("failed", f"the line does not name {path}: {text}") from None
        return
    raise Wrong("silent", "accepted")


def run_cases(
    row: int, cases: Sequence[Case], canary: Path | None = None, limit_s: float = LIMIT_S
) -> list[Outcome]:
    """The outcome of every case, in order; a hang or a death costs only its own case."""
    outcomes: list[Outcome] = []
    while len(outcomes) < len(cases):
        outcomes += _one_child(row, cases[len(outcomes) :], canary, limit_s)
    return outcomes


def _one_child(
    row: int, cases: Sequence[Case], canary: Path | None, limit_s: float
) -> list[Outcome]:
    receiver, sender = Pipe(duplex=False)
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        receiver.close()
        _child(row, cases, canary, sender)
    sender.close()
    found: list[Outcome] = []
    while len(found) < len(cases):
        name = cases[len(found)][0]
        if not receiver.poll(limit_s):
            found.append(Outcome(row, name, "hung", f"no end in {limit_s:.0f} s"))
            break
        try:
            found.append(receiver.recv())
        except EOFError:
            found.append(Outcome(row, name, "failed", "the process died"))
            break
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    receiver.close()
    return found


def _child(row: int, cases: Sequence[Case], canary: Path | None, sender: Connection) -> None:
    """Never returns."""
    with tempfile.TemporaryFile("w+") as quiet:
        os.dup2(quiet.fileno(), 1)
        os.dup2(quiet.fileno(), 2)
        for name, action in cases:
            sender.send(_judge(row, name, action, canary))
    os._exit(0)


def _judge(row: int, name: str, action: Callable[[], None], canary: Path | None) -> Outcome:
    before = _peak_mib()
    try:
        action()
        found = Outcome(row, name, "passed")
    except Wrong as wrong:
        found = Outcome(row, name, wrong.verdict, wrong.detail)
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        detail = f"{type(error).__name__} in {Path(place.filename).name}:{place.lineno}: {error}"
        found = Outcome(row, name, "failed", " ".join(detail.split())[:300])
    if canary is not None and canary.exists():
        canary.unlink()
        return Outcome(row, name, "executed", "the canary file appeared")
    grown = _peak_mib() - before
    if found.verdict == "passed" and grown > MEMORY_MIB:
        return Outcome(row, name, "failed", f"took {grown:.0f} MiB of memory")
    return found


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class Bomb:
    """A pickle that makes the canary file when it is loaded, in one of several ways."""

    def __init__(self, canary: Path, way: int) -> None:
        self.canary, self.way = str(canary), way

    def __reduce__(self) -> tuple:
        ways = (
            (open, (self.canary, "w")),
            (os.system, (f"touch {self.canary}",)),
            (eval, (f"open({self.canary!r}, 'w')",)),
            (exec, (f"open({self.canary!r}, 'w')",)),
            (os.mknod, (self.canary,)),
            (getattr(os, "open"), (self.canary, os.O_CREAT)),  # noqa: B009 - as a pickle names it
        )
        return ways[self.way % len(ways)]


def bombs(canary: Path) -> list[bytes]:
    """The pickle in six ways and three protocols."""
    return [pickle.dumps(Bomb(canary, way), protocol) for way in range(6) for protocol in (0, 2, 4)]
