"""Runs shards on processes that end with their parent, and shows how far they are."""

from __future__ import annotations

import os
import sys
import threading
import time
from argparse import Namespace
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context

from data.documents import Piece
from data.shards import Recipe, ShardFacts, append_to_journal, finished_shards, write_shard
from data.storage import require_space
from data.tokenizer import Tokenizer, tokenizer_of
from megatron_ext.errors import ResourceError

PARENT_CHECK_S = 1.0
INPUT_BYTES_PER_ID_BYTE = 4
"""The least space that ids take for English text: a refusal before the work, not an estimate."""


def run_shards(
    recipe: Recipe, plan: list[list[Piece]], tokenizer: Tokenizer, args: Namespace
) -> tuple[list[ShardFacts], int]:
    """Facts of all shards in order, and how many were finished by an earlier run.

    The others run on ``args.workers`` processes.

    Args:
        args: the command line, from which each worker loads its own tokenizer.
    """
    done = finished_shards(recipe.folder)
    open_shards = [shard for shard in range(len(plan)) if shard not in done]
    open_bytes = sum(piece.size for shard in open_shards for piece in plan[shard])
    require_space(recipe.folder, open_bytes // INPUT_BYTES_PER_ID_BYTE)
    progress = Progress(len(plan), done)
    for facts in (
        _run_here(recipe, plan, open_shards, tokenizer)
        if args.workers == 1
        else _run_pool(recipe, plan, open_shards, args)
    ):
        append_to_journal(recipe.folder, facts)
        done[facts.shard] = facts
        progress.show()
    progress.end()
    return [done[shard] for shard in range(len(plan))], len(plan) - len(open_shards)


def _run_here(
    recipe: Recipe, plan: list[list[Piece]], open_shards: list[int], tokenizer: Tokenizer
) -> Iterator[ShardFacts]:
    """Shards one after the other in this process."""
    for shard in open_shards:
        yield write_shard(recipe, shard, plan[shard], tokenizer)


def _run_pool(
    recipe: Recipe, plan: list[list[Piece]], open_shards: list[int], args: Namespace
) -> Iterator[ShardFacts]:
    """Shards as worker processes finish them."""
    workers = min(args.workers, max(1, len(open_shards)))
    pool = ProcessPoolExecutor(workers, get_context("spawn"), Worker.start, (args, os.getpid()))
    try:
        tasks = [pool.submit(Worker.run, recipe, shard, plan[shard]) for shard in open_shards]
        for task in as_completed(tasks):
            yield task.result()
    except BrokenProcessPool:
        raise ResourceError(
            "a worker process died (killed, or out of memory)",
            do="run the same command again (finished shards are kept), with fewer --workers or "
            "a lower --max-document-bytes if memory is short",
            path=recipe.folder,
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


class Worker:
    """The state of one worker process: its tokenizer, loaded once."""

    tokenizer: Tokenizer

    @classmethod
    def start(cls, args: Namespace, parent: int) -> None:
        """Loads the tokenizer; the process ends with its parent, also when that is killed."""
        end_with_parent(parent)
        cls.tokenizer = tokenizer_of(args)

    @classmethod
    def run(cls, recipe: Recipe, shard: int, pieces: list[Piece]) -> ShardFacts:
        """One shard."""
        return write_shard(recipe, shard, pieces, cls.tokenizer)


def end_with_parent(parent: int) -> None:
    """From now on this process ends soon after process ``parent``, also when that is killed."""
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    """Ends this process soon after ``parent`` has gone."""
    while os.getppid() == parent:
        time.sleep(PARENT_CHECK_S)
    os._exit(1)


class Progress:
    """A line that counts shards, on a terminal only."""

    def __init__(self, total: int, done: dict[int, ShardFacts]):
        self.total, self.done, self.started = total, done, time.monotonic()
        self.kept = len(done)
        if self.kept:
            print(f"resume: {self.kept} of {total} shards are finished", file=sys.stderr)

    def show(self) -> None:
        """Draws the line again."""
        if not sys.stderr.isatty():
            return
        finished = len(self.done)
        tokens = sum(facts.tokens for facts in self.done.values())
        rate = (finished - self.kept) / max(1e-9, time.monotonic() - self.started)
        left_s = (self.total - finished) / max(1e-9, rate)
        bar = "#" * (30 * finished // self.total)
        print(
            f"\r[{bar:<30}] {finished}/{self.total} shards, "
            f"{tokens / 1e6:.1f} Mtokens, {left_s:.0f} s left ",
            end="",
            file=sys.stderr,
            flush=True,
        )

    def end(self) -> None:
        """Leaves the line."""
        if sys.stderr.isatty():
            print(file=sys.stderr)
