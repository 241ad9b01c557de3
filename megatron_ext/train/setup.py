"""Makes the parts of a run from its config; each function is one line of pretrain_moe.py."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from data import Splits, Tokenizer, build_tokenizer, open_datasets
from megatron_ext.checkpoint import Checkpointer, Progress, TrainState
from megatron_ext.checkpoint.fingerprint import fingerprint, free_to_change
from megatron_ext.checkpoint.tiers import has_fast_step
from megatron_ext.config import RunConfig
from megatron_ext.config.once import OF_A_LOAD
from megatron_ext.costs.dryrun import loss_lines
from megatron_ext.costs.flops import model_flops_per_token
from megatron_ext.device import Device, current_device
from megatron_ext.errors import EXIT_REASON
from megatron_ext.mesh.agree import agree, first_rank
from megatron_ext.mesh.attempt import is_restart
from megatron_ext.mesh.grid import format_grid
from megatron_ext.mesh.layout import layout_of
from megatron_ext.model.gpt import Vocabulary
from megatron_ext.observe import run_dir
from megatron_ext.observe.instruments import Instruments
from megatron_ext.observe.instruments import instruments as measuring
from megatron_ext.observe.observers import Observers
from megatron_ext.observe.run_dir import RunDirectory
from megatron_ext.resilience.watch import entering, watching
from megatron_ext.train.evaluate import bytes_per_token
from megatron_ext.train.loop import Run, num_samples, total_steps
from megatron_ext.train.step import sum_over_ranks
from megatron_ext.train.stop import StopRequest


def _is_first() -> bool:
    return torch.distributed.get_rank() == 0


def run_directory(cfg: RunConfig) -> tuple[RunConfig, RunDirectory]:
    """Create the run's folder (rank 0; its name is everybody's), send each rank's log records to
    its file there, and name the checkpoint to go on from: see `resumed`.
    """

    def make() -> str:
        where = run_dir.places(cfg, cfg.observe.run_dir)
        run_dir.create(cfg, where)
        old_reason = where.root / "exit_reason.json"
        if EXIT_REASON not in os.environ:
            old_reason.unlink(missing_ok=True)
        return cfg.observe.run_dir

    name = first_rank(make)
    own = run_dir.places(cfg, name).save
    has_own = run_dir.has_checkpoint(own) or has_fast_step(cfg.checkpoint, own)
    if sum_over_ranks([], float(is_restart() and has_own))[-1] > 0:
        cfg = resumed(cfg, own)
    where = run_dir.places(cfg, name)
    os.environ.setdefault(EXIT_REASON, str(where.root / "exit_reason.json"))
    run_dir.log_to_file(where, torch.distributed.get_rank(), cfg.observe.logging_level)
    return cfg, where


def resumed(cfg: RunConfig, own: Path) -> RunConfig:
    """The config of a run that is started again and goes on from its `own` newest checkpoint,
    whatever it was loaded from at first.
    """
    return replace(cfg, checkpoint=replace(cfg.checkpoint, load=str(own), **OF_A_LOAD))


def leave_if_asked(stop: StopRequest, step: int = 0) -> None:
    """Raise Preempted on all ranks where one was asked to stop before the training began: what is
    saved is what there is. Collective.
    """
    if sum_over_ranks([], float(stop()[0]))[-1] > 0:
        raise stop.preempted("before the first step", step, "nothing new to save")


def context_levels(cfg: RunConfig) -> list[int] | None:
    """--hierarchical-context-parallel-sizes where Transformer Engine's attention needs groups for
    them (megatron-core wants einops then); local attention exchanges over one group.
    """
    use_te = cfg.model.transformer_impl == "transformer_engine"
    return cfg.transformer.hierarchical_context_parallel_sizes if use_te else None


def tokenizer(cfg: RunConfig) -> Tokenizer:
    """The tokenizer of the flags; mock data without one gets a NullTokenizer over --vocab-size."""
    data = cfg.data
    kind = data.tokenizer_type or ("NullTokenizer" if data.mock_data else None)
    return build_tokenizer(
        kind,
        data.tokenizer_model,
        vocab_size=cfg.model.vocab_size,
        vocab_file=data.vocab_file,
        merge_file=data.merge_file,
    )


def datasets(cfg: RunConfig, words: Tokenizer) -> Splits:
    """Train, validation and test data: rank 0 checks the files and builds the indices, then
    everybody opens them.
    """

    def open_(is_builder: bool) -> Splits:
        return open_datasets(
            cfg.data,
            seq_length=cfg.model.seq_length,
            num_samples=num_samples(cfg.train, total_steps(cfg.train)),
            seed=cfg.train.seed,
            vocab_size=words.vocab_size,
            eod=words.eod,
            is_builder=is_builder,
            barrier=lambda: None,
        )

    agree(lambda: open_(True) if _is_first() else None)
    return agree(lambda: open_(False))


def train_state(chunks: Sequence[nn.Module], optimizer, scheduler) -> TrainState:
    """Everything that a step changes, at step 0."""
    return TrainState(list(chunks), optimizer, scheduler, Progress())


@contextlib.contextmanager
def checkpointer(cfg: RunConfig, where: RunDirectory, words: Tokenizer) -> Iterator[Checkpointer]:
    """Saves into and loads from the run's folders; what is in flight is finished on the way out."""
    info = {"config": cfg.to_yaml(), "fingerprint": fingerprint(cfg, words.vocab_size)}
    free = free_to_change(cfg)
    made = Checkpointer(cfg.checkpoint, where.save, where.load, run_info=info, may_change=free)
    try:
        yield made
    finally:
        entering("save")
        made.close()


@contextlib.contextmanager
def watch(cfg: RunConfig, where: RunDirectory) -> Iterator[None]:
    """Heartbeats and the search for hangs and stragglers; what comes next is the load."""
    layout = layout_of(cfg.parallel)
    ranks = range(torch.distributed.get_world_size())
    stages = [layout.coordinates(rank)["pp"] for rank in ranks]
    limit_s, timeout_s = cfg.resilience.hang_limit_s, 60 * cfg.parallel.distributed_timeout_minutes
    if _is_first() and limit_s >= timeout_s:
        logging.getLogger(__name__).warning(
            "--hang-limit-s %g is not below --distributed-timeout-minutes (%g s): a hang may end as"
            " a collective that times out and names nobody",
            limit_s,
            timeout_s,
        )
    with watching(cfg.resilience, where.root / "logs", stages):
        entering("load")
        yield


@contextlib.contextmanager
def observers(cfg: RunConfig, where: RunDirectory, state: TrainState) -> Iterator[Observers]:
    """The console, metrics.jsonl and TensorBoard of rank 0."""
    made = Observers(
        cfg,
        where,
        first_step=state.progress.step,
        num_steps=total_steps(cfg.train),
        is_active=_is_first(),
    )
    try:
        yield made
    finally:
        made.close()


@contextlib.contextmanager
def instruments(
    cfg: RunConfig, where: RunDirectory, state: TrainState, saver: Checkpointer
) -> Iterator[Instruments]:
    """Time split, traces, and the page about memory that did not suffice, on every rank."""
    with measuring(cfg, where.root, state, saver, current_device()) as made:
        yield made


def measures(cfg: RunConfig, words: Tokenizer, vocabulary: Vocabulary):
    """(UTF-8 bytes of each token, for bits per byte; model FLOPs of a token, for throughput)."""
    return bytes_per_token(words), model_flops_per_token(cfg, vocabulary.size)


def announce(run: Run, device: Device, vocabulary: Vocabulary, where: RunDirectory) -> None:
    """What is about to run, in a few lines on rank 0."""
    cfg, say = run.cfg, run.observers.say
    for line in cfg.scaled:
        say(line)
    for warning in (*cfg.warnings, *run.splits.warnings):
        say(f"warning: {warning}")
    say(format_grid(layout_of(cfg.parallel)))
    say(f"run directory {where.root}")
    say(f"device {device.kind}, collectives {device.backend}, row kernels {device.kernels}")
    say(f"vocabulary {vocabulary.size} tokens, padded to {vocabulary.padded}")
    for line in loss_lines(cfg):
        say(line)
    if run.state.progress.step:
        say(f"resumed at step {run.state.progress.step} from {where.load}")
