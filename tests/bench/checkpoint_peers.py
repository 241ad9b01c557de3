"""What checkpoint.py compares with: torch.distributed.checkpoint and megatron-core's own save."""

from __future__ import annotations

import multiprocessing
import shutil
import time
from pathlib import Path

import torch

_MCORE_LIMIT_S = 60


def dcp_save(tensors: list[torch.Tensor], folder: Path, group) -> dict[str, float]:
    """torch.distributed.checkpoint.async_save of the same tensors (each rank its own names)."""
    import torch.distributed.checkpoint as dcp

    rank = torch.distributed.get_rank()
    state = {f"{rank}.{i}": t for i, t in enumerate(tensors)}
    begin = time.perf_counter()
    future = dcp.async_save(state, checkpoint_id=str(folder / "dcp"), process_group=group)
    call = time.perf_counter() - begin
    future.result()
    shutil.rmtree(folder / "dcp", ignore_errors=True)
    return {"DCP async_save blocking": call, "DCP until written": time.perf_counter() - begin}


def _mcore(run, folder: Path) -> dict[str, float]:
    """megatron-core's own async save of weights and optimizer states: torch_dist, one writing
    process.

    It forks children, which multiprocessing refuses to a daemonic process: what the harness's ranks
    are, and no rank of a launcher is. Its children want psutil for a debug line only, and without
    it the parent waits for ever.
    """
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

    from megatron_ext.checkpoint import state as parts

    multiprocessing.current_process()._config["daemon"] = False
    filesystem_async._process_memory = lambda: 0
    target, queue = folder / "mcore", AsyncCallsQueue()
    if torch.distributed.get_rank() == 0:
        target.mkdir()
    torch.distributed.barrier()
    begin = time.perf_counter()
    model = parts.sharded_model(run.state.chunks)
    states = parts.sharded_optimizer(run.state.optimizer, model)[0]
    request = dist_checkpointing.save(
        {"model": model[0], "optimizer": dict(enumerate(states))},
        str(target),
        TorchDistSaveShardedStrategy("torch_dist", 1),
        async_sharded_save=True,
        validate_access_integrity=False,
    )
    queue.schedule_async_request(request)
    call = time.perf_counter() - begin
    while not queue.maybe_finalize_async_calls():
        if time.perf_counter() - begin > _MCORE_LIMIT_S:
            queue.close(abort=True)
            raise TimeoutError(f"not finished after {_MCORE_LIMIT_S} s")
        time.sleep(0.01)
    found = {"mcore async blocking": call, "mcore until written": time.perf_counter() - begin}
    queue.close()
    torch.distributed.barrier()
    shutil.rmtree(target, ignore_errors=True)
    return found


def _end_its_manager() -> None:
    """The process of its queue of results, which would outlive a rank that ends by os._exit."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    queue, filesystem_async._results_queue = filesystem_async._results_queue, None
    if queue is not None:
        queue._manager.shutdown()


def try_mcore(run, folder: Path) -> tuple[dict[str, float], str]:
    """Its figures, or none and why it does not run."""
    try:
        return _mcore(run, folder), ""
    except Exception as error:  # whatever it raises is the finding
        return {}, f"does not run here: {type(error).__name__}: {str(error)[:160]}"
    finally:
        _end_its_manager()
