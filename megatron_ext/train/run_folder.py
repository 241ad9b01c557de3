"""The run's folders from the first write to the last: held, identified, noted when it is done."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from megatron_ext.checkpoint import Checkpointer, TrainState, folder, identity
from megatron_ext.checkpoint.aside import move_run
from megatron_ext.checkpoint.identity import Identity
from megatron_ext.checkpoint.lock import Leases
from megatron_ext.checkpoint.starting import Start, asked_length, folders, named_load, plan, settled
from megatron_ext.checkpoint.state import Progress
from megatron_ext.checkpoint.tiers import has_fast_step
from megatron_ext.config import RunConfig
from megatron_ext.config.sections.checkpoint import CheckpointSection
from megatron_ext.errors import EXIT_REASON
from megatron_ext.mesh.agree import first_rank
from megatron_ext.observe import run_dir
from megatron_ext.observe.run_dir import RunDirectory
from megatron_ext.train.loop import end_of
from megatron_ext.train.step import sum_over_ranks

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Held:
    """A run's folders, what this start into them means (the config says what it loads), and the
    right to write there (`leases`: on rank 0).
    """

    cfg: RunConfig
    where: RunDirectory
    start: Start
    leases: Leases | None


@contextlib.contextmanager
def held(cfg: RunConfig) -> Iterator[Held]:
    """The run's folders, held until the end: nothing is written into them before, and nothing by a
    start that would damage the run that is there (checkpoint/starting.py). Rank 0's name is
    everybody's. Each rank's log records go to its file from here on. Collective.
    """
    run_dir.warn_on_console(torch.distributed.get_rank())
    leases = Leases(folders(cfg)) if torch.distributed.get_rank() == 0 else None

    def open_() -> tuple[str, Start, CheckpointSection]:
        where = run_dir.places(cfg, cfg.observe.run_dir)
        plan(cfg)
        leases.take()
        start = plan(cfg)
        if start.overwrites:
            _log.warning("the old run was moved to %s", move_run(where.root, where.save))
        if not start.is_complete:
            run_dir.create(cfg, where)
            _identify(where.root, start.identity)
            (where.root / "exit_reason.json").unlink(missing_ok=True)
        return cfg.observe.run_dir, start, named_load(cfg).checkpoint

    try:
        name, start, loads = first_rank(open_)
        cfg = replace(cfg, observe=replace(cfg.observe, run_dir=name), checkpoint=loads)
        start = _with_fast_tiers(cfg, start)
        cfg = settled(cfg, start)
        where = run_dir.places(cfg, name)
        if not start.is_complete:
            os.environ.setdefault(EXIT_REASON, str(where.root / "exit_reason.json"))
            run_dir.log_to_file(where, torch.distributed.get_rank(), cfg.observe.logging_level)
        yield Held(cfg, where, start, leases)
    finally:
        if leases is not None:
            leases.release()


def _with_fast_tiers(cfg: RunConfig, start: Start) -> Start:
    """A run that has saved into fast tiers only, on any node, goes on from there. Collective."""
    has_fast = has_fast_step(cfg.checkpoint, folders(cfg)[1], start.identity.owns)
    is_anywhere = sum_over_ranks([], float(has_fast))[-1] > 0
    is_from_start = start.step is None and not start.is_new
    return replace(start, goes_on=True) if is_anywhere and is_from_start else start


def is_complete(held: Held) -> bool:
    """Whether all steps are done already, which rank 0 says."""
    if held.start.is_complete and torch.distributed.get_rank() == 0:
        print(held.start.told(held.cfg), flush=True)
    return held.start.is_complete


def _identify(root: Path, known: Identity) -> None:
    """Write RUN/run.json (rank 0). Raises DiskError."""
    folder.on_disk(root, lambda: identity.write(root, known))


def load(held: Held, saver: Checkpointer, state: TrainState) -> None:
    """Fill the state. Where that goes back in the run's own course, later steps are set aside
    before anything is trained, and that it was done is noted: a restart goes on. Collective.
    """
    saver.load(state)
    if not held.start.goes_back or held.cfg.train.eval_only:
        return
    step = state.progress.step
    saver.abandon_later(step)
    course = {"step": step, "command": held.start.command}
    known = replace(held.start.identity, course=course)
    first_rank(lambda: _identify(held.where.root, known))


def finished(held: Held, progress: Progress) -> None:
    """Note that all steps are done, so that the same command does nothing. Collective."""
    root, train = held.where.root, held.cfg.train
    if train.eval_only or progress.step < end_of(held.cfg, progress).step:
        return
    end = {"step": progress.step, **asked_length(train)}
    known = held.start.identity
    first_rank(lambda: _identify(root, replace(identity.read(root) or known, finished=end)))
