"""What a run says about itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ObserveSection:
    """Run directory, logs, TensorBoard, wandb."""

    run_dir: str | None = None
    """The run's folder. Default: runs/<config name, or 'pretrain'>-<time>."""

    log_interval: int = 100
    """Steps between log lines."""

    tensorboard_dir: str | None = None
    """Folder of the event files. Default: RUN/tensorboard."""

    tensorboard_log_interval: int = 1
    """Steps between TensorBoard points."""

    tensorboard_queue_size: int = 1000
    """Events held in memory before a write."""

    log_throughput: bool = False
    """Log TFLOP/s a rank."""

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

    logging_level: int | None = None
    """Python's logging level: 10 debug, 20 info, 30 warning."""

    timing_log_level: Literal[0, 1, 2] = 0
    """Detail of the timers."""

    wandb_project: str | None = None
    """Weights & Biases project."""

    wandb_exp_name: str | None = None
    """Weights & Biases run name."""

    wandb_entity: str | None = None
    """Weights & Biases entity."""

    wandb_save_dir: str | None = None
    """Weights & Biases local folder."""
