"""The optimizer over all chunks and its learning-rate and weight-decay schedule, counted in
samples.

megatron-core keeps separate optimizers for dense and expert parameters (their data-parallel groups
differ) behind one ChainedOptimizer, holds fp32 masters for 16-bit weights, and shards them with
--use-distributed-optimizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from megatron.core.optimizer import (
    ChainedOptimizer,
    DistributedOptimizer,
    MegatronOptimizer,
    get_megatron_optimizer,
)
from megatron.core.optimizer.optimizer import FP32Optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import Tensor, nn

from megatron_ext.config import RunConfig
from megatron_ext.model.run_config import optimizer_config
from megatron_ext.optim.adam import TiledAdam
from megatron_ext.optim.norm import Chain


def build_optimizer(cfg: RunConfig, chunks: Sequence[nn.Module]) -> MegatronOptimizer:
    """megatron-core's optimizer; weight decay skips biases and one-dimensional weights, as
    Megatron-LM does.
    """
    chain = get_megatron_optimizer(
        optimizer_config(cfg),
        list(chunks),
        use_gloo_process_groups=cfg.parallel.enable_gloo_process_groups,
    )
    assert type(chain) is ChainedOptimizer, f"{type(chain).__name__} has its own step"
    for leaf in chain.chained_optimizers:
        if type(leaf.optimizer) in (torch.optim.Adam, torch.optim.AdamW):
            _update_in_one_pass(leaf)
    return Chain(chain.chained_optimizers)


def _copies(leaf: MegatronOptimizer) -> dict[Tensor, Tensor]:
    """fp32 master -> the 16-bit weight (or the distributed optimizer's shard of it) that follows
    it.
    """
    if isinstance(leaf, FP32Optimizer):
        return {}
    is_sharded = isinstance(leaf, DistributedOptimizer)
    weights = leaf.shard_float16_groups if is_sharded else leaf.float16_groups
    masters = leaf.shard_fp32_from_float16_groups if is_sharded else leaf.fp32_from_float16_groups
    pairs = [pair for group in zip(masters, weights) for pair in zip(*group)]
    return dict(pairs)


def _update_in_one_pass(leaf: MegatronOptimizer) -> None:
    """torch's Adam of an optimizer becomes ours, which also writes the weights of the model."""
    leaf.optimizer = TiledAdam.instead_of(leaf.optimizer, _copies(leaf))
    leaf._copy_main_params_to_model_params = lambda: None  # done, tile by tile


class _Lengths(NamedTuple):
    """In samples, as the scheduler counts."""

    warmup: float
    decay: int
    wsd: int | None
    weight_decay: int


def _lengths(cfg: RunConfig, step: int = 0, consumed_samples: int = 0) -> _Lengths:
    """Lengths of the schedule of a run that is at (`step`, `consumed_samples`). Flags in steps mean
    steps: behind a resume with another batch the steps before it keep the samples that they had,
    on average.
    """
    schedule, train = cfg.schedule, cfg.train
    if train.train_samples is not None:
        warmup = schedule.lr_warmup_samples
        decay = schedule.lr_decay_samples or train.train_samples
        wsd, total = schedule.lr_wsd_decay_samples, train.train_samples
    else:

        def samples(steps: int) -> int:
            if steps < step:
                return round(consumed_samples * steps / step)
            return consumed_samples + (steps - step) * train.global_batch_size

        last = schedule.lr_decay_iters or train.train_iters
        warmup, decay = samples(schedule.lr_warmup_iters), samples(last)
        wsd, total = schedule.lr_wsd_decay_iters, samples(train.train_iters)
        wsd = None if wsd is None else decay - samples(last - wsd)
    if schedule.lr_warmup_fraction is not None:
        warmup = schedule.lr_warmup_fraction * decay
    return _Lengths(warmup, decay, wsd, total)


def fit_schedule(cfg: RunConfig, scheduler: OptimizerParamScheduler, progress: Any) -> None:
    """After a load: the lengths of a schedule that is the flags' own, not the checkpoint's, for a
    run at `progress` (checkpoint.state.Progress) whose batch may have been another before.
    """
    if not cfg.schedule.override_opt_param_scheduler:
        return
    found = _lengths(cfg, progress.step, progress.consumed_samples)
    scheduler.lr_warmup_steps, scheduler.lr_decay_steps = found.warmup, found.decay
    scheduler.wsd_decay_steps, scheduler.wd_incr_steps = found.wsd, found.weight_decay
    scheduler.step(0)


def build_scheduler(cfg: RunConfig, optimizer: MegatronOptimizer) -> OptimizerParamScheduler:
    """Warm-up, then constant, linear, cosine, inverse-square-root or WSD; `step(increment=samples)`
    moves it.
    """
    schedule = cfg.schedule
    lengths = _lengths(cfg)
    return OptimizerParamScheduler(
        optimizer,
        init_lr=schedule.lr_warmup_init,
        max_lr=schedule.lr,
        min_lr=schedule.min_lr,
        lr_warmup_steps=lengths.warmup,
        lr_decay_steps=lengths.decay,
        lr_decay_style=schedule.lr_decay_style,
        start_wd=schedule.start_weight_decay,
        end_wd=schedule.end_weight_decay,
        wd_incr_steps=lengths.weight_decay,
        wd_incr_style=schedule.weight_decay_incr_style,
        use_checkpoint_opt_param_scheduler=schedule.use_checkpoint_opt_param_scheduler,
        override_opt_param_scheduler=schedule.override_opt_param_scheduler,
        wsd_decay_steps=lengths.wsd,
        lr_wsd_decay_style=schedule.lr_wsd_decay_style,
    )
