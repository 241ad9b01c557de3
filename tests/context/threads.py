"""All ranks of a context-parallel group as threads of one process: any size, no start-up.

`ThreadExchange` has the interface of `context.Exchange`, with a queue per ordered pair of ranks.
"""

from __future__ import annotations

import queue
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

TIMEOUT_S = 20


class _Pending:
    def __init__(self, receives) -> None:
        self.receives = receives

    def wait(self) -> None:
        for channel, tensor in self.receives:
            sent = channel.get(timeout=TIMEOUT_S)
            assert sent.shape == tensor.shape and sent.dtype == tensor.dtype
            tensor.copy_(sent)


class ThreadExchange:
    """What rank `rank` sends and receives through `channels[source, target]`."""

    def __init__(self, rank: int, size: int, channels: dict) -> None:
        self.rank, self.size, self.channels = rank, size, channels

    def start(self, sends, receives) -> _Pending:
        for peer, tensor in sends:
            assert tensor.is_contiguous() and peer != self.rank
            self.channels[self.rank, peer].put(tensor.clone())
        assert all(tensor.is_contiguous() for _, tensor in receives)
        return _Pending([(self.channels[peer, self.rank], tensor) for peer, tensor in receives])


def on_threads(function: Callable[[ThreadExchange], Any], size: int) -> list[Any]:
    """[function(exchange of rank 0), ...]; asserts that everything sent was received."""
    channels = {(a, b): queue.Queue() for a in range(size) for b in range(size)}
    exchanges = [ThreadExchange(rank, size, channels) for rank in range(size)]
    with ThreadPoolExecutor(size) as pool:
        results = list(pool.map(function, exchanges))
    assert all(channel.empty() for channel in channels.values()), "something was not received"
    torch.set_num_threads(1)
    return results
