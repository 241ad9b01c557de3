"""What a run is made of, as pieces of global tensors and a few numbers.

`sharded` describes this rank's part of a `TrainState` for saving and, since the pieces lie over
live storage, for loading in place. `numbers` is the rest: counters, schedule, optimizer step, loss
scale, all plain JSON.
"""

from __future__ import annotations

import io
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import (
    ShardedObject,
    ShardedTensor,
    ShardedTensorFactory,
)
from torch import Tensor, nn

from megatron_ext.checkpoint import complete, rng, shards
from megatron_ext.device import current_device
from megatron_ext.errors import ConfigError
from megatron_ext.model.initialise import sharding_metadata

RNG_PREFIX = "rng."


def _nothing() -> None:
    pass


@dataclass
class Progress:
    """How far a run is; all counts are of the whole run, over all ranks."""

    step: int = 0
    consumed_samples: int = 0
    consumed_tokens: int = 0
    consumed_valid_samples: int = 0
    skipped_steps: int = 0


@dataclass
class TrainState:
    """The parts of one rank that training changes.

    `chunks`: model chunks, wrapped in DDP or not. `optimizer` and `scheduler` are None where only
    weights matter (evaluation, generation). `extra`: plain JSON of the caller's, kept as it is.
    `before_update` is called right before an optimizer step: a save in flight sets it to wait for
    its copies.
    """

    chunks: list[nn.Module]
    optimizer: Any = None
    scheduler: Any = None
    progress: Progress = field(default_factory=Progress)
    extra: dict[str, Any] = field(default_factory=dict)
    before_update: Callable[[], None] = _nothing


def layout() -> dict[str, Any]:
    """The parallel sizes of this run. Random states belong to a rank, so they are read in an equal
    layout only.
    """
    return {
        "world_size": torch.distributed.get_world_size(),
        "tp": parallel_state.get_tensor_model_parallel_world_size(),
        "pp": parallel_state.get_pipeline_model_parallel_world_size(),
        "vpp": parallel_state.get_virtual_pipeline_model_parallel_world_size(),
        "cp": parallel_state.get_context_parallel_world_size(),
        "ep": parallel_state.get_expert_model_parallel_world_size(),
        "etp": parallel_state.get_expert_tensor_parallel_world_size(),
        "dp": parallel_state.get_data_parallel_world_size(),
    }


def unwrap(chunk: nn.Module) -> nn.Module:
    """The model inside DDP and Float16Module."""
    while isinstance(getattr(chunk, "module", None), nn.Module):
        chunk = chunk.module
    return chunk


def sharded_model(chunks: list[nn.Module]) -> list[dict[str, Any]]:
    """One sharded state dict a chunk. Layers get their own names (not rows of stacked tensors), so
    each is visible.
    """
    metadata = sharding_metadata()
    states = [unwrap(chunk).sharded_state_dict(metadata=metadata) for chunk in chunks]
    return [{k: v for k, v in one.items() if not _is_empty_object(v)} for one in states]


def _is_empty_object(leaf: Any) -> bool:
    """The extra state of a module that has none (all of them, without Transformer Engine's fp8)."""
    if not isinstance(leaf, ShardedObject):
        return False
    data = leaf.data
    if torch.is_tensor(data):
        return data.numel() == 0
    return data is None or (isinstance(data, io.BytesIO) and not data.getbuffer().nbytes)


def leaves(tree: Any) -> Iterator[Any]:
    """The ShardedTensors, factories and ShardedObjects of a nested state dict."""
    if isinstance(tree, (ShardedTensor, ShardedTensorFactory, ShardedObject)):
        yield tree
    elif isinstance(tree, dict):
        for value in tree.values():
            yield from leaves(value)
    elif isinstance(tree, (list, tuple)):
        for value in tree:
            yield from leaves(value)


def built(tree: Any) -> Iterator[ShardedTensor | ShardedObject]:
    """The same with factories (gate and up in one weight) opened."""
    for leaf in leaves(tree):
        if isinstance(leaf, ShardedTensorFactory):
            yield from built(leaf.build())
        else:
            yield leaf


def _weights_by_identity(model: list[dict[str, Any]]) -> dict[int, Any]:
    return {id(leaf.data): leaf for leaf in leaves(model) if not isinstance(leaf, ShardedObject)}


def sharded_optimizer(optimizer: Any, model: list[dict[str, Any]]) -> tuple[list, list]:
    """(pieces of the optimizer's states, who holds them); every trained weight must have a global
    name.
    """
    bases = _weights_by_identity(model)
    holdings = shards.holdings(optimizer)
    pieces: list = []
    for _, entry in holdings:
        base = bases.get(id(entry.weight))
        assert base is not None, f"a weight {tuple(entry.weight.shape)} is not in the sharded state"
        pieces += shards.sharded_entry(entry, base)
    return pieces, holdings


def sharded_rng() -> dict[str, ShardedTensor]:
    """This rank's random streams as rows of [world, ...] tensors."""
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    return {
        name: ShardedTensor.from_rank_offsets(f"{RNG_PREFIX}{name}", row[None], (0, rank, world))
        for name, row in rng.capture().items()
    }


def sync_weights(chunks: list[nn.Module]) -> None:
    """Finish a deferred gather: with --overlap-param-gather, weights are old until the next forward
    pass.
    """
    for chunk in chunks:
        ddp_config = getattr(chunk, "ddp_config", None)
        if ddp_config is not None and ddp_config.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)


def lasting_storages(chunks: list[nn.Module]) -> set[int]:
    """Addresses of the memory of all parameters: only an optimizer step changes what lies there,
    while buffers (expert_bias, fp8 histories) may change in any pass.
    """
    return {p.untyped_storage().data_ptr() for chunk in chunks for p in chunk.parameters()}


def _plain(value: Any) -> Any:
    return value.tolist() if torch.is_tensor(value) else value


def numbers(state: TrainState, optimizer_step: int) -> dict[str, Any]:
    """Everything that is not a large tensor, as JSON. `optimizer_step`: agreed over all ranks."""
    leaves_ = shards.leaf_optimizers(state.optimizer)
    scaler = next(
        (leaf.grad_scaler for leaf in leaves_ if getattr(leaf, "grad_scaler", None)), None
    )
    return {
        "progress": asdict(state.progress),
        "extra": state.extra,
        "scheduler": state.scheduler and state.scheduler.state_dict(),
        "optimizer": {
            "step": optimizer_step,
            "grad_scaler": scaler and {k: _plain(v) for k, v in scaler.state_dict().items()},
        },
    }


def record(
    state: TrainState, optimizer_step: int, has_optimizer: bool, run_info: dict[str, Any]
) -> dict[str, Any]:
    """The part of a manifest that is no table of files and tensors."""
    values = numbers(state, optimizer_step)
    if not has_optimizer:
        values["optimizer"] = values["scheduler"] = None
    return {
        "step": state.progress.step,
        "id": uuid.uuid4().hex,
        "time": time.time(),
        "layout": layout(),
        "model": complete.model_of(state.chunks[0].config),
        **values,
        "run": run_info,
    }


def restore_progress(state: TrainState, saved: dict[str, Any]) -> None:
    """Counters and the caller's own values; unknown counters of a newer version are left out."""
    known = {f.name for f in fields(Progress)}
    state.progress = Progress(**{k: v for k, v in saved["progress"].items() if k in known})
    state.extra = dict(saved["extra"])


def restore_optimizer(state: TrainState, saved: dict[str, Any], holdings: list) -> None:
    """Step counts, loss scale and schedule; the tensors are already in place."""
    for leaf, entry in holdings:
        shards.write_back(leaf, entry)
    shards.set_step(state.optimizer, saved["optimizer"]["step"])
    scaler_state = saved["optimizer"]["grad_scaler"]
    for leaf in shards.leaf_optimizers(state.optimizer):
        scaler = getattr(leaf, "grad_scaler", None)
        if scaler is not None and scaler_state:
            values = dict(scaler_state)
            if "scale" in values:
                values["scale"] = torch.tensor(values["scale"], device=current_device())
            scaler.load_state_dict(values)
    if state.scheduler is not None and saved["scheduler"]:
        _restore_scheduler(state.scheduler, saved["scheduler"])


def _restore_scheduler(scheduler: Any, saved: dict[str, Any]) -> None:
    scheduler.num_steps = 0  # its load_state_dict adds to what is there
    try:
        scheduler.load_state_dict(saved)
    except AssertionError as error:
        raise ConfigError(
            f"the learning-rate schedule differs from the checkpoint's: {error}",
            do="--override-opt-param-scheduler takes the flags',"
            " --use-checkpoint-opt-param-scheduler the checkpoint's",
        ) from error


def restore_weights(chunks: list[nn.Module], loaded: list[dict[str, Tensor]]) -> None:
    """Give the modules what was loaded (most already lies in place) and check that nothing is
    missing.
    """
    for chunk, values in zip(chunks, loaded):
        missing, _ = unwrap(chunk).load_state_dict(values, strict=False)
        missing = [name for name in missing if not name.endswith("_extra_state")]
        assert not missing, f"weights outside the sharded state: {missing}"
