"""Start the process group and megatron-core's parallel groups for a layout; stop them again.

The sizes come from `ParallelSection`, the order from `layout.py`; megatron-core builds the groups
(its parallel_state stays the one owner of them) and `tests/mesh` holds the two against each other.
"""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Iterator

import torch

from megatron_ext.device import Device
from megatron_ext.errors import ConfigError, RendezvousError


def _read_environment() -> tuple[int, int]:
    """(rank, world size) by torchrun's variables, else srun's, else one rank; fills torchrun's
    names for torch.
    """
    env = os.environ
    for name, slurm, alone in (
        ("RANK", "SLURM_PROCID", "0"),
        ("WORLD_SIZE", "SLURM_NTASKS", "1"),
        ("LOCAL_RANK", "SLURM_LOCALID", "0"),
    ):
        env.setdefault(name, env.get(slurm, alone) if "MASTER_ADDR" in env else alone)
    return int(env["RANK"]), int(env["WORLD_SIZE"])


def _start_process_group(device: Device, timeout: datetime.timedelta) -> None:
    rank, world_size = _read_environment()
    try:
        if world_size == 1 and "MASTER_ADDR" not in os.environ:
            store = torch.distributed.HashStore()
            torch.distributed.init_process_group(
                device.backend, store=store, rank=0, world_size=1, timeout=timeout
            )
        else:
            torch.distributed.init_process_group(
                device.backend, rank=rank, world_size=world_size, timeout=timeout
            )
    except (RuntimeError, ValueError, torch.distributed.DistError) as error:
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise RendezvousError(
            f"rank {rank} of {world_size} could not join {address}: {error}",
            do="check MASTER_ADDR and MASTER_PORT (a port in use? try --master-port 0 with"
            " --rdzv-backend c10d), and that every rank was started",
        ) from error


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
    _start_process_group(device, timeout)
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
        model_parallel_cuda_manual_seed(seed + 100 * pp_rank, force_reset_rng=True)
        if device.kind == "cpu":  # dropout draws from torch's own stream: another one per replica
            torch.manual_seed(seed + 100 * pp_rank + 10_000 * dp_rank)
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
