"""Batch arithmetic, schedules and gradient synchronisation."""

from __future__ import annotations

import signal
from collections.abc import Iterator

from megatron_ext.config.checks.numbers import multiples_near, one_of
from megatron_ext.config.run_config import RunConfig
from megatron_ext.errors import Violation

RAMP_WORDS = 3


def rules(cfg: RunConfig) -> Iterator[Violation]:
    """All rules of the loop."""
    yield from _batch(cfg)
    yield from _ramp(cfg)
    yield from _fills_a_batch(cfg)
    yield from _units(cfg)
    yield from _rates(cfg)
    yield from _wsd(cfg)
    yield from _weight_decay(cfg)
    yield from _gradients(cfg)
    yield from _signal(cfg)


def _batch(cfg: RunConfig) -> Iterator[Violation]:
    micro, batch, dp = _sizes(cfg)
    if micro and dp and batch and batch % (micro * dp):
        yield Violation(
            "--global-batch-size",
            batch,
            f"must be a multiple of micro-batch-size*dp = {micro}*{dp} = {micro * dp}",
            f"use {one_of(multiples_near(batch, micro * dp))}",
        )


def _sizes(cfg: RunConfig) -> tuple[int, int, int]:
    t = cfg.train
    return t.micro_batch_size or 0, t.global_batch_size or 0, cfg.parallel.data_parallel_size


def _ramp(cfg: RunConfig) -> Iterator[Violation]:
    ramp, flag = cfg.train.rampup_batch_size, "--rampup-batch-size"
    if ramp is None:
        return
    shown = " ".join(map(str, ramp))
    if len(ramp) != RAMP_WORDS or min(ramp) < 1:
        yield Violation(
            flag,
            shown,
            "needs three numbers: start, increment, samples",
            "use for instance 32 32 1000000",
        )
        return
    start, step, _ = ramp
    micro, batch, dp = _sizes(cfg)
    unit = micro * dp
    if cfg.train.train_iters is not None:
        yield Violation(
            flag, shown, "needs --train-samples instead of --train-iters", "use --train-samples"
        )
    if batch and (start > batch or (batch - start) % step):
        yield Violation(
            flag,
            shown,
            f"must reach --global-batch-size = {batch} from {start} in steps of {step}",
            "choose start and increment so that they add up",
        )
    exact = not cfg.train.decrease_batch_size_if_needed
    if unit and exact and (start % unit or step % unit):
        yield Violation(
            flag,
            shown,
            f"start and increment must be multiples of micro-batch-size*dp = {unit}",
            f"use {unit} {unit}, or add --decrease-batch-size-if-needed",
        )
    elif unit and start < unit:
        yield Violation(
            flag, shown, f"must start with micro-batch-size*dp = {unit} or more", f"start at {unit}"
        )


def _fills_a_batch(cfg: RunConfig) -> Iterator[Violation]:
    micro, batch, dp = _sizes(cfg)
    samples, ramp = cfg.train.train_samples, cfg.train.rampup_batch_size
    if samples is None or not (micro and batch and dp):
        return
    first = batch
    if ramp and len(ramp) == RAMP_WORDS:
        first = ramp[0] // (micro * dp) * (micro * dp)
        if first < 1:
            return  # named by _ramp
    if samples < first:
        yield Violation(
            "--train-samples", samples, f"must fill one batch of {first}", f"use {first} or more"
        )


def _units(cfg: RunConfig) -> Iterator[Violation]:
    """A run is counted in steps or in sequences; flags of the other kind would be unused."""
    train, s = cfg.train, cfg.schedule
    if train.train_iters is not None and train.train_samples is not None:
        yield Violation(
            "--train-samples", train.train_samples, "excludes --train-iters", "use one of them"
        )
        return
    iters, samples = "iters", "samples"
    other = samples if train.train_iters is not None else iters
    mine = iters if other == samples else samples
    if train.train_iters is None and train.train_samples is None:
        return
    for name in ("lr_decay_", "lr_warmup_", "lr_wsd_decay_"):
        value = getattr(s, name + other)
        if value:
            flag = "--" + (name + other).replace("_", "-")
            yield Violation(
                flag,
                value,
                f"does not fit --train-{mine}",
                f"use {flag.replace(other, mine)}, or --train-{other}",
            )


def _rates(cfg: RunConfig) -> Iterator[Violation]:
    s = cfg.schedule
    if s.lr is not None and s.min_lr > s.lr:
        yield Violation(
            "--min-lr", s.min_lr, f"must not exceed --lr = {s.lr}", f"use {s.lr / 10:g}"
        )
    if s.lr is not None and s.lr_warmup_init > s.lr:
        yield Violation(
            "--lr-warmup-init", s.lr_warmup_init, f"must not exceed --lr = {s.lr}", "use 0"
        )
    decay = s.lr_decay_iters or s.lr_decay_samples
    warmup = s.lr_warmup_iters or s.lr_warmup_samples
    if s.lr_warmup_fraction is not None:
        if warmup:
            yield Violation(
                "--lr-warmup-fraction",
                s.lr_warmup_fraction,
                "excludes --lr-warmup-iters and --lr-warmup-samples",
                "use one of them",
            )
    elif decay and warmup and warmup >= decay:
        kind = "iters" if s.lr_warmup_iters else "samples"
        yield Violation(
            f"--lr-warmup-{kind}",
            warmup,
            f"must be less than --lr-decay-{kind} = {decay}",
            f"use {max(decay // 10, 0)}",
        )


def _wsd(cfg: RunConfig) -> Iterator[Violation]:
    s = cfg.schedule
    decay = s.lr_decay_iters or s.lr_decay_samples
    if s.lr_decay_style == "WSD":
        last = s.lr_wsd_decay_iters or s.lr_wsd_decay_samples
        if last is None:
            yield Violation(
                "--lr-decay-style",
                "WSD",
                "needs --lr-wsd-decay-iters (or -samples)",
                "add --lr-wsd-decay-iters 100",
            )
        elif decay and last > decay:
            yield Violation(
                "--lr-wsd-decay-iters",
                last,
                f"must not exceed --lr-decay-iters = {decay}",
                f"use {max(decay // 10, 1)}",
            )
    if s.override_opt_param_scheduler and s.use_checkpoint_opt_param_scheduler:
        yield Violation(
            "--override-opt-param-scheduler",
            None,
            "excludes --use-checkpoint-opt-param-scheduler",
            "use one of them",
        )


def _weight_decay(cfg: RunConfig) -> Iterator[Violation]:
    s = cfg.schedule
    start, end = s.start_weight_decay, s.end_weight_decay
    if s.weight_decay_incr_style == "constant":
        if start != end:
            yield Violation(
                "--start-weight-decay",
                start,
                f"must equal --end-weight-decay = {end} with a constant style",
                "use --weight-decay-incr-style linear",
            )
    elif start is None or end is None:
        yield Violation(
            "--weight-decay-incr-style",
            s.weight_decay_incr_style,
            "needs --start-weight-decay and --end-weight-decay",
            "add both",
        )
    elif not 0 <= start <= end:
        yield Violation(
            "--start-weight-decay", start, f"must be from 0 to --end-weight-decay = {end}", "use 0"
        )


def _gradients(cfg: RunConfig) -> Iterator[Violation]:
    d = cfg.ddp
    if d.overlap_param_gather:
        if not d.use_distributed_optimizer:
            yield Violation(
                "--overlap-param-gather", None, "needs --use-distributed-optimizer", "add it"
            )
        if not d.overlap_grad_reduce:
            yield Violation("--overlap-param-gather", None, "needs --overlap-grad-reduce", "add it")
    if cfg.optimizer.use_precision_aware_optimizer and not d.use_distributed_optimizer:
        yield Violation(
            "--use-precision-aware-optimizer", None, "needs --use-distributed-optimizer", "add it"
        )


def _signal(cfg: RunConfig) -> Iterator[Violation]:
    name = cfg.train.exit_signal
    if not (name.isdecimal() and int(name) in set(signal.Signals)) and name not in dir(signal):
        yield Violation("--exit-signal", name, "is not a signal", "use SIGTERM, SIGUSR1 or SIGINT")
