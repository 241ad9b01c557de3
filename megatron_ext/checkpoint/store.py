"""The Checkpointer: when and where state is saved, and which checkpoint a run starts from.

    save           pieces -> plan -> space -> threads that copy, write, publish, read back
    before_update  waits until everything is copied that the optimizer is about to change
    poll           what the threads have reached, agreed over all ranks

All collectives run in the caller's thread, in `save`, `poll`, `finish`, `load` and `close`, so
their order is the same on all ranks; the threads use files only (reports.py).
"""

from __future__ import annotations

import logging
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch

from megatron_ext.checkpoint import folder, loader, tensor_file
from megatron_ext.checkpoint import state as parts
from megatron_ext.checkpoint.aside import abandon_later
from megatron_ext.checkpoint.failures import Failures
from megatron_ext.checkpoint.fingerprint import names
from megatron_ext.checkpoint.ledger import Ledger
from megatron_ext.checkpoint.lock import Leases
from megatron_ext.checkpoint.neighbour import SpreadSave
from megatron_ext.checkpoint.nodes import (
    nodes_of_launch,
    open_tiers,
    remove_later,
    steps_anywhere,
)
from megatron_ext.checkpoint.plan import Planner
from megatron_ext.checkpoint.reports import Reports, quietly
from megatron_ext.checkpoint.saving import DURABLE, VERIFIED, Order, Save
from megatron_ext.checkpoint.shards import get_step
from megatron_ext.checkpoint.spots import tensor_of
from megatron_ext.checkpoint.staging import Image, Pool
from megatron_ext.checkpoint.state import TrainState
from megatron_ext.checkpoint.tiers import STORE, Tier, due, tiers_of, to_prune
from megatron_ext.device import current_device
from megatron_ext.errors import Fatal, LockedError
from megatron_ext.mesh.agree import agree, first_rank

_SYNC_POOL_BYTES = 64 << 20  # a synchronous save waits anyway
_POLL_S = 0.002

_log = logging.getLogger(__name__)


INHERITED = ("huggingface",)
"""Of the run info of a checkpoint that is loaded: what the run's own checkpoints keep (the
config.json of an import, for an export after training)."""


class Checkpointer:
    """Saves a run's state into `directory`, loads it from `load_from`. Every method is collective.

    Args:
        cfg: cfg.checkpoint.
        directory: where to save; None for a run that never saves (no lease is taken).
        load_from: where to look for a checkpoint; None: start fresh.
        run_info: plain JSON about the run (config, versions), kept in each checkpoint;
            "fingerprint" and "content" in it are compared when a run resumes; no step of the run's
            own folder is loaded that has another "id".
        may_change: flags in which the fingerprint may differ, beside --accept-change.
        leases: on rank 0, of the folders that the run holds already; None: one is taken here.
        before_save: on each rank; a Fatal from it ends the run instead of the save.

    Raises LockedError (73) when another run saves there, DiskError (74) when the folder cannot be
    written.
    """

    def __init__(
        self,
        cfg: Any,
        directory: Path | None,
        load_from: Path | None,
        *,
        run_info: dict[str, Any],
        may_change: Collection[str] = (),
        leases: Leases | None = None,
        before_save: Callable[[], None] | None = None,
    ) -> None:
        self.cfg, self._before_save = cfg, before_save
        self.directory = None if directory is None else Path(directory)
        self.load_from = None if load_from is None else Path(load_from)
        self.run_info = run_info
        may_change = frozenset(may_change) | names(cfg.accept_change)
        prints = run_info.get("fingerprint") or {}
        content = run_info.get("content") or {}
        self._this_run = loader.ThisRun(prints, may_change, run_info.get("id"), content)
        self.tiers = [] if self.directory is None else tiers_of(cfg, self.directory)
        self._planner = Planner(share_replicas=cfg.ckpt_fully_parallel_save)
        limit = cfg.ckpt_staging_bytes if cfg.async_save else _SYNC_POOL_BYTES
        self._pool = Pool(limit, pinned=current_device().type == "cuda")
        self._saves: list[Save] = []
        self._loaded: loader.Found | None = None
        self._course: int | None = -1  # the first save deletes steps of fast tiers after it
        self._leases, self._takes_lease = leases, leases is None
        self._is_first = torch.distributed.get_rank() == 0
        self._group = torch.distributed.new_group(backend="gloo")
        self._fast = [tier.directory for tier in self.tiers if tier.name != STORE]
        self._nodes = nodes_of_launch() if self._fast else None
        if self.directory is not None:
            first_rank(self._open_directory)
        self._spread: frozenset[str] = frozenset()
        if self._fast:
            self.tiers, self._spread = open_tiers(self.tiers, self._nodes)
            self._fast = [tier.directory for tier in self.tiers if tier.name != STORE]
        self.failures = Failures(self._fast)

    def _open_directory(self) -> None:
        if self._takes_lease:
            leases = Leases([self.directory])
            leases.take()
            self._leases = leases
        left = folder.on_disk(self.directory, lambda: folder.remove_unfinished(self.directory))
        for name in (name for name in left if ".reports" not in name):
            _log.warning("removed an unfinished checkpoint: %s", self.directory / name)

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def due(self, step: int) -> str | None:
        """The tier that a save after this step goes to, by the intervals; None: no save."""
        return due(self.tiers, step)

    def save(self, state: TrainState, tier: str = STORE) -> None:
        """Save; returns when it is on disk, or with --async-save at once: the weights are copied
        until `before_update`.

        One save is written at a time: a second one waits for the first. A failure is one warning,
        the third in a row raises. Raises DiskError, LockedError, and what `before_save` raises.
        """
        assert self.directory is not None, "this Checkpointer has no folder to save into"
        self._wait_for(DURABLE)
        if self._before_save is not None:
            agree(self._before_save)
        place = next(entry for entry in self.tiers if entry.name == tier)
        try:
            save = self._stage(state, place)
        except (Fatal, OSError) as error:
            step, ledger, text = state.progress.step, Ledger(place.directory), str(error)
            if self._is_first and not isinstance(error, LockedError):
                quietly(lambda: ledger.add("failed", step, error=text))
            self.failures.add(step, place.directory, error)
            return
        self._saves.append(save)
        state.before_update = self.before_update
        save.start()
        if not self.cfg.async_save:
            self._wait_for(DURABLE)

    def _stage(self, state: TrainState, tier: Tier) -> Save:
        """Plan, check the space, make the folder, and copy what is small or changes before the next
        update.
        """
        begin, step = time.perf_counter(), state.progress.step
        parts.sync_weights(state.chunks)
        model = parts.sharded_model(state.chunks)
        has_optimizer = state.optimizer is not None and not self.cfg.no_save_optim
        states = parts.sharded_optimizer(state.optimizer, model)[0] if has_optimizer else []
        streams = {} if self.cfg.no_save_rng else parts.sharded_rng()
        try:
            mine = self._planner.plan(parts.built([model, states, streams]))
        except ValueError as error:
            raise AssertionError(f"the ranks do not hold a whole model: {error}") from error
        layout = tensor_file.arrange([spot for spot, _ in mine])
        numbers = self._all_reduce([get_step(state.optimizer)], torch.distributed.ReduceOp.MAX)
        total = self._all_reduce([layout.num_bytes], torch.distributed.ReduceOp.SUM)[0]
        record = parts.record(state, numbers[0], has_optimizer, self.run_info)
        identity = first_rank(lambda: self._request(step, tier))
        if self._fast and self._course is not None:
            remove_later(self._fast, self._course, self._nodes)
            self._course = None
        agree(lambda: self._begin(step, tier, identity, total))
        order = Order(
            step=step,
            identity=identity,
            directory=tier.directory,
            num_bytes=total,
            record=record,
            by_rank=self._planner.by_rank,
            check_lease=self._leases.check if self._leases else lambda: None,
            prune=lambda newest: self._prune(tier, newest),
        )
        lasting = parts.lasting_storages(state.chunks)
        sources = []
        for index, _ in layout.places:
            spot, piece = mine[index]
            data = tensor_of(piece)
            is_lasting = spot.name.startswith(parts.shards.PREFIX) or (
                data.untyped_storage().data_ptr() in lasting
            )
            sources.append((spot.num_bytes, data if is_lasting else data.clone()))
        image = Image(layout.header, sources, self._pool)
        rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
        if tier.name in self._spread:
            return SpreadSave(order, image, rank, world, started=begin, nodes=self._nodes)
        return Save(order, image, rank, world, started=begin)

    def _request(self, step: int, tier: Tier) -> str:
        """Rank 0: the ledger's line and the name of this save."""
        self._leases.check()
        folder.on_disk(tier.directory, tier.make)
        ledger = Ledger(tier.directory)
        quietly(lambda: ledger.add("requested", step, asynchronous=bool(self.cfg.async_save)))
        return uuid.uuid4().hex[:8]

    def _begin(self, step: int, tier: Tier, identity: str, num_bytes: int) -> None:
        """Enough space, and the folders that all ranks (of a node, where it is spread) write into:
        twice a node's share then, because of the copies.
        """
        is_spread = tier.name in self._spread
        if not (self._nodes.is_leader if is_spread else self._is_first):
            return
        needed = 2 * num_bytes // self._nodes.count if is_spread else num_bytes
        try:
            tier.make()
            folder.check_space(tier.directory, needed)
            if not is_spread:
                Reports(tier.directory, step, identity).begin()
            folder.begin(tier.directory, step, identity)
        except OSError as error:
            raise folder.disk_error(error, tier.directory, needed) from error

    def _prune(self, tier: Tier, newest: int) -> list[int]:
        """The thread of rank 0, or of a node's leader, when `newest` has been read back: delete
        what need not stay.
        """
        keep = {self._loaded.step} if self._loaded_from(tier.directory) else set()
        gone = to_prune(folder.steps(tier.directory), newest, tier, keep)
        for step in gone:
            folder.remove_step(tier.directory, step)
        return gone

    def _loaded_from(self, directory: Path) -> bool:
        return self._loaded is not None and (
            self._loaded.directory.resolve() == directory.resolve()
        )

    def before_update(self) -> None:
        """Call before anything changes weights or optimizer states: waits until the save in flight
        has copied them. Not collective.
        """
        for save in self._saves:
            save.image.copied.wait()

    def poll(self, blocking: bool = False) -> list[int]:
        """The steps whose save has just become durable, on all ranks alike.

        Call once a step: it costs nothing while no save is in flight. `blocking` waits for it. A
        failed save is one warning; the third in a row raises.
        """
        return self._wait_for(DURABLE) if blocking else self._look()

    def finish(self) -> None:
        """The end of a run: wait until everything is read back, empty /dev/shm, which is of no more
        use. Raises if the last save failed.
        """
        self._wait_for(VERIFIED)
        self.failures.raise_last()
        for tier in self.tiers:
            if tier.name == "memory" and self._nodes.is_leader:
                shutil.rmtree(tier.directory, ignore_errors=True)

    def _wait_for(self, phase: int) -> list[int]:
        """Look until no save is before `phase`; every rank leaves after the same look."""
        found, pause = [], _POLL_S
        while self._saves:
            found += self._look()
            if all(save.agreed >= phase for save in self._saves):
                break
            self._saves[-1].changed.wait(pause)
            time.sleep(_POLL_S)
            pause = min(2 * pause, 0.05)
        return found

    def _look(self) -> list[int]:
        """One all-reduce: rank 0's phase of each save, and whether any rank's thread failed."""
        if not self._saves:
            return []
        values = []
        for save in self._saves:
            values += [save.phase if self._is_first else 0, save.error is not None]
        agreed = self._all_reduce([int(v) for v in values], torch.distributed.ReduceOp.MAX)
        durable = []
        for index, save in enumerate(list(self._saves)):
            phase, has_failed = agreed[2 * index : 2 * index + 2]
            if has_failed:
                self._saves.remove(save)
                self._give_up(save)
                continue
            if save.agreed < DURABLE <= phase:
                durable.append(save.order.step)
                self.failures.forget(save.order.directory)
            save.agreed = phase
            if phase >= VERIFIED:
                self._saves.remove(save)
        return durable

    def _give_up(self, save: Save) -> None:
        """Some rank's thread failed: all ranks learn why from the one that knows."""
        save.give_up()
        save.image.copied.wait()

        def tell() -> None:
            if save.error is not None and not save.is_elsewhere:
                raise save.error

        try:
            agree(tell)
        except Fatal as error:
            self.failures.add(save.order.step, save.order.directory, error)

    def close(self) -> None:
        """Wait for the saves in flight and give the folder free. Raises if the last save failed.

        While an exception passes through (this rank failed and the others may be gone) nothing is
        waited for.
        """
        is_failing = sys.exc_info()[0] is not None
        try:
            if not is_failing:
                self._wait_for(VERIFIED)
        finally:
            for save in self._saves:
                save.give_up()
            self._saves = []
            if self._leases is not None and self._takes_lease:
                self._leases.release()
            self._leases = None
        if not is_failing:
            self.failures.raise_last()

    def _all_reduce(self, values: list[int], op: Any) -> list[int]:
        tensor = torch.tensor(values, dtype=torch.int64)
        torch.distributed.all_reduce(tensor, op, group=self._group)
        return tensor.tolist()

    def load(self, state: TrainState) -> bool:
        """Fill `state` from the newest checkpoint whose every byte is right, or --ckpt-step's.

        False: there is nothing to load and that is allowed, the run starts fresh. Raises DataError
        (65) where there is no checkpoint or a damaged one, Misfit (64) where it is of another
        model or run.
        """
        own = self.directory
        ahead = steps_anywhere(self._fast, self._nodes) if self._fast else {}
        self._loaded = loader.load_newest(
            self.cfg,
            state,
            load_from=self.load_from,
            own=own,
            tiers=ahead,
            nodes=self._nodes,
            run=self._this_run,
            quarantine=self._quarantine if self._is_own(self.load_from) else None,
        )
        if self._loaded is not None:
            self._course = self._loaded.step if self._is_own(self.load_from) else -1
            kept = {name: self._loaded.run[name] for name in INHERITED if name in self._loaded.run}
            self.run_info = {**self.run_info, **kept}
            return True
        return False

    def abandon_later(self, step: int) -> None:
        """The run went back to `step`: later steps of its own folders are no candidates any more.
        Raises DiskError. Collective.
        """
        own = self.directory
        gone = first_rank(lambda: folder.on_disk(own, lambda: abandon_later(own, step)))
        if gone and self._is_first:
            _log.warning("went back to step %d: later steps were set aside: %s", step, gone)
        if self._fast:
            remove_later(self._fast, step, self._nodes)

    def _is_own(self, path: Path | None) -> bool:
        own = self.directory
        return own is not None and path is not None and own.resolve() == path.resolve()

    def _quarantine(self, found: loader.Found) -> None:
        """A damaged step is no candidate any more. By rank 0, which holds the lease; in a fast tier
        by each node's leader.
        """
        is_first_here = self._is_first if found.fast is None else self._nodes.is_leader
        if not is_first_here or not found.path.exists():
            return
        moved = folder.quarantine(found.directory, found.step)
        Ledger(found.directory).add("quarantined", found.step, to=moved.name)
