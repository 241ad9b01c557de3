"""Programs for ranks: train the tiny model and let one rank hang in a chosen way after a few steps.

The fault wraps a function by name, before training starts; the product has no hook for it.
"""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

import torch

import data.loader
from megatron_ext.train import loop
from tests.ranks.tiny import pretrain

HANG_AT = 4
"""The step in which the fault happens."""


def stop_process() -> None:
    """SIGSTOP, as a frozen machine or a debugger would."""
    os.kill(os.getpid(), signal.SIGSTOP)


def hold_gil() -> None:
    """A regular expression that needs longer than the universe has lived, and holds the GIL."""
    re.match(r"(a?){40}a{40}", "a" * 40)


def sleep_in_loader() -> None:
    """A file system that does not answer."""
    time.sleep(600)


def skip_collective() -> None:
    """Leave out the next all_reduce of this rank with others, once."""
    stock = torch.distributed.all_reduce

    def skip(tensor, *args, group=None, **kwargs):
        if torch.distributed.get_world_size(group) == 1:
            return stock(tensor, *args, group=group, **kwargs)
        torch.distributed.all_reduce = stock
        return None

    torch.distributed.all_reduce = skip


FAULTS = {
    "stop": stop_process,
    "gil": hold_gil,
    "loader": sleep_in_loader,
    "skip": skip_collective,
}


def train_and_hang(fault: str, victim: int, flags: list[str]) -> None:
    """Train; in step HANG_AT the loader of rank `victim` does `fault` when asked for a batch."""
    stock, calls = data.loader.MicroBatches.__next__, []

    def next_batch(self):
        calls.append(time.time())
        if len(calls) == HANG_AT and int(os.environ["RANK"]) == victim:
            FAULTS[fault]()
        return stock(self)

    loop.MicroBatches.__next__ = next_batch
    pretrain(flags)


def train_slowly(flags: list[str], victim: int, from_step: int, late_s: float) -> None:
    """Train; from a step on the victim needs `late_s` more a step. Stops when somebody is named."""
    stock = loop.train_step
    metrics = Path(flags[flags.index("--run-dir") + 1]) / "metrics.jsonl"

    def slow(state, micro_batches, settings, stop, *args, **kwargs):
        if state.progress.step >= from_step and int(os.environ["RANK"]) == victim:
            time.sleep(late_s)

        def is_named() -> tuple[bool, bool]:
            return False, "straggler_rank" in metrics.read_text()

        return stock(state, micro_batches, settings, is_named, *args, **kwargs)

    loop.train_step = slow
    pretrain(flags)
