"""Find a checkpoint, make sure that it is whole and fits, and read it in place.

Every rank asks for its own pieces, whatever ranks wrote them: megatron-core describes them
(ShardedTensor), opens its factories before and merges them after. Before that the ranks hash all
files again, each its share, so that no damaged byte reaches a weight. Nothing is unpickled.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_outplace
from megatron.core.dist_checkpointing.mapping import (
    ShardedObject,
    ShardedTensor,
    apply_factory_merges,
)
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess

from megatron_ext.checkpoint import complete, folder, rng, shards
from megatron_ext.checkpoint.content import content_differences
from megatron_ext.checkpoint.fingerprint import differences, shown
from megatron_ext.checkpoint.hashes import Damaged
from megatron_ext.checkpoint.lost import check_loadable, lost_steps, told_of
from megatron_ext.checkpoint.manifest import Manifest
from megatron_ext.checkpoint.nodes import Nodes
from megatron_ext.checkpoint.patience import patiently
from megatron_ext.checkpoint.reader import StoredTensors, check_share, object_of
from megatron_ext.checkpoint.record import read_record
from megatron_ext.checkpoint.spots import OBJECT_PREFIX
from megatron_ext.checkpoint.spread import SpreadTensors, open_spread
from megatron_ext.checkpoint.state import (
    RNG_PREFIX,
    TrainState,
    built,
    layout,
    restore_optimizer,
    restore_progress,
    restore_weights,
    sharded_model,
    sharded_optimizer,
    sharded_rng,
)
from megatron_ext.errors import DataError, Fatal
from megatron_ext.mesh.agree import FailedElsewhere, agree, first_rank

_log = logging.getLogger(__name__)
_SAME_MODEL = (
    "use the model flags of the run that wrote it (python -m megatron_ext.checkpoint list)"
)


class Misfit(Fatal):
    """A whole checkpoint of another model (64). Unlike a ConfigError, one rank may find it."""

    code = 64


@dataclass(frozen=True)
class Found:
    """A checkpoint that may be loaded; `fast`: the number of its tier, where that is a fast one,
    whose folder each node has for itself.
    """

    step: int
    directory: Path
    fast: int | None = None
    run: Mapping[str, Any] = field(default_factory=dict, compare=False)
    """What its record says about the run that saved it, once it is loaded."""

    @property
    def path(self) -> Path:
        """Its folder."""
        return self.directory / folder.step_name(self.step)


def check_fits(
    manifest: Manifest, pieces: Iterable[ShardedTensor | ShardedObject], path: Path
) -> None:
    """Every piece that this rank asks for exists in the same global shape. Raises Misfit."""
    for piece in pieces:
        is_object = isinstance(piece, ShardedObject)
        name = OBJECT_PREFIX + piece.unique_key if is_object else piece.key
        entry = manifest.tensors.get(name)
        if entry is None:
            raise Misfit(
                f"the checkpoint has no {piece.key}",
                do=f"{_SAME_MODEL}, or --no-load-optim for weights only",
                path=path,
            )
        shape = entry[0].spot.shape
        if is_object or (piece.allow_shape_mismatch and len(shape) == len(piece.global_shape)):
            continue
        if shape != tuple(piece.global_shape):
            raise Misfit(
                f"{piece.key} is {shape} in the checkpoint,"
                f" {tuple(piece.global_shape)} in this model",
                do=_SAME_MODEL,
                path=path,
            )


def _is_weight(name: str) -> bool:
    return not name.startswith((shards.PREFIX, RNG_PREFIX, OBJECT_PREFIX))


def check_complete(manifest: Manifest, pieces: Iterable[Any], path: Path) -> None:
    """No weight of the checkpoint is left over: fewer layers would load silently. Collective."""
    mine = {piece.key for piece in pieces}
    everyone: list = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, mine)
    unused = {name for name in manifest.tensors if _is_weight(name)} - set().union(*everyone)

    def check() -> None:
        if unused:
            raise Misfit(
                f"the checkpoint holds {len(unused)} weights that this model has not,"
                f" as {min(unused)}",
                do=_SAME_MODEL,
                path=path,
            )

    first_rank(check)


@dataclass(frozen=True)
class ThisRun:
    """What a run that resumes is, and in what it may differ from the one that saved."""

    fingerprint: Mapping[str, Any]
    may_change: Collection[str]
    id: str | None = None
    content: Mapping[str, Any] = field(default_factory=dict)


def check_same_run(saved: Mapping[str, Any], mine: ThisRun, path: Path) -> None:
    """The fingerprints agree where it matters, and so do the contents of the files. `saved`: the
    record's "run". Raises Misfit that shows the differences.
    """
    changed = differences(saved.get("fingerprint") or {}, mine.fingerprint, mine.may_change)
    changed |= content_differences(saved.get("content") or {}, mine.content, mine.may_change)
    if changed:
        listed = ", ".join(f"{shown(name)} {values}" for name, values in changed.items())
        accept = ",".join(shown(name).removeprefix("--") for name in changed)
        raise Misfit(
            f"this run differs from the one that wrote the checkpoint: {listed}"[:1500],
            do=f"use its flags, or --accept-change {accept} if that is meant,"
            " or --finetune to start anew from its weights",
            path=path,
        )


def read_tree(tree: dict[str, Any], stored: StoredTensors) -> dict[str, Any]:
    """Fill the ShardedTensors of a state dict, in place where they have memory; the state dict with
    values for all of them. What `dist_checkpointing.load` does between its own two files.
    """
    tree, _, factories = load_preprocess(tree)

    def value(leaf: Any) -> Any:
        if isinstance(leaf, ShardedObject):
            data = stored.read(OBJECT_PREFIX + leaf.unique_key)
            return object_of(data, leaf.data, stored.path)
        return _fill(leaf, stored) if isinstance(leaf, ShardedTensor) else leaf

    return apply_factory_merges(dict_list_map_outplace(value, tree), factories)


def _fill(leaf: ShardedTensor, stored: StoredTensors) -> torch.Tensor:
    size = (1,) * leaf.prepend_axis_num + tuple(leaf.local_shape)
    box = (tuple(leaf.global_offset), size)
    if leaf.data is None:
        return stored.read(leaf.key, *box).view(leaf.local_shape)
    with torch.no_grad():
        covered = stored.read_into(leaf.data.detach().view(size), leaf.key, box)
    if covered != leaf.data.numel() and not leaf.allow_shape_mismatch:
        raise Damaged(f"checkpoint holds only a part of {leaf.key}", path=stored.path)
    return leaf.data


def open_whole(path: Path) -> StoredTensors:
    """A checkpoint whose manifest is right and whose bytes are those that were written. Collective:
    each rank hashes its share. Raises Damaged on every rank.
    """
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()

    def open_() -> StoredTensors:
        stored = StoredTensors(path, verify=False)
        check_share(stored.manifest, rank, world)
        return stored

    return agree(open_)


def check_model(stored: StoredTensors) -> None:
    """Every layer and expert is there. Collective. Raises Damaged."""

    def check() -> None:
        shapes = ((name, stored.shape(name)) for name in stored.names() if _is_weight(name))
        lacking = complete.missing(shapes, stored.record.get("model") or {})
        if lacking:
            raise Damaged(f"checkpoint is incomplete: {lacking}", path=stored.path)

    first_rank(check)


def load(
    path: Path,
    state: TrainState,
    *,
    optimizer: bool,
    random: bool,
    counters: bool,
    run: ThisRun | None = None,
    nodes: Nodes | None = None,
) -> dict[str, Any]:
    """Read one checkpoint into `state`, in place; returns its record. Collective.

    `run` None: not compared. `nodes`: its files may lie on several. Raises DataError where it is
    damaged (nothing of `state` may be used then, except as the target of another load), Misfit
    where it does not fit the model or the flags.
    """
    stored = open_whole(path) if nodes is None else open_spread(path, nodes)
    check_model(stored)
    record, names = stored.record, stored.manifest.tensors
    if counters and run:
        first_rank(lambda: check_same_run(record["run"], run, path))
    optimizer = optimizer and state.optimizer is not None
    if optimizer and record["optimizer"] is None:
        raise Misfit("the checkpoint has no optimizer", do="--no-load-optim", path=path)
    has_streams = any(name.startswith(RNG_PREFIX) for name in names)
    random = random and record["layout"] == layout() and has_streams

    model = sharded_model(state.chunks)
    states, holdings = sharded_optimizer(state.optimizer, model) if optimizer else ([], [])
    streams = sharded_rng() if random else {}
    pieces = list(built([model, states, streams]))
    agree(lambda: check_fits(stored.manifest, pieces, path))
    check_complete(stored.manifest, pieces, path)
    if isinstance(stored, SpreadTensors):
        stored.fetch(pieces)

    tree = {"model": dict(enumerate(model)), "optimizer": dict(enumerate(states)), "rng": streams}
    loaded = agree(lambda: read_tree(tree, stored))
    stored.close()
    restore_weights(state.chunks, [loaded["model"][i] for i in range(len(model))])
    if counters:
        restore_progress(state, record)
    if optimizer:
        agree(lambda: restore_optimizer(state, record, holdings))
    elif state.optimizer is not None:
        state.optimizer.reload_model_params()  # the fp32 masters follow the new weights
    if streams:
        rng.restore({name: loaded["rng"][name][0] for name in streams})
    return record


def _is_of_another_run(entry: Found, run: ThisRun | None, nodes: Nodes | None) -> bool:
    """A step that lies in the run's own folders and was saved by another one. Collective: whose
    node has it looks.
    """
    if run is None or run.id is None:
        return False
    looks = torch.distributed.get_rank() == 0 or (nodes is not None and nodes.is_leader)
    record = read_record(entry.path) if looks else None
    is_other = record is not None and record["run"].get("id") not in (None, run.id)
    flags: list = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(flags, is_other)
    if is_other and torch.distributed.get_rank() == flags.index(True):
        _log.warning("%s was saved by another run: passed over", entry.path)
    return any(flags)


def candidates(
    cfg: Any, load_from: Path, own: Path | None, tiers: Mapping[Path, list[int]]
) -> list[Found]:
    """Checkpoints to try, best first: `latest`, then older ones, then newer ones (of an abandoned
    course). The steps of faster tiers (folder -> steps) of the run's own folder come in by number.

    Empty: start fresh. That is allowed for the run's own folder and with --allow-fresh-start;
    otherwise a folder without a checkpoint is a DataError.
    """
    steps = patiently(lambda: folder.steps(load_from), load_from)
    if cfg.ckpt_step is not None:
        check_loadable(cfg, load_from, own)
        return [Found(cfg.ckpt_step, load_from)]
    is_own = own is not None and own.resolve() == load_from.resolve()
    latest = folder.latest_step(load_from)
    newest = latest if latest in steps else (steps[0] if steps else 0)
    lost = lost_steps(load_from)
    if lost and steps and lost[0] > newest:
        _log.warning("%s: %s; going on from step %d", load_from, told_of(lost), newest)
    found = [(step > newest, -step, Found(step, load_from)) for step in steps]
    for number, (tier, known) in enumerate(tiers.items() if is_own else ()):
        ahead = [step for step in known if step > newest]
        found += [(False, -step, Found(step, tier, number)) for step in ahead]
    if found:
        return [entry[2] for entry in sorted(found, key=lambda entry: entry[:2])]
    check_loadable(cfg, load_from, own)
    return []


def _warn_of_owner(found: list[Found]) -> None:
    for path in {entry.directory for entry in found} | {entry.path for entry in found[:1]}:
        try:
            why = folder.gate(path) if path.exists() else None
        except OSError:
            continue  # the load says it where the disk goes on refusing
        if why:
            _log.warning("%s %s: whoever may write there decides what this run loads", path, why)


def load_newest(
    cfg: Any,
    state: TrainState,
    *,
    load_from: Path | None,
    own: Path | None,
    tiers: Mapping[Path, list[int]],
    nodes: Nodes | None = None,
    run: ThisRun | None = None,
    quarantine: Callable[[Found], None] | None = None,
) -> Found | None:
    """Load the best checkpoint that is whole; a damaged one is one warning, is moved aside by
    `quarantine(found)`, which every rank calls, and the next is tried. Collective.

    `tiers`: the steps of folders of fast tiers, whose files may be spread over `nodes`.
    """
    if load_from is None:
        return None
    found = first_rank(lambda: candidates(cfg, load_from, own, tiers))
    here = list(tiers)
    found = [f if f.fast is None else replace(f, directory=here[f.fast]) for f in found]
    if found and torch.distributed.get_rank() == 0:
        _warn_of_owner(found)
    is_own = own is not None and own.resolve() == load_from.resolve()
    failure = None
    for entry, fallback in zip(found, [*found[1:], None]):
        if is_own and _is_of_another_run(entry, run, nodes):
            continue
        try:
            record = load(
                entry.path,
                state,
                optimizer=not (cfg.finetune or cfg.no_load_optim),
                random=not (cfg.finetune or cfg.no_load_rng),
                counters=not cfg.finetune,
                run=run,
                nodes=None if entry.fast is None else nodes,
            )
            return replace(entry, run=record["run"])
        except (DataError, FailedElsewhere) as error:
            if error.code != DataError.code:
                raise
            failure = error
            if fallback is None:
                break
            if not isinstance(error, FailedElsewhere):  # on the rank that found it
                _log.warning("%s; falling back to step %d", error, fallback.step)
            _set_aside(error, entry, quarantine)
    if failure is not None:
        raise failure
    return None


def _set_aside(error: Fatal, entry: Found, quarantine) -> None:
    """Only what is certainly damaged, not what could not be read just now. Collective."""
    flags = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(flags, isinstance(error, Damaged))
    if any(flags) and quarantine is not None:
        try:
            quarantine(entry)
        except OSError as failure:
            _log.warning("cannot move %s aside: %s", entry.path, os.strerror(failure.errno))
