"""Start the process group and megatron-core's parallel groups for a layout; stop them again.

The sizes come from `ParallelSection`, the order from `layout.py`; megatron-core builds the groups
(its parallel_state stays the one owner of them) and `tests/mesh` holds the two against each other.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import random
from collections.abc import Iterator

import numpy as np
import torch

from megatron_ext.device import Device
from megatron_ext.errors import ConfigError, RendezvousError
from megatron_ext.mesh import rank_order
from megatron_ext.mesh.attempt import store_prefix
from megatron_ext.mesh.gloo_collectives import faster

STORE_FD = "PRETRAIN_MOE_STORE_FD"
"""Environment variable: the listening socket that rank 0 has from its launcher."""


def _read_environment() -> tuple[int, int]:
    """(rank, world size) by torchrun's variables, else srun's, else one rank; fills torchrun's
    names for torch. Raises ConfigError where they do not fit together.
    """
    env = os.environ
    for name, slurm, alone in (
        ("RANK", "SLURM_PROCID", "0"),
        ("WORLD_SIZE", "SLURM_NTASKS", "1"),
        ("LOCAL_RANK", "SLURM_LOCALID", "0"),
    ):
        env.setdefault(name, env.get(slurm, alone) if "MASTER_ADDR" in env else alone)
    if not (env["RANK"].isdecimal() and env["WORLD_SIZE"].isdecimal()) or not (
        int(env["RANK"]) < int(env["WORLD_SIZE"])
    ):
        raise ConfigError(
            f"RANK={env['RANK']} of the environment is no rank of WORLD_SIZE={env['WORLD_SIZE']}",
            do="unset RANK WORLD_SIZE LOCAL_RANK (did another launch leave them in this shell?),"
            " or start with torchrun or launch/run.sh",
        )
    rank_order.apply(env)
    return int(env["RANK"]), int(env["WORLD_SIZE"])


def _store(rank: int, world_size: int, timeout: datetime.timedelta):
    """The key-value store where the ranks meet, under a prefix of this attempt.

    Rank 0 serves it, on the socket that the launcher has opened (STORE_FD) or on MASTER_PORT; under
    torchrun its agent does.
    """
    env = os.environ
    if world_size == 1 and "MASTER_ADDR" not in env:
        return torch.distributed.HashStore()
    has_agent_store = env.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    descriptor = env.get(STORE_FD) if rank == 0 else None
    store = torch.distributed.TCPStore(
        env["MASTER_ADDR"],
        int(env["MASTER_PORT"]),
        world_size,
        is_master=rank == 0 and not has_agent_store,
        timeout=timeout,
        wait_for_workers=False,
        multi_tenant=descriptor is None,
        master_listen_fd=None if descriptor is None else int(descriptor),
    )
    return torch.distributed.PrefixStore(store_prefix(), store)


def _meet(store, rank: int, world_size: int) -> None:
    """Return when all ranks are here; torch's error otherwise, after the store's timeout."""
    store.set(f"rank_{rank}", "here")
    store.wait([f"rank_{other}" for other in range(world_size)])


def _start_process_group(
    device: Device, timeout: datetime.timedelta, patience: datetime.timedelta
) -> None:
    """`timeout` of collectives; `patience`: how long the ranks may take to arrive."""
    rank, world_size = _read_environment()
    try:
        store = _store(rank, world_size, patience)
        _meet(store, rank, world_size)
        store.set_timeout(timeout)
        torch.distributed.init_process_group(
            device.backend, store=store, rank=rank, world_size=world_size, timeout=timeout
        )
    except (RuntimeError, ValueError, KeyError, torch.distributed.DistError) as error:
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise RendezvousError(
            f"rank {rank} of {world_size} could not join {address}: {_first_sentence(error)}",
            do="check MASTER_ADDR and MASTER_PORT (a port in use? try --master-port 0 with"
            " --rdzv-backend c10d), and that every rank was started",
        ) from error


def _first_sentence(error: Exception) -> str:
    """torch's errors go on for lines, with the frames of its own stack."""
    return str(error).split("\n")[0].split("Exception raised from")[0][:300]


def _check_world_size(asked: int) -> None:
    started = torch.distributed.get_world_size()
    if asked != started:
        raise ConfigError(
            f"--world-size {asked}, but {started} ranks were started",
            do=f"leave it out, or start {asked} ranks: torchrun --nproc-per-node {asked} ...",
        )


@contextlib.contextmanager
def process_groups(
    parallel, device: Device, seed: int, cp_levels: list[int] | None = None
) -> Iterator[None]:
    """The groups of `parallel` (cfg.parallel) on all ranks; destroyed on the way out, also after an
    error.

    Seeds megatron-core's random trackers. `cp_levels`: --hierarchical-context-parallel-sizes, whose
    groups Transformer Engine's attention uses. Errors: RendezvousError (69) when the ranks do not
    find each other.
    """
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    timeout = datetime.timedelta(minutes=parallel.distributed_timeout_minutes)
    patience = datetime.timedelta(seconds=parallel.rendezvous_timeout_s)
    _start_process_group(device, timeout, patience)
    try:
        _check_world_size(parallel.world_size)
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tensor_model_parallel_size,
            pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
            virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
            context_parallel_size=parallel.context_parallel_size,
            hierarchical_context_parallel_sizes=cp_levels,
            expert_model_parallel_size=parallel.expert_model_parallel_size,
            expert_tensor_parallel_size=parallel.expert_tensor_parallel_size,
            num_distributed_optimizer_instances=parallel.num_distributed_optimizer_instances,
            distributed_timeout_minutes=parallel.distributed_timeout_minutes,
            order="tp-cp-ep-pp-dp" if parallel.use_tp_pp_dp_mapping else "tp-cp-ep-dp-pp",
            create_gloo_process_groups=parallel.enable_gloo_process_groups,
        )
        dp_rank = parallel_state.get_data_parallel_rank()
        pp_rank = parallel_state.get_pipeline_model_parallel_rank()
        random.seed(seed + 100 * pp_rank)
        np.random.seed(seed + 100 * pp_rank)
        model_parallel_cuda_manual_seed(seed + 100 * pp_rank, force_reset_rng=True)
        if device.kind == "cpu":  # dropout draws from torch's own stream: another one per replica
            torch.manual_seed(seed + 100 * pp_rank + 10_000 * dp_rank)
        kind = parallel.gloo_collectives if device.backend == "gloo" else "plain"
        with faster(kind, timeout.total_seconds()):
            yield
    finally:
        stop()


def stop() -> None:
    """Destroy all groups, so that a rank's own exit code survives (gloo otherwise may abort at
    exit).
    """
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
