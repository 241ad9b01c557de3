"""The Checkpointer: when and where state is saved, and which checkpoint a run starts from.

    save: a folder -> pieces -> plan -> space -> private copies -> write
    poll: every rank has written -> metadata, record -> rename -> latest

All collectives run in the caller's thread, in `save`, `poll`, `load` and `close`, so their order is
the same on all ranks.
"""

from __future__ import annotations

import logging
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config

from megatron_ext.checkpoint import folder, loader, writer
from megatron_ext.checkpoint import state as parts
from megatron_ext.checkpoint.folder import Ledger, disk_error
from megatron_ext.checkpoint.lock import Lease
from megatron_ext.checkpoint.shards import get_step
from megatron_ext.checkpoint.state import TrainState
from megatron_ext.errors import DiskError, Fatal
from megatron_ext.mesh.agree import agree, first_rank

T = TypeVar("T")
MAX_FAILED_SAVES = 3

_log = logging.getLogger(__name__)


@dataclass
class _Pending:
    """A save that has been staged and is being written."""

    step: int
    writing: Path
    shard: writer.Shard
    record: dict[str, Any]
    started: float
    num_bytes: int


def _or_disk_error(action: Callable[[], T], path: Path, num_bytes: int | None = None) -> T:
    """Run on one rank; an OSError becomes the one-line DiskError."""
    try:
        return action()
    except OSError as error:
        raise disk_error(error, path, num_bytes) from error


class Checkpointer:
    """Saves a run's state into `directory`, loads it from `load_from`. Every method is collective.

    Args:
        cfg: cfg.checkpoint.
        directory: where to save; None for a run that never saves (no lease is taken).
        load_from: where to look for a checkpoint; None: start fresh.
        run_info: plain JSON about the run (config, versions), kept in each checkpoint.

    Raises LockedError (73) when another run saves there, DiskError (74) when the folder cannot be
    written.
    """

    def __init__(
        self, cfg: Any, directory: Path | None, load_from: Path | None, *, run_info: dict[str, Any]
    ) -> None:
        self.cfg = cfg
        self.directory = None if directory is None else Path(directory)
        self.load_from = None if load_from is None else Path(load_from)
        self.run_info = run_info
        self.last_error: Fatal | None = None
        self._planner = writer.Planner(share_replicas=cfg.ckpt_fully_parallel_save)
        self._pending: _Pending | None = None
        self._num_failed = 0
        self._lease: Lease | None = None
        self._is_first = torch.distributed.get_rank() == 0
        self._group = torch.distributed.new_group(backend="gloo")
        if self.directory is not None:
            first_rank(self._open_directory)

    def _open_directory(self) -> None:
        lease = Lease(self.directory)
        lease.take()
        self._lease = lease
        for name in folder.remove_unfinished(self.directory):
            _log.warning("removed an unfinished checkpoint: %s", self.directory / name)

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def save(self, state: TrainState) -> None:
        """Save; returns when it is on disk, or with --async-save when the state is copied.

        One save is in flight at most: a second one waits for the first. Raises DiskError,
        LockedError.
        """
        assert self.directory is not None, (
            "this Checkpointer was made without a folder to save into"
        )
        self.poll(blocking=True)
        begin, step = time.perf_counter(), state.progress.step
        writing = first_rank(lambda: self._begin(step))
        try:
            self._pending = self._stage(state, step, writing, begin)
        except Fatal:
            self._discard(writing)
            raise
        if self.cfg.async_save:
            self._pending.shard.start()
            self._note("staged", self._pending)
        else:
            self._pending.shard.write()
            self._finish(raise_at_once=True)

    def _begin(self, step: int) -> Path:
        self._lease.check()
        return _or_disk_error(lambda: self._make_folder(step), self.directory)

    def _make_folder(self, step: int) -> Path:
        Ledger(self.directory).add("requested", step, asynchronous=bool(self.cfg.async_save))
        return folder.begin(self.directory, step)

    def _stage(self, state: TrainState, step: int, writing: Path, begin: float) -> _Pending:
        """Plan, check the space, and copy what training will change."""
        parts.sync_weights(state.chunks)
        model = parts.sharded_model(state.chunks)
        has_optimizer = state.optimizer is not None and not self.cfg.no_save_optim
        states = parts.sharded_optimizer(state.optimizer, model)[0] if has_optimizer else []
        streams = {} if self.cfg.no_save_rng else parts.sharded_rng()
        try:
            pieces = self._planner.plan(parts.built([model, states, streams]))
        except ValueError as error:
            raise AssertionError(f"the ranks do not hold a whole model: {error}") from error
        shard = writer.stage(pieces, writing, copy=self.cfg.async_save)
        totals = self._all_reduce([shard.num_bytes], torch.distributed.ReduceOp.SUM)
        steps = self._all_reduce([get_step(state.optimizer)], torch.distributed.ReduceOp.MAX)
        record = self._record(state, steps[0], has_optimizer)
        first_rank(lambda: folder.check_space(self.directory, totals[0]))
        return _Pending(step, writing, shard, record, begin, totals[0])

    def _record(
        self, state: TrainState, optimizer_step: int, has_optimizer: bool
    ) -> dict[str, Any]:
        values = parts.numbers(state, optimizer_step)
        if not has_optimizer:
            values["optimizer"] = values["scheduler"] = None
        return {
            "format": "pretrain_moe",
            "version": folder.RECORD_VERSION,
            "step": state.progress.step,
            "time": time.time(),
            "layout": parts.layout(),
            **values,
            "run": self.run_info,
        }

    def _finish(self, raise_at_once: bool) -> list[int]:
        """All ranks have stopped writing: publish the checkpoint, or drop it if a rank failed."""
        pending, self._pending = self._pending, None
        try:
            agree(lambda: self._check_written(pending))
            world = torch.distributed.get_world_size()
            results: list | None = [None] * world if self._is_first else None
            torch.distributed.gather_object(
                pending.shard.results, results, dst=0, group=self._group
            )
            first_rank(lambda: self._publish(pending, results))
        except Fatal as error:
            self._failed(pending, error, raise_at_once)
            return []
        self._num_failed, self.last_error = 0, None
        return [pending.step]

    def _check_written(self, pending: _Pending) -> None:
        error = pending.shard.error
        if isinstance(error, OSError):
            raise disk_error(error, pending.shard.path, pending.shard.num_bytes)
        if error is not None:
            raise DiskError(
                f"the checkpoint writer of rank {torch.distributed.get_rank()} failed: {error!r}",
                do="see the rank's log; the previous checkpoint is still the latest",
                path=pending.shard.path,
            )

    def _publish(self, pending: _Pending, results: list) -> None:
        self._lease.check()

        def write() -> None:
            writer.write_metadata(self._planner.metadata, results, pending.writing)
            torch.save(
                {"iteration": pending.step, "checkpoint_version": 3.0},
                pending.writing / "common.pt",
            )
            save_config(CheckpointingConfig("torch_dist", 1), str(pending.writing))
            folder.finish(pending.writing, self.directory, pending.record)

        _or_disk_error(write, self.directory, pending.num_bytes)
        self._note("durable", pending)

    def _failed(self, pending: _Pending, error: Fatal, raise_at_once: bool) -> None:
        """Training goes on without this checkpoint; not after MAX_FAILED_SAVES in a row."""
        self.last_error = error
        self._num_failed += 1
        self._note("failed", pending, error=str(error))
        self._discard(pending.writing)
        if raise_at_once or self._num_failed >= MAX_FAILED_SAVES:
            raise error
        if self._is_first:
            _log.warning("checkpoint of step %d failed, training goes on: %s", pending.step, error)

    def _note(self, event: str, pending: _Pending, **values: Any) -> None:
        """A line in the ledger; a full disk does not make it worth an error of its own."""
        if not self._is_first:
            return
        seconds = round(time.perf_counter() - pending.started, 3)
        try:
            Ledger(self.directory).add(
                event, pending.step, bytes=pending.num_bytes, seconds=seconds, **values
            )
        except OSError as error:
            _log.warning("cannot append to the ledger: %s", error)

    def _discard(self, writing: Path) -> None:
        if self._is_first:
            shutil.rmtree(writing, ignore_errors=True)

    def poll(self, blocking: bool = False) -> list[int]:
        """The steps whose asynchronous save has just become durable, on all ranks alike.

        Call once a step: it costs nothing while no save is in flight. `blocking` waits for it. A
        failed save is one warning; the third in a row raises.
        """
        if self._pending is None:
            return []
        if blocking:
            self._pending.shard.done.wait()
        is_writing = not self._pending.shard.done.is_set()
        if self._all_reduce([int(is_writing)], torch.distributed.ReduceOp.MAX)[0]:
            return []
        return self._finish(raise_at_once=False)

    def close(self) -> None:
        """Wait for the save in flight and give the folder free. Raises if the last save failed.

        While an exception passes through (this rank failed and the others may be gone) nothing is
        waited for.
        """
        is_failing = sys.exc_info()[0] is not None
        try:
            if not is_failing:
                self.poll(blocking=True)
        finally:
            self._pending = None
            if self._lease is not None:
                self._lease.release()
                self._lease = None
        if self.last_error is not None and not is_failing:
            error, self.last_error = self.last_error, None
            raise error

    def _all_reduce(self, values: list[int], op: Any) -> list[int]:
        tensor = torch.tensor(values, dtype=torch.int64)
        torch.distributed.all_reduce(tensor, op, group=self._group)
        return tensor.tolist()

    def load(self, state: TrainState) -> bool:
        """Fill `state` from the newest complete checkpoint, or --ckpt-step's.

        False: there is nothing to load and that is allowed, the run starts fresh. Raises DataError
        (65) where there is no checkpoint or a damaged one, Misfit (64) where it is of another
        model.
        """
        own = self.directory
        if loader.load_newest(self.cfg, state, load_from=self.load_from, own=own):
            return True
        if self._is_first and own is not None and folder.steps(own):
            _log.warning(
                "%s holds checkpoints up to step %d of another run; this one starts at step 0"
                " and replaces equal steps (--load continues a run)",
                own,
                folder.steps(own)[0],
            )
        return False
