"""One rank of a replay: the parts of pretrain_moe.py without folders, lease and saves."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state

from megatron_ext.checkpoint import Checkpointer, folder, loader
from megatron_ext.checkpoint.fingerprint import fingerprint, free_to_change
from megatron_ext.config import RunConfig
from megatron_ext.device import Device
from megatron_ext.errors import DataError, Fatal, NumericError
from megatron_ext.mesh.agree import agree, first_rank
from megatron_ext.model.gpt import build_chunks, vocabulary, wrap_for_training
from megatron_ext.observe import run_dir
from megatron_ext.optim.build import build_optimizer, build_scheduler
from megatron_ext.replay import batch
from megatron_ext.replay.records import COMPARED
from megatron_ext.resilience.guard import Guard
from megatron_ext.train import setup
from megatron_ext.train.loop import Run, steps_again
from megatron_ext.train.stop import StopRequest

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Asked:
    """What to replay: step `step` of `run`, in the folder `scratch`; `from_start`: from the initial
    weights, without a checkpoint.
    """

    run: Path
    step: int
    scratch: Path
    from_start: bool = False


@dataclass(frozen=True)
class Replayed:
    """The same on all ranks: step -> the compared values, the batch of the step asked for, where
    the weights came from, and why the step did not end, where it did not.
    """

    source: str
    steps: dict[int, dict[str, Any]]
    lines: list[str]
    problem: str | None = None


@dataclass(frozen=True)
class _Noting(Guard):
    """A guard that keeps this rank's share of one step: what its first attempt gave."""

    wanted: int = 0
    shares: list[batch.Share] = field(default_factory=list)

    def settle(self, attempt: Callable, step: int, chunks: Any, optimizer: Any, batches: Sequence):
        def noted():
            made = attempt()
            if step == self.wanted and not self.shares:
                self.shares.append(batch.share(made.reports, batches))
            return made

        return super().settle(noted, step, chunks, optimizer, batches)


def load_before(cfg: RunConfig, state: Any, asked: Asked, content: dict[str, Any]) -> str:
    """Fill `state` from the newest checkpoint before the step asked for whose every byte is right;
    its path. Nothing is moved aside. Collective. Raises DataError where there is none, Misfit where
    it is of other flags or files (`content`).
    """
    if asked.from_start:
        return "the initial weights"
    save = run_dir.places(cfg, str(asked.run)).save
    found = first_rank(lambda: [one for one in folder.steps(save) if one < asked.step])
    same = loader.ThisRun(fingerprint(cfg), free_to_change(cfg), content=content)
    for step in found:
        path = save / folder.step_name(step)
        try:
            loader.load(path, state, optimizer=True, random=True, counters=True, run=same)
            return str(path)
        except Fatal as error:
            if error.code != DataError.code:
                raise
            if error.lines():
                _log.warning("%s; trying an older one", error)

    def refuse() -> None:
        raise DataError(
            f"no whole checkpoint before step {asked.step}",
            do="--from-start replays from the initial weights, or name a later step",
            path=save,
        )

    first_rank(refuse)
    raise AssertionError("first_rank raises")


@contextlib.contextmanager
def _prepared(cfg: RunConfig, asked: Asked, device: Device) -> Iterator[tuple[Run, str, Any]]:
    """(the run at its checkpoint, that checkpoint, its tokenizer)."""
    with setup.groups(cfg, device):
        where = run_dir.places(cfg, str(asked.scratch))
        (asked.scratch / "logs").mkdir(exist_ok=True)
        run_dir.log_to_file(where, torch.distributed.get_rank(), cfg.observe.logging_level)
        tokenizer = agree(lambda: setup.tokenizer(cfg))
        words = vocabulary(cfg, tokenizer.vocab_size)
        splits = setup.datasets(cfg, tokenizer)
        chunks = wrap_for_training(cfg, build_chunks(cfg, words))
        optimizer = build_optimizer(cfg, chunks)
        state = setup.train_state(chunks, optimizer, build_scheduler(cfg, optimizer))
        source = load_before(cfg, state, asked, splits.inputs.content)
        keeper = Checkpointer(cfg.checkpoint, None, None, run_info={})
        quiet = setup.Observers(cfg, where, first_step=0, num_steps=0, is_active=False)
        with setup.instruments(cfg, where, state, keeper) as instruments:
            measures = setup.measures(cfg, tokenizer, words)
            yield Run(cfg, state, splits, keeper, quiet, instruments, *measures), source, tokenizer


def replay(cfg: RunConfig, asked: Asked, device: Device) -> Replayed:
    """Train to the step asked for. Collective of all ranks of the run's layout. Raises Fatal."""
    cfg = replace(cfg, observe=replace(cfg.observe, run_dir=str(asked.scratch)))
    steps: dict[int, dict[str, Any]] = {}
    problem = None
    guard = _Noting("validate_results", asked.scratch, None, asked.step)
    with _prepared(cfg, asked, device) as (run, source, tokenizer):
        try:
            for result in steps_again(run, asked.step, StopRequest(cfg.train), guard):
                values = {name: getattr(result, name) for name in COMPARED}
                steps[run.state.progress.step] = values
        except Fatal as error:  # of the code 76 on all ranks
            if error.code != NumericError.code or not guard.shares:
                raise
            problem = error.what
        lines = batch.describe(_gathered(guard.shares), run.splits.train, tokenizer)
    return Replayed(source, steps, lines, problem)


def _gathered(shares: list[batch.Share]) -> list[batch.Share]:
    everyone: list = [None] * torch.distributed.get_world_size()
    is_copy = parallel_state.get_tensor_model_parallel_rank() > 0
    torch.distributed.all_gather_object(everyone, [] if is_copy else shares)
    return [share for part in everyone for share in part]
