"""Out of the way and kept: a run whose folder another one shall have, steps of an abandoned course.

Only what a run writes is moved, so that data or notes beside it stay where they are; leases stay
with who holds them.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from pathlib import Path

from megatron_ext.checkpoint import folder
from megatron_ext.checkpoint.identity import RUN
from megatron_ext.checkpoint.ledger import LEDGER, Ledger
from megatron_ext.errors import DiskError

OF_A_RUN = (
    *("config.yaml", "metrics.jsonl", "expert_load.json", "routing.jsonl", "ranks.json"),
    *("tensorboard", "traces", "report.html", "upcycled", "logs", "wandb", "progress.txt"),
    *("exit_reason*.json", "nonfinite_step_*", "spike_step_*", "sample.txt"),
)
OF_ITS_CHECKPOINTS = ("step_*", folder.LATEST, folder.MEGATRON_LATEST, LEDGER)


def move_run(root: Path, save: Path) -> Path:
    """Move the run of these folders to ROOT.old-<time>; the name. run.json goes last: a kill in
    between leaves a folder that is still known as a run's. Raises DiskError.
    """
    old = _new(root)
    try:
        is_inside = root.resolve() in save.resolve().parents
        apart = old / save.resolve().relative_to(root.resolve()) if is_inside else _new(save)
        _move(save, apart, OF_ITS_CHECKPOINTS)
        _move(root, old, OF_A_RUN)
        _move(root, old, (RUN,))
    except OSError as error:
        raise DiskError(
            f"--overwrite-run cannot move the old run to {old}: {error.strerror}",
            do="name another --run-dir",
            path=error.filename or root,
        ) from error
    return old


def _new(path: Path) -> Path:
    stamp = time.strftime("%Y%m%d-%H%M%S")
    found = path.with_name(f"{path.name}.old-{stamp}")
    number = 1
    while found.exists():
        number += 1
        found = path.with_name(f"{path.name}.old-{stamp}-{number}")
    return found


def _move(source: Path, target: Path, patterns: Iterable[str]) -> None:
    names = sorted(path.name for pattern in patterns for path in source.glob(pattern))
    if names:
        target.mkdir(parents=True, exist_ok=True)
    for name in names:
        os.rename(source / name, target / name)
    if names:
        folder.sync(target)
        folder.sync(source)


def abandon_later(directory: Path, step: int) -> list[int]:
    """Take the steps after `step` out of the candidates, each under a name that says so, and let
    `latest` name `step`. For the holder of the lease. Raises OSError.
    """
    gone = [later for later in folder.steps(directory) if later > step]
    folder.point_at(directory, step)
    for later in gone:
        name = folder.step_name(later)
        old = _new(directory / name)
        Ledger(directory).add("abandoned", later, to=old.name)
        os.rename(directory / name, old)
    folder.sync(directory)
    return gone
