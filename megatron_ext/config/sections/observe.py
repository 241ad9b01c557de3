"""What a run says about itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_ext.ranges import Count, Port, Positive, Whole


@dataclass(frozen=True)
class ObserveSection:
    """Run directory, logs, TensorBoard, wandb."""

    run_dir: str | None = None
    """The run's folder; the same command again goes on with the run in it. Default: runs/<config
    name, or 'pretrain'>-<time>."""

    overwrite_run: bool = False
    """Where --run-dir or --save holds a run, move it to RUN.old-<time> and begin a new one. A
    restart or a requeue of the job goes on."""

    log_interval: Count = 100
    """Steps between log lines."""

    tensorboard_dir: str | None = None
    """Folder of the event files. Default: RUN/tensorboard."""

    tensorboard_log_interval: Count = 1
    """Steps between TensorBoard points."""

    tensorboard_queue_size: Count = 1000
    """Events held in memory before a write."""

    log_routing_interval: Whole = 100
    """Steps between routing pictures, co-selection and domain tables, lines of RUN/routing.jsonl;
    0: never."""

    log_throughput: bool = False
    """Log TFLOP/s a rank."""

    peak_tflops: Positive | None = None
    """10^12 FLOP a second that one rank can do in the training's number format, for MFU; without it
    there is no MFU."""

    log_params_norm: bool = False
    """Log the norm of the weights."""

    log_timers_to_tensorboard: bool = False
    """Write timers to TensorBoard."""

    log_validation_ppl_to_tensorboard: bool = False
    """Write the validation perplexity to TensorBoard."""

    log_memory_to_tensorboard: bool = False
    """Write memory use to TensorBoard."""

    log_progress: bool = False
    """Append to RUN/progress.txt at each save: tokens and FLOPs so far."""

    logging_level: Whole | None = None
    """Python's logging level: 10 debug, 20 info, 30 warning."""

    timing_log_level: Literal[0, 1, 2] = 0
    """1 and above: print the time split (mean and worst rank) at each --log-interval."""

    profile: bool = False
    """Record steps with torch's profiler: RUN/traces/profile_rank_R.json, for ui.perfetto.dev."""

    profile_step_start: Whole = 10
    """First step that --profile records."""

    profile_step_end: Whole = 12
    """The step before which --profile stops."""

    profile_ranks: list[Whole] | None = None
    """Ranks that --profile records. Default: all."""

    use_pytorch_profiler: bool = False
    """Kept for Megatron-LM's scripts: --profile always uses torch's profiler."""

    pytorch_profiler_collect_shapes: bool = False
    """Record the shapes of the tensors, too."""

    pytorch_profiler_collect_callstack: bool = False
    """Record Python's call stacks, too."""

    trace_schedule: list[Whole] | None = None
    """Steps of which RUN/traces/schedule_step_N.json shows what every rank did when: forward and
    backward of each micro-batch, waiting, collectives."""

    record_memory_history: bool = False
    """CUDA: keep the stacks of allocations for the snapshot of an out-of-memory error."""

    prometheus_textfile: str | None = None
    """File that rank 0 rewrites at each --log-interval in Prometheus' text format."""

    prometheus_port: Port | None = None
    """Port of 127.0.0.1 where rank 0 answers GET /metrics in Prometheus' text format."""

    wandb_project: str | None = None
    """Weights & Biases project."""

    wandb_exp_name: str | None = None
    """Weights & Biases run name."""

    wandb_entity: str | None = None
    """Weights & Biases entity."""

    wandb_save_dir: str | None = None
    """Weights & Biases local folder."""
