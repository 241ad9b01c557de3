"""One process that plays any rank of any world: the real model, DDP buffers and optimizer
on torch's fake process group, whose collectives return at once and move nothing.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_ext.checkpoint.shards import leaf_optimizers
from megatron_ext.config import RunConfig, parse
from megatron_ext.costs.states import States
from megatron_ext.model import gpt
from megatron_ext.optim.build import build_optimizer


@contextlib.contextmanager
def rank_of(cfg: RunConfig, rank: int, monkeypatch) -> Iterator[None]:
    """megatron-core's groups as rank `rank` of cfg's world sees them."""
    p = cfg.parallel
    with monkeypatch.context() as patch:
        patch.setattr(gpt, "_check_layers", lambda chunks, layers: None)  # sums over stages
        patch.setattr(torch.distributed, "all_gather_object", _everybody_has_mine)
        for name, value in (("RANK", rank), ("WORLD_SIZE", p.world_size)):
            patch.setitem(os.environ, name, str(value))
        torch.distributed.init_process_group(
            "fake", store=FakeStore(), rank=rank, world_size=p.world_size
        )
        try:
            parallel_state.initialize_model_parallel(
                tensor_model_parallel_size=p.tensor_model_parallel_size,
                pipeline_model_parallel_size=p.pipeline_model_parallel_size,
                virtual_pipeline_model_parallel_size=p.virtual_pipeline_model_parallel_size,
                context_parallel_size=p.context_parallel_size,
                expert_model_parallel_size=p.expert_model_parallel_size,
                expert_tensor_parallel_size=p.expert_tensor_parallel_size,
                num_distributed_optimizer_instances=p.num_distributed_optimizer_instances,
                create_gloo_process_groups=False,
            )
            model_parallel_cuda_manual_seed(1, force_reset_rng=True)
            yield
        finally:
            parallel_state.destroy_model_parallel()
            torch.distributed.destroy_process_group()


def _everybody_has_mine(found: list, mine, group=None) -> None:
    found[:] = [mine] * len(found)


def config(argv: list[str], world_size: int) -> RunConfig:
    """The checked configuration of a world."""
    argv = [*argv, "--disable-gloo-process-groups"]
    return parse(argv, {"WORLD_SIZE": str(world_size)})


def real_states(cfg: RunConfig) -> States:
    """Bytes of the tensors of this rank's model, gradient buffers and stepped optimizer."""
    chunks = gpt.wrap_for_training(cfg, gpt.build_chunks(cfg, gpt.vocabulary(cfg, None)))
    optimizer = build_optimizer(cfg, chunks)
    parameters = [p for chunk in chunks for p in chunk.parameters()]
    buffers = [b for c in chunks for b in (*c.buffers, *c.expert_parallel_buffers)]
    state = []
    for leaf in leaf_optimizers(optimizer):
        if leaf.optimizer is None:
            continue
        masters = [p for group in leaf.optimizer.param_groups for p in group["params"]]
        for master in masters:
            master.grad = torch.zeros_like(master)
        leaf.optimizer.step()
        state += [*masters, *(v for p in masters for v in leaf.optimizer.state[p].values())]
    grads = [b.grad_data for b in buffers]
    weights = _storage_bytes(parameters)
    return States(
        sum(weights.values()),
        sum(_storage_bytes(grads).values()),
        sum(n for key, n in _storage_bytes(state).items() if key not in weights),
    )


def _storage_bytes(tensors) -> dict[int, int]:
    """Bytes of each storage behind the tensors, views counted once."""
    found = (tensor.untyped_storage() for tensor in tensors if torch.is_tensor(tensor))
    return {storage.data_ptr(): storage.nbytes() for storage in found if storage.nbytes()}
