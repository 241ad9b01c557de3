"""Optimizer states as pieces of global tensors, whatever optimizer holds them.

A weight has a `ShardedTensor`: its name, its shape in the whole model, and the offset of this
rank's part. Its optimizer states (exp_avg, exp_avg_sq, fp32 master) are the same pieces under
`optimizer.state.<name>.<weight>`. The distributed optimizer keeps a flat range [start, stop) of the
weight instead, cut anywhere. Such a range is a few boxes of the weight, so each box is written (and
read) at its own place: no gathering, no second copy, and every layout can read it. Example: range
[3, 17) of a [4, 5] weight is row 0 columns 3-4, rows 1-2, row 3 columns 0-1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.optimizer import ChainedOptimizer, DistributedOptimizer, MegatronOptimizer
from megatron.core.optimizer.optimizer import FP32Optimizer
from torch import Tensor

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""(offset, size), one number each per dim."""

MASTER = "fp32_param"
PREFIX = "optimizer.state."


def boxes(shape: tuple[int, ...], start: int, stop: int) -> Iterator[Box]:
    """The flat range [start, stop) of a row-major tensor of `shape` as boxes, in the order of the
    flat range.
    """
    if start >= stop:
        return
    if len(shape) <= 1:
        yield (start,), (stop - start,)
        return
    inner = shape[1:]
    row = math.prod(inner)
    first, last = -(-start // row), stop // row  # the rows [first, last) are whole
    if first > last:
        yield from _in_row(inner, start // row, start % row, stop - (start // row) * row)
        return
    yield from _in_row(inner, first - 1, start - (first - 1) * row, row)
    if first < last:
        yield (first, *(0 for _ in inner)), (last - first, *inner)
    yield from _in_row(inner, last, 0, stop - last * row)


def _in_row(inner: tuple[int, ...], row: int, start: int, stop: int) -> Iterator[Box]:
    for offset, size in boxes(inner, start, stop):
        yield (row, *offset), (1, *size)


@dataclass(frozen=True)
class Held:
    """What this rank's optimizer holds for one weight: `tensors` by state name, for its flat range
    or all of it.
    """

    weight: Tensor
    tensors: dict[str, Tensor]
    flat_range: tuple[int, int] | None
    instance: int = 0  # of the distributed optimizer, where it is replicated


def leaf_optimizers(optimizer: MegatronOptimizer | None) -> list[MegatronOptimizer]:
    """The optimizers behind a ChainedOptimizer that own parameters on this rank."""
    if optimizer is None:
        return []
    chain = optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]
    return [leaf for leaf in chain if not getattr(leaf, "is_stub_optimizer", False)]


def _is_torch_adam(leaf: MegatronOptimizer) -> bool:
    return isinstance(leaf.optimizer, (torch.optim.Adam, torch.optim.AdamW))


def prepare(leaf: MegatronOptimizer) -> None:
    """Create the states that the first step would create (zeros), so that there is something to
    save or fill.

    megatron-core's own initialiser leaves out torch Adam's `step`, without which the next step
    raises KeyError.
    """
    if leaf.init_state_fn is not None:
        leaf.init_state_fn(leaf.optimizer, leaf.config)
    for group in leaf.optimizer.param_groups:
        for parameter in group["params"]:
            state = leaf.optimizer.state[parameter]
            if _is_torch_adam(leaf):
                state.setdefault("step", torch.tensor(0.0, dtype=torch.float32))
            elif group.get("momentum") and not state:
                state["momentum_buffer"] = torch.zeros_like(parameter)


def get_step(optimizer: MegatronOptimizer | None) -> int:
    """Optimizer steps done, which is what Adam's bias correction counts; 0 where this rank holds no
    parameter.
    """
    steps = [0]
    for leaf in leaf_optimizers(optimizer):
        steps += [int(state["step"]) for state in leaf.optimizer.state.values() if "step" in state]
        steps += [int(group["step"]) for group in leaf.optimizer.param_groups if "step" in group]
    return max(steps)


def set_step(optimizer: MegatronOptimizer | None, step: int) -> None:
    """Write the step count where the optimizer keeps it: per parameter (torch) or per group (Apex,
    TE).
    """
    for leaf in leaf_optimizers(optimizer):
        if _is_torch_adam(leaf):
            for state in leaf.optimizer.state.values():
                state["step"] = torch.tensor(float(step), dtype=torch.float32)
        elif leaf.config.optimizer == "adam":  # SGD counts nothing
            for group in leaf.optimizer.param_groups:
                group["step"] = step


def _states(main: Tensor, state: dict) -> dict[str, Tensor]:
    """The states that are as large as the parameter (`step` is not)."""
    return {
        name: value
        for name, value in state.items()
        if name != "step" and torch.is_tensor(value) and value.shape == main.shape
    }


def _with_master(weight: Tensor, main: Tensor, states: dict[str, Tensor]) -> dict[str, Tensor]:
    """Adds the fp32 master; an fp32 weight is its own master and is not stored twice."""
    is_weight = main.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr()
    return states if is_weight else {MASTER: main, **states}


def _held_by_distributed(leaf: DistributedOptimizer) -> Iterator[Held]:
    for range_maps in leaf.gbuf_ranges:
        for buckets in range_maps.values():
            for bucket in buckets:
                for weight, ranges in bucket["param_map"].items():
                    tensors = dict(leaf._get_main_param_and_optimizer_states(weight))
                    main = tensors.pop("param")
                    states = _with_master(weight, main, _states(main, tensors))
                    flat = (ranges["param"].start, ranges["param"].end)
                    yield Held(weight, states, flat, leaf.distributed_optimizer_instance_id)


def held(leaf: MegatronOptimizer) -> Iterator[Held]:
    """Everything that one optimizer holds on this rank."""
    if isinstance(leaf, DistributedOptimizer):
        yield from _held_by_distributed(leaf)
        return
    state = leaf.optimizer.state
    if isinstance(leaf, FP32Optimizer):
        pairs = [(p, p) for group in leaf.optimizer.param_groups for p in group["params"]]
    else:
        halves = zip(leaf.float16_groups, leaf.fp32_from_float16_groups)
        pairs = [pair for weights, mains in halves for pair in zip(weights, mains)]
        pairs += [(p, p) for group in leaf.fp32_from_fp32_groups for p in group]
    for weight, main in pairs:
        yield Held(weight, _with_master(weight, main, _states(main, state[main])), None)


def write_back(leaf: MegatronOptimizer, entry: Held) -> None:
    """Hand filled states back to an optimizer that gave copies of them (TE's precision-aware one
    scales them).
    """
    if not leaf.config.use_precision_aware_optimizer:
        return
    tensors = dict(entry.tensors)
    tensors["param"] = tensors.pop(MASTER)
    leaf._set_main_param_and_optimizer_states(entry.weight, tensors)


def _piece(whole: ShardedTensor, flat: Tensor, box: Box, key: str, replica: tuple) -> ShardedTensor:
    """One box of this rank's part of `whole`, at its place in the global tensor."""
    offset, size = box
    lead = whole.prepend_axis_num
    local_origin = whole.global_offset
    place = (0,) * lead + offset
    shape = (1,) * lead + size
    return ShardedTensor(
        key=key,
        data=flat.view(shape),
        dtype=flat.dtype,
        local_shape=shape,
        global_shape=whole.global_shape,
        global_offset=tuple(a + b for a, b in zip(local_origin, place)),
        axis_fragmentations=None,
        replica_id=replica,
        allow_shape_mismatch=whole.allow_shape_mismatch,
    )


def _parts(
    entry: Held, base: ShardedTensor | ShardedTensorFactory
) -> Iterator[tuple[ShardedTensor, int]]:
    """The global tensors that a weight is made of, each with its first element in the weight."""
    if isinstance(base, ShardedTensor):
        yield base, 0
        return
    built = base.build()
    for part in built.values() if isinstance(built, dict) else built:
        assert part.data.is_contiguous(), f"{part.key}: a part of a flat weight must be contiguous"
        yield part, part.data.storage_offset() - entry.weight.storage_offset()


def _sharded_range(entry: Held, base, name: str, state: Tensor) -> Iterator[ShardedTensor]:
    """The boxes of a flat range, for each part of the weight that it touches."""
    start, stop = entry.flat_range
    for part, first in _parts(entry, base):
        low, high = max(start, first), min(stop, first + part.data.numel())
        replica = (*part.replica_id[:-1], entry.instance)
        cursor = low - start
        for box in boxes(tuple(part.local_shape), low - first, high - first):
            count = math.prod(box[1])
            key = f"{PREFIX}{name}.{part.key}"
            yield _piece(part, state.view(-1)[cursor : cursor + count], box, key, replica)
            cursor += count


def holdings(optimizer: MegatronOptimizer | None) -> list[tuple[MegatronOptimizer, Held]]:
    """Everything that this rank's optimizers hold, each entry with its owner."""
    pairs = []
    for leaf in leaf_optimizers(optimizer):
        prepare(leaf)
        pairs += [(leaf, entry) for entry in held(leaf)]
    return pairs


def sharded_entry(entry: Held, base: ShardedTensor | ShardedTensorFactory) -> Iterator:
    """The states of one weight as ShardedTensors over live storage; `base` is the weight's."""
    for name, state in entry.tensors.items():
        if entry.flat_range is not None:
            yield from _sharded_range(entry, base, name, state)
            continue
        key = f"{PREFIX}{name}.{base.key}"
        if isinstance(base, ShardedTensorFactory):
            yield replace(base, key=key, data=state)
        else:
            yield replace(base, key=key, data=state, dtype=state.dtype)
