"""What tests use to run on several ranks: megatron_ext/mesh/forks.py, and ports for ranks that
start their process group more than once (gloo keeps the addresses of a dead group in its store).
"""

import contextlib
import os
import random
import socket
from collections.abc import Callable, Iterator
from typing import Any

from megatron_ext.mesh import forks
from megatron_ext.mesh.forks import RanksFailedError, free_port

__all__ = ["RanksFailedError", "exit_codes", "free_port", "next_port", "run_ranks", "start_ranks"]
PORTS = "PRETRAIN_MOE_TEST_PORTS"


def _free_ports(count: int) -> list[str]:
    """Ports that nobody listens on, below those that the kernel gives to connections."""
    found: list[str] = []
    for port in random.Random(os.urandom(8)).sample(range(10_000, 32_000), 4 * count):
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
        found.append(str(port))
        if len(found) == count:
            break
    return found


@contextlib.contextmanager
def _ports() -> Iterator[None]:
    os.environ[PORTS] = " ".join(_free_ports(64))
    try:
        yield
    finally:
        del os.environ[PORTS]


def start_ranks(function: Callable, world_size: int, *args: Any):
    """forks.start_ranks, whose ranks may ask for the `next_port`."""
    with _ports():
        return forks.start_ranks(function, world_size, *args)


def run_ranks(function: Callable, world_size: int, *args: Any, timeout_s: float = 120) -> list[Any]:
    """forks.run_ranks, whose ranks may ask for the `next_port`."""
    with _ports():
        return forks.run_ranks(function, world_size, *args, timeout_s=timeout_s)


def exit_codes(
    function: Callable, world_size: int, *args: Any, timeout_s: float = 120
) -> list[int | None]:
    """forks.exit_codes, whose ranks may ask for the `next_port`."""
    with _ports():
        return forks.exit_codes(function, world_size, *args, timeout_s=timeout_s)


def next_port() -> str:
    """The port of this rank's next process group: the same on all ranks that ask equally often."""
    port, *rest = os.environ[PORTS].split()
    os.environ[PORTS] = " ".join(rest)
    return port
