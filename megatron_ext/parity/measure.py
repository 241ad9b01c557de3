"""Train a few steps in one layout and take down what must not depend on the layout.

`measure` runs on every rank; `assemble` joins what the ranks hold into whole tensors. Gradients are
those of the first step, after all reductions and before clipping, by the global names and places
that the checkpoints use.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state
from torch import Tensor, nn

from data.loader import MicroBatches
from megatron_ext.checkpoint.state import unwrap
from megatron_ext.config import RunConfig, parse
from megatron_ext.device import current_device, start
from megatron_ext.mesh.agree import agree
from megatron_ext.mesh.groups import process_groups
from megatron_ext.model.gpt import build_chunks, vocabulary, wrap_for_training
from megatron_ext.model.initialise import sharded_pieces, sharding_metadata
from megatron_ext.optim.build import build_optimizer, build_scheduler
from megatron_ext.train import setup
from megatron_ext.train.step import StepSettings, prepare_config, to_device, train_step

Piece = tuple[str, tuple[int, ...], tuple[int, ...], np.ndarray]


@dataclass
class Measurement:
    """What one run was: losses and gradient norms of its steps, routing and gradients of the first.

    `counts_LE` [L][E] tokens per expert; `pieces` are (name, global shape, place, values) of the
    gradients that this rank holds as the first replica; `samples` the ids of the first step's
    batch.
    """

    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    counts_LE: list[list[int]] = field(default_factory=list)
    samples: list[int] = field(default_factory=list)
    pieces: list[Piece] = field(default_factory=list)


def _gather_sharded_gradients(chunk: nn.Module) -> None:
    """With the distributed optimizer each rank holds the reduced gradient of its shard: gather them
    all.
    """
    for group in chunk.bucket_groups + chunk.expert_parallel_bucket_groups:
        ranks = group.intra_distributed_optimizer_instance_group
        for bucket in group.buckets:
            mine = bucket.grad_data.chunk(ranks.size())[ranks.rank()].clone()
            torch.distributed.all_gather_into_tensor(bucket.grad_data, mine, group=ranks)


def _gradient_of(piece: Tensor, parameters: Sequence[nn.Parameter]) -> Tensor | None:
    """The part of a parameter's main_grad that lies under `piece`, a view of the parameter."""
    for parameter in parameters:
        first = (piece.data_ptr() - parameter.data_ptr()) // parameter.element_size()
        same = piece.untyped_storage().data_ptr() == parameter.untyped_storage().data_ptr()
        if same and 0 <= first < parameter.numel():
            flat = parameter.main_grad.flatten()
            return flat.as_strided(piece.shape, piece.stride(), flat.storage_offset() + first)
    return None


def gradient_pieces(chunks: Sequence[nn.Module]) -> Iterator[Piece]:
    """The first-replica gradients of this rank's chunks (DDP-wrapped), as numpy."""
    for chunk in chunks:
        if chunk.ddp_config.use_distributed_optimizer:
            _gather_sharded_gradients(chunk)
        model = unwrap(chunk)
        parameters = list(model.parameters())
        for piece in sharded_pieces(model.sharded_state_dict(metadata=sharding_metadata())):
            replica = piece.replica_id
            is_first = not any(replica) if isinstance(replica, tuple) else replica == 0
            gradient = _gradient_of(piece.data, parameters) if is_first else None
            if gradient is not None:
                values = gradient.detach().float().cpu().numpy().copy()
                yield piece.key, tuple(piece.global_shape), tuple(piece.global_offset), values


def index_of(shape: tuple[int, ...], place: tuple[int, ...], values: np.ndarray) -> tuple:
    """Where a piece lies in its global tensor: an index per prepended axis, slices for the rest."""
    lead = len(shape) - values.ndim
    slices = (slice(start, start + size) for start, size in zip(place[lead:], values.shape))
    return (*place[:lead], *slices)


def assemble(pieces: Sequence[Piece]) -> dict[str, np.ndarray]:
    """Whole gradients by name; NaN where no rank held a part. Experts of one layer come in many
    pieces.
    """
    whole: dict[str, np.ndarray] = {}
    for name, shape, place, values in pieces:
        if name not in whole:
            whole[name] = np.full(shape, np.nan, dtype=np.float32)
        whole[name][index_of(shape, place, values)] = values
    return whole


def _capture_after_reduction(state: Any, result: Measurement) -> None:
    """Take the gradients of the first step when megatron-core has finished reducing them."""
    config = state.chunks[0].config
    finalize = config.finalize_model_grads_func

    def finalize_and_capture(*args, **kwargs) -> None:
        finalize(*args, **kwargs)
        if not result.losses:
            result.pieces = list(gradient_pieces(state.chunks))

    config.finalize_model_grads_func = finalize_and_capture


def _go_on() -> tuple[bool, bool]:
    """Nobody asks a parity run to stop."""
    return False, False


def _train(cfg: RunConfig, state: Any, splits: Any, steps: int) -> Measurement:
    result = Measurement()
    _capture_after_reduction(state, result)
    train, dp = cfg.train, parallel_state.get_data_parallel_world_size()
    rank = parallel_state.get_data_parallel_rank()
    per_step = train.global_batch_size // (train.micro_batch_size * dp)
    with MicroBatches(splits.train, train.micro_batch_size, rank, dp) as batches:
        for _ in range(steps):
            micro_batches = [to_device(next(batches), current_device()) for _ in range(per_step)]
            if not result.losses:
                result.samples = [int(i) for one in micro_batches for i in one.sample_ids_B]
            step = train_step(state, micro_batches, StepSettings.of(cfg), _go_on)
            state.scheduler.step(increment=train.global_batch_size)
            state.progress.step += 1
            if not result.losses and step.routing is not None:
                counts = step.routing.counts_LE.tolist()
                result.counts_LE = [[int(count) for count in row] for row in counts]
            result.losses.append(step.lm_loss)
            result.grad_norms.append(step.grad_norm)
    return result


def measure(argv: list[str], steps: int) -> Measurement:
    """Train `steps` steps of the run of `argv` on this launch's ranks; writes no files."""
    cfg = parse(argv)
    device = start(cfg.parallel.device)
    with process_groups(cfg.parallel, device, cfg.train.seed):
        tokenizer = agree(lambda: setup.tokenizer(cfg))
        words = vocabulary(cfg, tokenizer.vocab_size)
        splits = setup.datasets(cfg, tokenizer)
        chunks = wrap_for_training(cfg, build_chunks(cfg, words))
        optimizer = build_optimizer(cfg, chunks)
        state = setup.train_state(chunks, optimizer, build_scheduler(cfg, optimizer))
        prepare_config(chunks[0].config, optimizer, chunks, chunks[0].ddp_config)
        return _train(cfg, state, splits, steps)
