"""Makes the parts of a run from its config; each function is one line of pretrain_moe.py."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace

import torch
from torch import nn

from data import Splits, Tokenizer, build_tokenizer, open_datasets
from data.datasets import content, files_now
from data.text_bytes import TextBytes
from data.tokenizer import files_of
from megatron_ext.checkpoint import Checkpointer, Progress, TrainState
from megatron_ext.checkpoint.fingerprint import fingerprint, free_to_change
from megatron_ext.config import RunConfig
from megatron_ext.costs.dryrun import loss_lines
from megatron_ext.costs.flops import model_flops_per_token
from megatron_ext.device import Device, current_device
from megatron_ext.mesh.agree import agree, first_rank
from megatron_ext.mesh.grid import format_grid
from megatron_ext.mesh.groups import process_groups
from megatron_ext.mesh.layout import layout_of
from megatron_ext.model.gpt import Vocabulary
from megatron_ext.observe.instruments import Instruments
from megatron_ext.observe.instruments import instruments as measuring
from megatron_ext.observe.observers import Observers
from megatron_ext.observe.run_dir import RunDirectory
from megatron_ext.resilience.watch import entering, watching
from megatron_ext.train.loop import Run, end_of, num_samples
from megatron_ext.train.run_folder import Held
from megatron_ext.train.step import sum_over_ranks
from megatron_ext.train.stop import StopRequest

_log = logging.getLogger(__name__)


def _is_first() -> bool:
    return torch.distributed.get_rank() == 0


def leave_if_asked(stop: StopRequest, then: str, step: int = 0) -> None:
    """Raise Preempted on all ranks where one was asked to stop before the training began: what is
    saved is what there is. `then` comes now if not. Collective.
    """
    if sum_over_ranks([], float(stop()[0]))[-1] > 0:
        raise stop.preempted("before the first step", step, "nothing new to save")
    stop.starts(then)


def groups(cfg: RunConfig, device: Device) -> AbstractContextManager[None]:
    """The process groups of this launch. --hierarchical-context-parallel-sizes counts where
    Transformer Engine's attention needs groups for it (megatron-core wants einops then); local
    attention exchanges over one group.
    """
    use_te = cfg.model.transformer_impl == "transformer_engine"
    levels = cfg.transformer.hierarchical_context_parallel_sizes if use_te else None
    return process_groups(cfg.parallel, device, cfg.train.seed, levels)


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
        tiktoken_pattern=data.tiktoken_pattern,
        tiktoken_num_special_tokens=data.tiktoken_num_special_tokens,
    )


def datasets(cfg: RunConfig, words: Tokenizer) -> Splits:
    """Train, validation and test data: rank 0 checks the files, builds the indices and hashes what
    is in the files (and the tokenizer's), then everybody opens them.
    """

    multiple = cfg.train.micro_batch_size * cfg.parallel.data_parallel_size

    def open_(is_builder: bool) -> Splits:
        return open_datasets(
            cfg.data,
            seq_length=cfg.model.seq_length,
            num_samples=num_samples(cfg.train, multiple),
            seed=cfg.train.seed,
            vocab_size=words.vocab_size,
            eod=words.eod,
            is_builder=is_builder,
            barrier=lambda: None,
        )

    data = cfg.data
    kind = (data.tokenizer_type, data.tokenizer_model, data.vocab_file, data.merge_file)
    of_words = files_of(*kind)
    files = agree(lambda: files_now(data, of_words))
    agree(lambda: open_(True) if _is_first() else None)
    splits = agree(lambda: open_(False))
    found = first_rank(lambda: content(data, of_words))
    found["tokenizer_content"]["special tokens"] = {"eod": words.eod, "bos": words.bos}
    return replace(splits, inputs=replace(files, content=found))


def train_state(chunks: Sequence[nn.Module], optimizer, scheduler) -> TrainState:
    """Everything that a step changes, at step 0."""
    return TrainState(list(chunks), optimizer, scheduler, Progress())


@contextlib.contextmanager
def saver(
    cfg: RunConfig, where: RunDirectory, held: Held, words: Tokenizer, splits: Splits
) -> Iterator[Checkpointer]:
    """Saves into and loads from the run's folders; what is in flight is finished on the way out.
    One rank of each node sees to it that the files that the run reads are still those it opened.
    """
    run, free = held.start.identity, free_to_change(cfg)
    info = {"config": cfg.to_yaml(), "fingerprint": fingerprint(cfg, words.vocab_size)}
    info |= {"id": run.id, "origins": list(run.origins)}
    info |= {"content": splits.inputs.content}
    looks = os.environ.get("LOCAL_RANK", "0") == "0"
    made = Checkpointer(
        cfg.checkpoint,
        where.save,
        where.load,
        run_info=info,
        may_change=free,
        leases=held.leases,
        before_save=splits.inputs.check if looks else lambda: None,
    )
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
        _log.warning(
            "--hang-limit-s %g is not below --distributed-timeout-minutes (%g s): a hang may end as"
            " a collective that times out and names nobody",
            limit_s,
            timeout_s,
        )
    with watching(cfg.resilience, where.root / "logs", stages):
        entering("load")
        yield


@contextlib.contextmanager
def observers(
    cfg: RunConfig, where: RunDirectory, held: Held, state: TrainState
) -> Iterator[Observers]:
    """The console, metrics.jsonl and TensorBoard of rank 0; an evaluation of an older step cuts no
    record after it.
    """
    step = state.progress.step
    made = Observers(
        cfg,
        where,
        first_step=max(step, held.start.step or 0) if cfg.train.eval_only else step,
        num_steps=end_of(cfg, state.progress).step,
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
    """(bytes of text of tokens, for bits per byte; model FLOPs of a token, for throughput)."""
    return TextBytes.of(words), model_flops_per_token(cfg, vocabulary.size)


def announce(run: Run, device: Device, vocabulary: Vocabulary, held: Held) -> None:
    """What is about to run, in a few lines on rank 0."""
    cfg, say, where = run.cfg, run.observers.say, held.where
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
    for line in run.text_bytes.notes((run.splits.valid, run.splits.test)):
        say(line)
    if run.state.progress.step:
        say(f"resumed at step {run.state.progress.step} from {cfg.checkpoint.load}")
    if held.start.note:
        say(held.start.note)
