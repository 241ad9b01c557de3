"""Find a checkpoint, make sure that it is whole and fits, and read it in place.

megatron-core reads (`dist_checkpointing.load`): every rank asks for its own pieces, whatever ranks
wrote them. Before that, rank 0 checks names and sizes of all files, and every rank reads
`.metadata`, which is a pickle, with an unpickler that knows the few types that belong there, so
that no byte of a checkpoint is executed.
"""

from __future__ import annotations

import logging
import pickle
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from megatron_ext.checkpoint import folder, rng, shards
from megatron_ext.checkpoint.folder import read_record
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
_METADATA = ".metadata"
_SAME_MODEL = "use the model flags of the run that wrote it (state.json)"
_CLASSES = {
    "torch.distributed.checkpoint.metadata": None,  # all classes defined there
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "collections": {"OrderedDict"},
    "pathlib": {"Path", "PosixPath"},
}


class Misfit(Fatal):
    """A whole checkpoint of another model (64). Unlike a ConfigError, one rank may find it."""

    code = 64


class _Unpickler(pickle.Unpickler):
    """Reads `.metadata`: torch's metadata classes, shapes and dtypes; anything else is refused."""

    def find_class(self, module: str, name: str) -> Any:
        names = _CLASSES.get(module, set())
        if names is not None and name in names:
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if names is None and "." not in name:
            found = super().find_class(module, name)
            if isinstance(found, type) and found.__module__ == module:
                return found
        raise pickle.UnpicklingError(f"{module}.{name} does not belong into a checkpoint")


def read_metadata(path: Path) -> Metadata:
    """The table of all pieces, read without executing anything. Raises DataError."""
    try:
        with open(path / _METADATA, "rb") as file:
            metadata = _Unpickler(file).load()
        assert isinstance(metadata, Metadata), f"holds a {type(metadata).__name__}"
        names = {info.relative_path for info in metadata.storage_data.values()}
        assert all(Path(name).name == name for name in names), "names a file outside its folder"
    except Exception as error:  # a damaged pickle may raise anything
        raise DataError(
            f"checkpoint metadata is damaged or hostile: {error}", path=path / _METADATA
        ) from error
    return metadata


def check_fits(
    metadata: Metadata, pieces: Iterable[ShardedTensor | ShardedObject], path: Path
) -> None:
    """Every piece that this rank asks for exists in the same global shape. Raises Misfit."""
    stored = metadata.state_dict_metadata
    for piece in pieces:
        is_object = isinstance(piece, ShardedObject)
        entry = stored.get(piece.unique_key if is_object else piece.key)
        if entry is None:
            raise Misfit(
                f"the checkpoint has no {piece.key}",
                do=f"{_SAME_MODEL}, or --no-load-optim for weights only",
                path=path,
            )
        if is_object or piece.allow_shape_mismatch or not isinstance(entry, TensorStorageMetadata):
            continue
        if tuple(entry.size) != tuple(piece.global_shape):
            raise Misfit(
                f"{piece.key} is {tuple(entry.size)} in the checkpoint,"
                f" {tuple(piece.global_shape)} in this model",
                do=_SAME_MODEL,
                path=path,
            )


def _is_weight(name: str) -> bool:
    return not name.startswith((shards.PREFIX, RNG_PREFIX)) and "_extra_state" not in name


def check_complete(metadata: Metadata, pieces: Iterable[Any], path: Path) -> None:
    """No weight of the checkpoint is left over: fewer layers would load silently. Collective."""
    mine = {piece.key for piece in pieces}
    everyone: list = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, mine)
    stored = {name for name in metadata.state_dict_metadata if _is_weight(name)}
    unused = stored - set().union(*everyone)

    def check() -> None:
        if unused:
            raise Misfit(
                f"the checkpoint holds {len(unused)} weights that this model has not,"
                f" as {min(unused)}",
                do=_SAME_MODEL,
                path=path,
            )

    first_rank(check)


def _read(tree: dict[str, Any], path: Path) -> dict[str, Any]:
    """megatron-core's load; torch gathers the failures of all ranks and raises on each."""
    try:
        with warnings.catch_warnings():
            # megatron-core 0.16.1 calls torch's load_state_dict by its old name
            warnings.simplefilter("ignore", FutureWarning)
            return dist_checkpointing.load(tree, str(path), validate_access_integrity=False)
    except (
        CheckpointException,
        CheckpointingException,
        RuntimeError,
        OSError,
        ValueError,
        KeyError,
    ) as error:
        raise DataError(f"checkpoint cannot be read: {_cause(error)}", path=path) from error


def _cause(error: BaseException) -> str:
    """The first rank's own exception of a failure that torch gathered, in one line."""
    for failure in getattr(error, "failures", {}).values():
        return f"{failure[0]!r}"[:300]
    return f"{error!r}"[:300]


def load(
    path: Path, state: TrainState, *, optimizer: bool, random: bool, counters: bool
) -> dict[str, Any]:
    """Read one checkpoint into `state`, in place; returns its record. Collective.

    Raises DataError where it is damaged (nothing of `state` may be used then, except as the target
    of another load), Misfit where it does not fit the model or the flags.
    """
    record = first_rank(lambda: read_record(path))
    metadata = agree(lambda: read_metadata(path))
    has = metadata.state_dict_metadata
    optimizer = optimizer and state.optimizer is not None
    if optimizer and record["optimizer"] is None:
        raise Misfit("the checkpoint has no optimizer", do="--no-load-optim", path=path)
    random = random and record["layout"] == layout() and any(k.startswith(RNG_PREFIX) for k in has)

    model = sharded_model(state.chunks)
    states, holdings = sharded_optimizer(state.optimizer, model) if optimizer else ([], [])
    streams = sharded_rng() if random else {}
    pieces = list(built([model, states, streams]))
    agree(lambda: check_fits(metadata, pieces, path))
    check_complete(metadata, pieces, path)

    tree = {"model": dict(enumerate(model)), "optimizer": dict(enumerate(states)), "rng": streams}
    loaded = agree(lambda: _read(tree, path))
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


def candidates(cfg: Any, load_from: Path, own: Path | None) -> list[int]:
    """Steps to try, best first: `latest`, then older ones, then newer ones (of an abandoned
    course).

    Empty: start fresh. That is allowed for the run's own folder and with --allow-fresh-start;
    otherwise a folder without a checkpoint is a DataError.
    """
    steps = folder.steps(load_from)
    if cfg.ckpt_step is not None:
        if cfg.ckpt_step in steps:
            return [cfg.ckpt_step]
        known = ", ".join(map(str, steps)) or "none"
        raise DataError(
            f"--ckpt-step {cfg.ckpt_step} is not there", do=f"use one of: {known}", path=load_from
        )
    if steps:
        latest = folder.latest_step(load_from)
        newest = latest if latest in steps else steps[0]
        return sorted(steps, key=lambda step: (step > newest, -step))
    if cfg.allow_fresh_start or (own is not None and own.resolve() == load_from.resolve()):
        return []
    raise DataError(
        "--load: this folder holds no checkpoint",
        do="name a folder that holds step_... folders, or --allow-fresh-start",
        path=load_from,
    )


def load_newest(cfg: Any, state: TrainState, *, load_from: Path | None, own: Path | None) -> bool:
    """Load the best checkpoint that is whole; a damaged one is one warning and the next is tried.
    Collective.
    """
    if load_from is None:
        return False
    steps = first_rank(lambda: candidates(cfg, load_from, own))
    for step, fallback in zip(steps, [*steps[1:], None]):
        try:
            load(
                load_from / folder.step_name(step),
                state,
                optimizer=not (cfg.finetune or cfg.no_load_optim),
                random=not (cfg.finetune or cfg.no_load_rng),
                counters=not cfg.finetune,
            )
            return True
        except (DataError, FailedElsewhere) as error:
            if error.code != DataError.code or fallback is None:
                raise
            if not isinstance(error, FailedElsewhere):  # on the rank that found it
                _log.warning("%s; falling back to step %d", error, fallback)
    return False
