"""When things happen: batches, steps, evaluations, saves, and the reasons to stop."""

from __future__ import annotations

import contextlib
import gc
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state

from data.loader import MicroBatches
from data.skip import parse_ranges
from data.text_bytes import TextBytes
from megatron_ext.checkpoint.state import Progress, sync_weights
from megatron_ext.checkpoint.tiers import STORE
from megatron_ext.config import RunConfig
from megatron_ext.costs import steps
from megatron_ext.device import current_device
from megatron_ext.errors import during_step
from megatron_ext.observe.observers import Observers
from megatron_ext.optim.build import fit_schedule
from megatron_ext.resilience import replicas
from megatron_ext.resilience.guard import Guard
from megatron_ext.resilience.watch import current, entering
from megatron_ext.train.evaluate import evaluate
from megatron_ext.train.finite import check_finite
from megatron_ext.train.observed import Observed
from megatron_ext.train.step import StepResult, prepare_config, to_device, train_step
from megatron_ext.train.stop import StopRequest


@dataclass(frozen=True)
class Run:
    """The parts of a run that the loop moves: see pretrain_moe.py for who makes them."""

    cfg: RunConfig
    state: Any  # checkpoint.TrainState: chunks, optimizer, scheduler, progress
    splits: Any  # data.Splits
    checkpointer: Any
    observers: Observers
    instruments: Any  # observe.instruments.Instruments
    text_bytes: TextBytes | None
    flops_per_token: float


def num_samples(train, multiple: int) -> tuple[int, int, int]:
    """Samples that training, validation and test of a whole run read."""
    evaluation = train.eval_iters * train.global_batch_size
    return steps.end_of(train, multiple).samples, evaluation, evaluation


def end_of(cfg: RunConfig, progress: Progress) -> steps.End:
    """Where the run ends that is at `progress`."""
    multiple = cfg.train.micro_batch_size * parallel_state.get_data_parallel_world_size()
    return steps.end_of(cfg.train, multiple, progress.step, progress.consumed_samples)


def _record(run: Run, result: StepResult, seconds: float, batch: int) -> dict[str, Any]:
    """One line of metrics.jsonl."""
    state, progress = run.state, run.state.progress
    tokens_per_s = result.num_tokens / seconds
    flops = run.flops_per_token * tokens_per_s
    groups = [group for group in state.optimizer.param_groups if group["params"]] or [{}]
    return {
        "step": progress.step,
        "consumed_samples": progress.consumed_samples,
        "samples_sha": result.samples_sha,
        "consumed_tokens": progress.consumed_tokens,
        "lm_loss": result.lm_loss,
        **({} if result.mtp_loss is None else {"mtp_loss": result.mtp_loss}),
        "grad_norm": result.grad_norm,
        "learning_rate": groups[0].get("lr", 0.0),
        "global_batch_size": batch,
        "step_time_s": seconds,
        "tokens_per_s": tokens_per_s,
        "model_tflop_per_s_per_rank": flops / 1e12 / torch.distributed.get_world_size(),
        "loss_scale": float(state.optimizer.get_loss_scale()),
        "num_zeros": result.num_zeros_in_grad,
        "num_skipped": progress.skipped_steps,
        "num_nan": int(math.isnan(result.lm_loss)),
    }


def _evaluate(run: Run, split: str, stop: StopRequest) -> bool:
    """Evaluate one split, if it has data, and show the result; True where a signal ended it."""
    dataset = getattr(run.splits, "valid" if split == "validation" else "test")
    train = run.cfg.train
    if dataset is None or train.eval_iters == 0:
        return False
    entering("evaluate")
    record = evaluate(
        run.state.chunks,
        dataset,
        split=split,
        num_batches=train.eval_iters,
        global_batch_size=train.global_batch_size,
        micro_batch_size=train.micro_batch_size,
        seq_length=run.cfg.model.seq_length,
        step=run.state.progress.step,
        text_bytes=run.text_bytes,
        stop=stop,
    )
    if record is not None:
        run.observers.validation(record)
    return record is None


def _batch_size(run: Run) -> tuple[int, int]:
    """(samples, micro-batches of each dp rank) of the next global batch."""
    train, progress = run.cfg.train, run.state.progress
    multiple = train.micro_batch_size * parallel_state.get_data_parallel_world_size()
    batch = steps.size(train, multiple, progress.consumed_samples)
    return batch, batch // multiple


def _pass_over(run: Run, batches: MicroBatches) -> None:
    """A step of --iterations-to-skip: its data are read and counted, nothing else happens (no
    update, no step of the schedule, no record, evaluation or save), as in Megatron-LM.
    """
    progress, start = run.state.progress, time.perf_counter()
    batch, count = _batch_size(run)
    entering("data", progress.step + 1)
    for _ in range(count):
        next(batches)
    progress.step += 1
    progress.consumed_samples += batch
    progress.skipped_steps += 1
    current().step_done(progress.step, time.perf_counter() - start)
    run.observers.say(f"step {progress.step} is skipped (--iterations-to-skip)")


def _take_step(
    run: Run, batches: MicroBatches, stop: StopRequest, guard: Guard, observed: Observed
) -> StepResult | None:
    """Read one global batch, train on it, move the counters, show the record; None for a step of
    --iterations-to-skip.
    """
    train, model, progress = run.cfg.train, run.cfg.model, run.state.progress
    if progress.step + 1 in (train.iterations_to_skip or ()):
        return _pass_over(run, batches)
    batch, count = _batch_size(run)
    run.instruments.before(progress.step + 1)
    start = time.perf_counter()
    entering("data", progress.step + 1)
    with run.instruments.data():
        read = [next(batches) for _ in range(count)]
        micro_batches = [to_device(one, current_device()) for one in read]
    result = train_step(run.state, micro_batches, observed.settings(progress.step + 1), stop, guard)
    if not result.was_skipped:
        run.state.scheduler.step(increment=batch)
    seconds = time.perf_counter() - start
    progress.step += 1
    progress.consumed_samples += batch
    progress.consumed_tokens += batch * model.seq_length
    progress.skipped_steps += result.was_skipped
    every = run.cfg.resilience.check_weight_hash_across_dp_replicas_interval
    if _is_multiple(progress.step, every):
        sync_weights(run.state.chunks)
        replicas.check(run.state.chunks, run.state.optimizer, progress.step)
    current().step_done(progress.step, seconds)
    measured = run.instruments.after(progress.step, seconds)
    record = {**_record(run, result, seconds, batch), **measured}
    record |= observed.values(result, run.state, record["model_tflop_per_s_per_rank"])
    run.observers.step(record, result.routing)
    for verdict in observed.judge(record, result):
        run.observers.verdict(verdict)
    for line in run.instruments.lines(measured):
        run.observers.say(line)
    for finding in current().findings():
        run.observers.straggler(finding)
    return result


def _is_multiple(step: int, interval: int | None) -> bool:
    return bool(interval) and step % interval == 0


@contextlib.contextmanager
def reading(run: Run) -> Iterator[MicroBatches]:
    """The micro-batches of this rank from where `run` is to its end, its model and its schedule
    ready for these steps.
    """
    cfg, state = run.cfg, run.state
    run.splits.train.lengthen(end_of(cfg, state.progress).samples)
    fit_schedule(cfg, state.scheduler, state.progress)
    prepare_config(
        state.chunks[0].config, state.optimizer, state.chunks, state.chunks[0].ddp_config
    )
    batches = MicroBatches(
        run.splits.train,
        cfg.train.micro_batch_size,
        parallel_state.get_data_parallel_rank(),
        parallel_state.get_data_parallel_world_size(),
        consumed_samples=state.progress.consumed_samples,
        skip=parse_ranges(cfg.resilience.skip_samples),
    )
    try:
        yield batches
    finally:
        batches.close()


def _reason(run: Run, result: StepResult, by_signal: bool, observed: Observed) -> str | None:
    """Why the run ends after this step, or None."""
    if by_signal or result.stop_by_time or observed.must_stop:
        return "a signal" if by_signal else "--exit-duration-in-mins"
    interval = run.cfg.train.exit_interval
    is_due = _is_multiple(run.state.progress.step, interval)
    return f"--exit-interval {interval}" if is_due else None


def _save(run: Run, tier: str = STORE) -> None:
    """Save what is finite. Raises NumericError, DiskError."""
    entering("save")
    if run.cfg.ddp.check_for_nan_in_grad:
        check_finite(run.state)
    run.checkpointer.save(run.state, tier)


def train(run: Run, stop: StopRequest) -> str:
    """Train until the last step or a reason to stop, and save; returns the reason ("finished" at
    the end). Raises Preempted (75) where a signal came: no time is spent on an evaluation then.
    """
    cfg, progress = run.cfg, run.state.progress
    num_steps = end_of(cfg, progress).step
    guard = Guard.of(cfg)
    observed = Observed(cfg, run.splits.train, progress.consumed_samples, run)
    if cfg.train.manual_gc:
        gc.disable()
    reason, saved_step = "finished", progress.step
    stop.trains(lambda: f"step {progress.step + 1}")
    with reading(run) as batches:
        while progress.step < num_steps:
            with (
                during_step(lambda: progress.step + 1),
                run.instruments.explaining(),
                observed.rescuing(),
            ):
                result = _take_step(run, batches, stop, guard, observed)
            step = progress.step
            run.checkpointer.poll()
            if result is None:
                continue
            by_signal = result.stop_by_signal
            if _is_multiple(step, cfg.train.eval_interval) and step < num_steps and not by_signal:
                by_signal = _evaluate(run, "validation", stop)
            if tier := STORE if observed.must_save else run.checkpointer.due(step):
                _save(run, tier)
                saved_step = observed.saved_step = step if tier == STORE else saved_step
            if cfg.train.manual_gc and _is_multiple(step, cfg.train.manual_gc_interval):
                gc.collect()
            if asked := _reason(run, result, by_signal, observed):
                reason = asked
                break
        entering("save")
        if saved_step != progress.step:
            _save(run)
        run.checkpointer.finish()
        observed.stop_if_asked()
        if reason == "a signal":
            raise stop.preempted(f"after step {progress.step}", progress.step)
    return reason


def steps_again(run: Run, last: int, stop: StopRequest, guard: Guard) -> Iterator[StepResult]:
    """The steps from where `run` is to `last`, one after the other, without evaluations and saves:
    what megatron_ext.replay compares with a run's metrics.jsonl.
    """
    observed = Observed(run.cfg, run.splits.train, run.state.progress.consumed_samples)
    with reading(run) as batches:
        while run.state.progress.step < last:
            with during_step(lambda: run.state.progress.step + 1):
                result = _take_step(run, batches, stop, guard, observed)
            if result is not None:
                yield result


def evaluate_at_end(run: Run, stop: StopRequest) -> None:
    """The validation and test losses of the final weights."""
    stop.trains(lambda: "the last evaluation")
    for split in ("validation", "test"):
        if _evaluate(run, split, stop):
            step = run.state.progress.step
            raise stop.preempted("in the last evaluation", step, "training is finished and saved")
