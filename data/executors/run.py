"""Runs the stages of a job one after the other and says which shards are done."""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path

from loguru import logger

from data.documents import Piece
from data.executors.blocks import write_plan
from data.executors.cluster import failure_path, make_executor
from data.executors.flags import Asked
from data.executors.slurm import run_on_slurm
from data.executors.stages import Stage, stages_of
from data.shards import Recipe, ShardFacts, facts_path, finished_shards, parse_facts
from data.storage import read_json, require_space
from data.tokenizer import Tokenizer
from data.workers import INPUT_BYTES_PER_ID_BYTE
from megatron_ext import errors
from megatron_ext.errors import DataError, Fatal


def run_shards_on(
    asked: Asked, recipe: Recipe, plan: list[list[Piece]], tokenizer: Tokenizer, flags: Namespace
) -> tuple[list[ShardFacts], int]:
    """Facts of all shards in order, and how many were finished by an earlier run.

    Args:
        flags: the command line, from which each task loads its own tokenizer.
    """
    logger.remove()  # datatrove's log goes to its files
    done = finished_shards(recipe.folder)
    waiting = [shard for shard in range(len(plan)) if shard not in done]
    size = sum(piece.size for shard in waiting for piece in plan[shard])
    require_space(recipe.folder, size // INPUT_BYTES_PER_ID_BYTE)
    if done:
        print(f"resume: {len(done)} of {len(plan)} shards are finished", file=sys.stderr)
    stages = stages_of(asked, recipe, len(plan), flags, tokenizer.fingerprint)
    if waiting:
        write_plan(recipe.folder, plan)
        mark(recipe.folder / "logs" / stages[-1].name, set(done))
        for number, stage in enumerate(stages, 1):
            run_stage(asked, stage, recipe.folder / "logs" / stage.name, f"{number}/{len(stages)}")
    for shard in waiting:
        text = facts_path(recipe.folder, shard).read_text()
        facts = parse_facts(text)
        assert facts is not None, f"facts are renamed into place: {text}"
        done[shard] = facts
    return [done[shard] for shard in range(len(plan))], len(plan) - len(waiting)


def mark(logs: Path, done: set[int]) -> None:
    """Makes datatrove's completions say what the files of the shards say."""
    folder = logs / "completions"
    folder.mkdir(parents=True, exist_ok=True)
    for marker in folder.iterdir():
        if int(marker.name) not in done:
            marker.unlink()
    for shard in done:
        (folder / f"{shard:05d}").touch()


def run_stage(asked: Asked, stage: Stage, logs: Path, place: str) -> None:
    """One stage to its end; raises where a task did not finish."""
    executor = make_executor(asked, stage, logs)

    def show() -> None:
        left = len(executor.get_incomplete_ranks())
        if sys.stderr.isatty():
            text = f"\r{place} {stage.name}: {stage.tasks - left} of {stage.tasks} tasks "
            print(text, end="", file=sys.stderr, flush=True)

    show()
    if asked.executor == "slurm":
        run_on_slurm(executor, logs, show)
    else:
        executor.run()
        show()
    left = executor.get_incomplete_ranks()
    if left:
        raise failure_of(stage, logs, left)


def failure_of(stage: Stage, logs: Path, left: list[int]) -> Fatal:
    """What the first task that did not finish says, or where its log is."""
    said = [read_json(failure_path(logs, rank)) for rank in left]
    for facts in filter(None, said):
        kind = getattr(errors, facts["kind"], DataError)
        return kind(facts["what"], do=facts["do"], path=facts["path"])
    log = logs / "logs" / f"task_{left[0]:05d}.log"
    folder = log if log.exists() else logs
    return Fatal(
        f"{len(left)} of {stage.tasks} tasks of {stage.name} did not finish (first: {left[0]})",
        do="read the log; the same command goes on with what is missing",
        path=folder,
    )
