"""Row 45: a disk that refuses to be read for a moment, or for good."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_ext.checkpoint import commands, manifest, patience
from megatron_ext.checkpoint.reader import check_share
from tests.checkpoint.small_disk import write_step
from tests.faults.cell import Case, Wrong, refused, run_cases
from tests.faults.outcome import Outcome

CALLS = {"open": 3, "preadv": 2, "listdir": 1, "stat": 1}
"""Each with how many of it reading the newest step makes at least."""
ERRORS = (errno.ESTALE, errno.EIO, errno.EACCES, errno.ETIMEDOUT, errno.EPERM, errno.EMFILE)
FOR_GOOD = 10_000


def row_45(root: Path, seed: int, count: int) -> list[Outcome]:
    """A call on the newest step fails once or a few times: it is read all the same. It goes on
    failing: 74. Never called damaged, never passed over for the older step.
    """
    write_step(root, 4, 1.0)
    newest = write_step(root, 8, 2.0)
    draw = random.Random(seed)
    return run_cases(45, [_case(newest, draw) for _ in range(count)])


def _case(newest: Path, draw: random.Random) -> Case:
    call, error = draw.choice(sorted(CALLS)), draw.choice(ERRORS)
    after = draw.randrange(CALLS[call])
    times = draw.choice((*range(1, len(patience.PAUSES_S) + 1), FOR_GOOD))

    def action() -> None:
        with _refusing(newest, call, error, after, times) as met:
            if times == FOR_GOOD:
                refused(lambda: _read(newest), codes=(74,))
            else:
                _read(newest)
        if not met:
            raise Wrong("missed", f"{call} was not reached")

    return f"{call} {errno.errorcode[error]}: x{times} after {after}", action


def _read(newest: Path) -> None:
    """As a load does: which step, its manifest, every byte."""
    path = commands.pick(newest.parent, None)
    if path != newest:
        raise Wrong("silent", f"{path.name} was taken")
    check_share(manifest.read(path), 0, 1)


@contextmanager
def _refusing(path: Path, call: str, error: int, after: int, times: int) -> Iterator[list[str]]:
    """`os.<call>` on `path` and below fails `times` times after it went well `after` times; no
    pause takes time. Yields the names it failed on.
    """
    stock, sleep, met, calls = getattr(os, call), patience.time.sleep, [], [0]

    def refuse(target, *args, **kwargs):
        is_open = isinstance(target, int)
        name = os.readlink(f"/proc/self/fd/{target}") if is_open else os.fspath(target)
        if name.startswith(str(path)):
            calls[0] += 1
            if after < calls[0] <= after + times:
                met.append(name)
                raise OSError(error, os.strerror(error), name)
        return stock(target, *args, **kwargs)

    setattr(os, call, refuse)
    patience.time.sleep = lambda seconds: None
    try:
        yield met
    finally:
        setattr(os, call, stock)
        patience.time.sleep = sleep
