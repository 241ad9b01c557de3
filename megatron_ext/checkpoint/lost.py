"""Steps that a folder's own records name and that are not there: removed, or on a disk that is not
mounted. To go on from an older step, or from the beginning, is not what the start asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_ext.checkpoint import folder
from megatron_ext.checkpoint.ledger import standing_steps
from megatron_ext.checkpoint.patience import patiently
from megatron_ext.errors import DataError


def lost_steps(directory: Path) -> list[int]:
    """Named by `latest` or the ledger and without a folder, newest first."""
    named = standing_steps(directory)
    latest = folder.latest_step(directory)
    if latest is not None:
        named.add(latest)
    there = patiently(lambda: folder.steps(directory, replaced=True), directory)
    return sorted(named - set(there), reverse=True)


def told_of(lost: Sequence[int]) -> str:
    """In words, for a line."""
    listed = ", ".join(map(str, lost[:3])) + (", ..." if len(lost) > 3 else "")
    return f"`latest` or the ledger names step {listed}, which is gone"


def check_loadable(cfg: Any, directory: Path, own: Path | None) -> None:
    """The steps that --load and --ckpt-step ask for are there, as far as names tell. Raises
    DataError.

    Args:
        cfg: cfg.checkpoint.
        directory: what --load names.
        own: where the run saves: it may be empty, that is a new run.
    """
    steps = folder.steps(directory)
    if cfg.ckpt_step is not None and cfg.ckpt_step not in steps:
        known = ", ".join(map(str, steps)) or "none"
        raise DataError(
            f"--ckpt-step {cfg.ckpt_step} is not there", do=f"use one of: {known}", path=directory
        )
    if steps or cfg.allow_fresh_start:
        return
    check_none_lost(directory)
    if own is None or directory.resolve() != own.resolve():
        raise DataError(
            "--load: this folder holds no checkpoint",
            do="name a folder that holds step_... folders, or --allow-fresh-start",
            path=directory,
        )


def check_none_lost(directory: Path) -> None:
    """For a folder without any step. Raises DataError."""
    lost = lost_steps(directory)
    if lost:
        raise DataError(
            f"this folder holds no checkpoint, but {told_of(lost)}",
            do="mount or put back what is missing; --allow-fresh-start begins at step 1",
            path=directory,
        )
