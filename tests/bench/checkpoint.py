"""How long a save stops training, and how fast it reaches the disk, beside what else there is.

    python -m tests.bench checkpoint --ranks 2 --rounds 5 --hidden 512 --folder /some/disk

Every round takes all measurements in turn on the same state and disk; shown are medians over the
rounds, of the slowest rank. Blocking is what a save adds to the loop: the call itself and, for a
lazy one, the wait before the next update.
"""

from __future__ import annotations

import argparse
import mmap
import multiprocessing
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch

from tests.checkpoint.small_run import checkpointer, small_run
from tests.ranks.harness import run_ranks

_BLOCK = 16 << 20
_MCORE_LIMIT_S = 60


def _timed(action) -> float:
    begin = time.perf_counter()
    action()
    return time.perf_counter() - begin


def _tensors(run) -> list[torch.Tensor]:
    """All weights and optimizer states of this rank, as a plain list."""
    found = [p.data for chunk in run.state.chunks for p in chunk.parameters()]
    for leaf in getattr(run.state.optimizer, "chained_optimizers", [run.state.optimizer]):
        states = leaf.optimizer.state.values()
        found += [v for state in states for v in state.values() if v.numel() > 1]
    return found


def _copy(tensors: list[torch.Tensor], buffers: list[torch.Tensor]) -> float:
    return _timed(lambda: [b.copy_(t) for b, t in zip(buffers, tensors)])


def _direct(path: Path, num_bytes: int) -> float:
    """Seconds of O_DIRECT writes of this many bytes and fsync."""
    memory = mmap.mmap(-1, _BLOCK)
    memory.write(os.urandom(_BLOCK))

    def write() -> None:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_DIRECT)
        for _ in range(-(-num_bytes // _BLOCK)):
            os.write(descriptor, memory)
        os.fsync(descriptor)
        os.close(descriptor)

    seconds = _timed(write)
    path.unlink()
    return seconds


def _async(run, saver) -> dict[str, float]:
    """One lazy save with training going on until it is durable."""
    waits, gaps, total = [], [], time.perf_counter()
    call = _timed(lambda: saver.save(run.state))
    inner = run.state.before_update
    run.state.before_update = lambda: waits.append(_timed(inner))
    while not saver.poll():
        gaps.append(_timed(run.step))
    run.state.before_update = inner
    return {
        "lazy blocking": call + (waits[0] if waits else 0.0),
        "lazy save() alone": call,
        "lazy until durable": time.perf_counter() - total,
        "step in flight": statistics.median(gaps) if gaps else float("nan"),
    }


def _quiet(run, saver) -> dict[str, float]:
    """The same save while nothing else runs: what the writer reaches."""
    begin = time.perf_counter()
    saver.save(run.state)
    saver.poll(blocking=True)
    return {"save without training until durable": time.perf_counter() - begin}


def _dcp(run, folder: Path, group) -> dict[str, float]:
    """torch.distributed.checkpoint.async_save of the same tensors (each rank its own names)."""
    import torch.distributed.checkpoint as dcp

    rank = torch.distributed.get_rank()
    state = {f"{rank}.{i}": t for i, t in enumerate(_tensors(run))}
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


def _try_mcore(run, folder: Path) -> tuple[dict[str, float], str]:
    try:
        return _mcore(run, folder), ""
    except Exception as error:  # whatever it raises is the finding
        return {}, f"does not run here: {type(error).__name__}: {str(error)[:160]}"


def _measure(flags: str, rounds: int, folder: Path) -> tuple[dict[str, list[float]], int, str]:
    """All rounds on one rank: name -> seconds; bytes; why megatron-core's save does not run."""
    found: dict[str, list[float]] = {}
    problem = ""

    def keep(values: dict[str, float]) -> None:
        for name, value in values.items():
            found.setdefault(name, []).append(value)

    with small_run(flags) as run, checkpointer(folder / "ours", async_save=True) as saver:
        with checkpointer(folder / "sync") as plain:
            run.steps(3)
            tensors = _tensors(run)
            buffers = [torch.empty_like(t) for t in tensors]
            num_bytes = sum(t.numel() * t.element_size() for t in tensors)
            _copy(tensors, buffers)
            _async(run, saver)
            group = torch.distributed.new_group(backend="gloo")
            for _ in range(rounds):
                torch.distributed.barrier()
                keep({"step": statistics.median(_timed(run.step) for _ in range(3))})
                keep({"plain copy": _copy(tensors, buffers)})
                saver._wait_for(2)
                keep(_async(run, saver))
                saver._wait_for(2)
                keep(_quiet(run, saver))
                saver._wait_for(2)
                torch.distributed.barrier()
                path = folder / f"direct_{torch.distributed.get_rank()}"
                keep({"O_DIRECT + fsync": _direct(path, num_bytes)})
                keep({"synchronous save": _timed(lambda: plain.save(run.state))})
                plain._wait_for(2)
                keep(_dcp(run, folder, group))
                values, problem = ({}, problem) if problem else _try_mcore(run, folder)
                keep(values)
                for name in ("ours", "sync"):
                    for old in sorted((folder / name).glob("step_*"))[:-1]:
                        shutil.rmtree(old, ignore_errors=True)
            return found, num_bytes, problem


def main(argv: list[str]) -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench checkpoint", description=__doc__)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--folder", type=Path, help="on the disk to measure; default: TMPDIR")
    asked = parser.parse_args(argv)
    h = asked.hidden
    flags = (
        f"--hidden-size {h} --ffn-hidden-size {4 * h} --moe-ffn-hidden-size {2 * h}"
        f" --moe-shared-expert-intermediate-size {h} --num-attention-heads 8"
        " --use-distributed-optimizer --bf16"
    )
    folder = Path(tempfile.mkdtemp(prefix="bench-", dir=asked.folder))
    try:
        results = run_ranks(_measure, asked.ranks, flags, asked.rounds, folder, timeout_s=900)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    _show(results)


def _show(results: list) -> None:
    size = results[0][1]
    medians = {
        name: max(statistics.median(found[name]) for found, _, _ in results)
        for name in results[0][0]
    }
    print(f"{len(results)} ranks, {size / 2**20:.0f} MiB a rank, medians, slowest rank")
    for name, seconds in medians.items():
        print(f"{name:38} {seconds:9.4f} s   {size / seconds / 1e9:7.2f} GB/s")
    if results[0][2]:
        print(f"{'megatron-core async save':38} {results[0][2]}")
    print(
        f"blocking / plain copy: {_ratio(results, 'lazy blocking', 'plain copy'):.2f} (target 1.25)"
    )
    quiet = "save without training until durable"
    print(f"persist / O_DIRECT: {_ratio(results, 'O_DIRECT + fsync', quiet):.2f} (target 0.7)")
    slower = _ratio(results, "step in flight", "step")
    cores = len(os.sched_getaffinity(0))
    print(f"step in flight / step: {slower:.2f} ({cores} cores, {len(results)} ranks,", end=" ")
    print(f"load average {os.getloadavg()[0]:.1f}; target 1.05 with a free core)")


def _ratio(results: list, above: str, below: str) -> float:
    """Median over the rounds of the quotient within a round, which other work on the machine hits
    alike; of the worst rank's.
    """
    return max(
        statistics.median(a / b for a, b in zip(found[above], found[below]))
        for found, _, _ in results
    )
