"""Makes the parts of a run from its config; each function is one line of pretrain_moe.py."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from data import Splits, Tokenizer, build_tokenizer, open_datasets
from megatron_ext.checkpoint import Checkpointer, Progress, TrainState
from megatron_ext.config import RunConfig
from megatron_ext.costs.dryrun import loss_lines
from megatron_ext.costs.flops import model_flops_per_token
from megatron_ext.device import Device
from megatron_ext.mesh.agree import agree, first_rank
from megatron_ext.mesh.grid import format_grid
from megatron_ext.mesh.layout import layout_of
from megatron_ext.model.gpt import Vocabulary
from megatron_ext.observe import run_dir
from megatron_ext.observe.observers import Observers
from megatron_ext.observe.run_dir import RunDirectory
from megatron_ext.train.evaluate import bytes_per_token
from megatron_ext.train.loop import Run, num_samples, total_steps


def _is_first() -> bool:
    return torch.distributed.get_rank() == 0


def run_directory(cfg: RunConfig) -> RunDirectory:
    """Create the run's folder (rank 0; its name is everybody's) and send each rank's log records to
    its file there.
    """

    def make() -> str:
        run_dir.create(cfg, run_dir.places(cfg, cfg.observe.run_dir))
        return cfg.observe.run_dir

    where = run_dir.places(cfg, first_rank(make))
    run_dir.log_to_file(where, torch.distributed.get_rank(), cfg.observe.logging_level)
    return where


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
def checkpointer(cfg: RunConfig, where: RunDirectory) -> Iterator[Checkpointer]:
    """Saves into and loads from the run's folders; what is in flight is finished on the way out."""
    made = Checkpointer(cfg.checkpoint, where.save, where.load, run_info={"config": cfg.to_yaml()})
    try:
        yield made
    finally:
        made.close()


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


def measures(cfg: RunConfig, words: Tokenizer, vocabulary: Vocabulary):
    """(UTF-8 bytes of each token, for bits per byte; model FLOPs of a token, for throughput)."""
    return bytes_per_token(words), model_flops_per_token(cfg, vocabulary.size)


def announce(run: Run, device: Device, vocabulary: Vocabulary, where: RunDirectory) -> None:
    """What is about to run, in a few lines on rank 0."""
    cfg, say = run.cfg, run.observers.say
    for warning in (*cfg.warnings, *run.splits.warnings):
        say(f"warning: {warning}")
    say(format_grid(layout_of(cfg.parallel)))
    say(f"run directory {where.root}, device {device.kind}, collectives {device.backend}")
    say(f"vocabulary {vocabulary.size} tokens, padded to {vocabulary.padded}")
    for line in loss_lines(cfg):
        say(line)
    if run.state.progress.step:
        say(f"resumed at step {run.state.progress.step} from {where.load}")
