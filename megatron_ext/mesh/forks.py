"""Ranks forked from one process that has imported torch and megatron-core, so that a rank starts in
milliseconds: what the tests and the parity check run on.

    losses = run_ranks(train_a_little, 4, {"tp": 2})   # [result of rank 0, ..., of rank 3]

Each rank has torchrun's environment variables, one thread, and megatron-core lifted to the CPU. A
rank that raises fails the call with its traceback; a rank that hangs is killed after `timeout_s`
and named. gloo only: a CUDA context does not survive a fork.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

_FORK = multiprocessing.get_context("fork")


class RanksFailedError(AssertionError):
    """Some ranks raised, exited or hung; the text names them."""


def free_port() -> int:
    """A TCP port of the loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _rank_main(
    function: Callable, rank: int, world_size: int, port: int, args: tuple, pipe: Connection
) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
    )
    torch.set_num_threads(1)
    code = 0
    try:
        pipe.send((True, function(*args)))
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
        pipe.send((True, None) if not code else (False, f"exit code {code}"))
    except BaseException:
        code = 1
        pipe.send((False, traceback.format_exc()))
    pipe.close()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def start_ranks(function: Callable, world_size: int, *args: Any):
    """The started processes and their result pipes."""
    port = free_port()
    processes, pipes = [], []
    for rank in range(world_size):
        receiver, sender = _FORK.Pipe(duplex=False)
        process = _FORK.Process(
            target=_rank_main, args=(function, rank, world_size, port, args, sender), daemon=True
        )
        process.start()
        sender.close()
        processes.append(process)
        pipes.append(receiver)
    return processes, pipes


def run_ranks(function: Callable, world_size: int, *args: Any, timeout_s: float = 120) -> list[Any]:
    """Call `function(*args)` on `world_size` ranks; their results in rank order. Raises
    RanksFailedError.

    Results travel through a pipe: return numbers, lists or numpy arrays, not tensors (they would
    share memory with a process that is gone).
    """
    processes, pipes = start_ranks(function, world_size, *args)
    deadline = time.monotonic() + timeout_s
    results: dict[int, Any] = {}
    failures: dict[int, str] = {}
    open_pipes = {pipe: rank for rank, pipe in enumerate(pipes)}
    try:
        while open_pipes and not failures and time.monotonic() < deadline:
            for pipe in wait(list(open_pipes), timeout=0.2):
                rank = open_pipes.pop(pipe)
                try:
                    ok, value = pipe.recv()
                except EOFError:
                    ok, value = False, f"died with exit code {processes[rank].exitcode}"
                (results if ok else failures)[rank] = value
        if failures:
            time.sleep(0.5)
        elif open_pipes:
            failures = {rank: f"no result after {timeout_s} s" for rank in open_pipes.values()}
    finally:
        for process in processes:
            if failures:
                process.kill()
            process.join()
    if failures:
        raise RanksFailedError(
            "\n".join(f"rank {rank}: {text}" for rank, text in sorted(failures.items()))
        )
    return [results[rank] for rank in range(world_size)]


def exit_codes(
    function: Callable, world_size: int, *args: Any, timeout_s: float = 120
) -> list[int | None]:
    """The exit code of each rank of `function(*args)`; None for one that had to be killed."""
    processes, _ = start_ranks(function, world_size, *args)
    deadline = time.monotonic() + timeout_s
    for process in processes:
        process.join(max(0.1, deadline - time.monotonic()))
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
        process.join()
    return codes
