"""RUN: config.yaml, metrics.jsonl, expert_load.json, tensorboard/, checkpoints/, logs/."""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from dataclasses import dataclass
from pathlib import Path

from megatron_ext.config import RunConfig
from megatron_ext.errors import DiskError, words_of
from megatron_ext.observe.attempt import PatientFileHandler


@dataclass(frozen=True)
class RunDirectory:
    """The places of one run; --save, --load and --tensorboard-dir override its parts."""

    root: Path
    save: Path
    load: Path | None
    tensorboard: Path

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def expert_load(self) -> Path:
        return self.root / "expert_load.json"

    @property
    def config(self) -> Path:
        return self.root / "config.yaml"


def places(cfg: RunConfig, root: str) -> RunDirectory:
    """Where everything of the run `root` goes."""
    path = Path(root)
    return RunDirectory(
        root=path,
        save=Path(cfg.checkpoint.save or path / "checkpoints"),
        load=Path(cfg.checkpoint.load) if cfg.checkpoint.load else None,
        tensorboard=Path(cfg.observe.tensorboard_dir or path / "tensorboard"),
    )


def create(cfg: RunConfig, where: RunDirectory) -> None:
    """Make the folders and write config.yaml (rank 0). Raises DiskError where the run's folder or
    that of its checkpoints cannot be written; for logs and TensorBoard, whoever writes there warns.
    """
    try:
        for folder in (where.root, where.save):
            folder.mkdir(parents=True, exist_ok=True)
        for folder in (where.root / "logs", where.tensorboard):
            with contextlib.suppress(OSError):
                folder.mkdir(parents=True, exist_ok=True)
        temporary = where.config.with_suffix(".tmp")
        temporary.write_text(cfg.to_yaml())
        os.replace(temporary, where.config)
    except OSError as error:
        raise DiskError(
            f"--run-dir cannot be written: {words_of(error)}",
            do="name a folder that you may write with --run-dir, free space, or raise the limit",
            path=error.filename or where.root,
        ) from error


def warn_on_console(rank: int) -> None:
    """Show our own warnings to the user, on whichever rank they come up."""
    console = logging.StreamHandler()
    console.setLevel(logging.WARNING)
    console.setFormatter(logging.Formatter(f"%(levelname)s rank={rank} %(message)s"))
    logging.getLogger("megatron_ext").handlers = [console]


def log_to_file(where: RunDirectory, rank: int, level: int | None) -> None:
    """Send this rank's log records and Python warnings to logs/rank_NNNNN.log instead of the
    console.
    """
    handler = PatientFileHandler(where.root / "logs" / f"rank_{rank:05d}.log", delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s level=%(levelname)s %(name)s: %(message)s"))
    warn_on_console(rank)
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.INFO if level is None else level)
    logging.captureWarnings(True)
    warnings.simplefilter("default")
