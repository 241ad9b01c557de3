"""When things happen: batches, steps, evaluations, saves, and the reasons to stop."""

from __future__ import annotations

import gc
import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state

from data.loader import MicroBatches
from megatron_ext.config import RunConfig
from megatron_ext.device import current_device
from megatron_ext.errors import Preempted
from megatron_ext.observe.metrics import routing_values
from megatron_ext.observe.observers import Observers
from megatron_ext.train import batch_size
from megatron_ext.train.evaluate import evaluate
from megatron_ext.train.step import StepResult, StepSettings, prepare_config, to_device, train_step
from megatron_ext.train.stop import StopRequest


@dataclass(frozen=True)
class Run:
    """The parts of a run that the loop moves: see pretrain_moe.py for who makes them."""

    cfg: RunConfig
    state: Any  # checkpoint.TrainState: chunks, optimizer, scheduler, progress
    splits: Any  # data.Splits
    checkpointer: Any
    observers: Observers
    sizes_V: torch.Tensor | None
    flops_per_token: float


def total_steps(train) -> int:
    """Steps of the whole run: --train-iters, or as many as --train-samples fill."""
    if train.train_iters is not None:
        return train.train_iters
    steps = consumed = 0
    while consumed < train.train_samples:
        consumed += batch_size.global_batch_size(
            consumed, train.global_batch_size, train.rampup_batch_size
        )
        steps += 1
    return steps


def num_samples(train, num_steps: int) -> tuple[int, int, int]:
    """Samples that training, validation and test read."""
    training = train.train_samples or batch_size.samples_of_steps(
        num_steps, train.global_batch_size, train.rampup_batch_size
    )
    evaluation = train.eval_iters * train.global_batch_size
    return training, evaluation, evaluation


def _record(run: Run, result: StepResult, seconds: float, batch: int) -> dict[str, Any]:
    """One line of metrics.jsonl."""
    state, progress = run.state, run.state.progress
    tokens_per_s = result.num_tokens / seconds
    flops = run.flops_per_token * tokens_per_s
    groups = [group for group in state.optimizer.param_groups if group["params"]] or [{}]
    return {
        "step": progress.step,
        "consumed_samples": progress.consumed_samples,
        "consumed_tokens": progress.consumed_tokens,
        "lm_loss": result.lm_loss,
        **({} if result.mtp_loss is None else {"mtp_loss": result.mtp_loss}),
        **routing_values(result.routing),
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


def _evaluate(run: Run, split: str) -> None:
    """Evaluate one split, if it has data, and show the result."""
    dataset = getattr(run.splits, "valid" if split == "validation" else "test")
    train = run.cfg.train
    if dataset is None or train.eval_iters == 0:
        return
    run.observers.validation(
        evaluate(
            run.state.chunks,
            dataset,
            split=split,
            num_batches=train.eval_iters,
            global_batch_size=train.global_batch_size,
            micro_batch_size=train.micro_batch_size,
            seq_length=run.cfg.model.seq_length,
            step=run.state.progress.step,
            sizes_V=run.sizes_V,
        )
    )


def _take_step(run: Run, batches: MicroBatches, stop: StopRequest) -> StepResult:
    """Read one global batch, train on it, move the counters, show the record."""
    train, model, progress = run.cfg.train, run.cfg.model, run.state.progress
    dp = parallel_state.get_data_parallel_world_size()
    multiple = train.micro_batch_size * dp
    batch = batch_size.global_batch_size(
        progress.consumed_samples,
        train.global_batch_size,
        train.rampup_batch_size,
        multiple,
        train.decrease_batch_size_if_needed,
    )
    start = time.perf_counter()
    micro_batches = [to_device(next(batches), current_device()) for _ in range(batch // multiple)]
    result = train_step(run.state, micro_batches, StepSettings.of(run.cfg), stop)
    if not result.was_skipped:
        run.state.scheduler.step(increment=batch)
    seconds = time.perf_counter() - start
    progress.step += 1
    progress.consumed_samples += batch
    progress.consumed_tokens += batch * model.seq_length
    progress.skipped_steps += result.was_skipped
    run.observers.step(_record(run, result, seconds, batch), result.routing)
    return result


def _is_multiple(step: int, interval: int | None) -> bool:
    return bool(interval) and step % interval == 0


def train(run: Run) -> str:
    """Train until the last step or a reason to stop, and save; returns the reason ("finished" at
    the end). Raises Preempted (75) where a signal came: no time is spent on an evaluation then.
    """
    cfg, progress = run.cfg, run.state.progress
    num_steps = total_steps(cfg.train)
    prepare_config(
        run.state.chunks[0].config,
        run.state.optimizer,
        run.state.chunks,
        run.state.chunks[0].ddp_config,
    )
    stop = StopRequest(cfg.train)
    batches = MicroBatches(
        run.splits.train,
        cfg.train.micro_batch_size,
        parallel_state.get_data_parallel_rank(),
        parallel_state.get_data_parallel_world_size(),
        consumed_samples=progress.consumed_samples,
    )
    if cfg.train.manual_gc:
        gc.disable()
    reason, saved_step = "finished", progress.step
    try:
        while progress.step < num_steps:
            result = _take_step(run, batches, stop)
            step = progress.step
            run.checkpointer.poll()
            if _is_multiple(step, cfg.train.eval_interval) and step < num_steps:
                _evaluate(run, "validation")
            if _is_multiple(step, cfg.checkpoint.save_interval):
                run.checkpointer.save(run.state)
                saved_step = step
            if cfg.train.manual_gc and _is_multiple(step, cfg.train.manual_gc_interval):
                gc.collect()
            if result.stop_by_signal or result.stop_by_time:
                reason = "a signal" if result.stop_by_signal else "--exit-duration-in-mins"
                break
            if _is_multiple(step, cfg.train.exit_interval):
                reason = f"--exit-interval {cfg.train.exit_interval}"
                break
        if saved_step != progress.step:
            run.checkpointer.save(run.state)
        run.checkpointer.poll(blocking=True)
        if reason == "a signal":
            raise Preempted(
                f"stopped by {cfg.train.exit_signal} after step {progress.step}, state saved",
                do="start the same command again with --load to go on",
            )
    finally:
        batches.close()
        stop.close()
    return reason


def evaluate_at_end(run: Run) -> None:
    """The validation and test losses of the final weights."""
    _evaluate(run, "validation")
    _evaluate(run, "test")
