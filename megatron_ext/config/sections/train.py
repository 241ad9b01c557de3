"""How long, in what batches, in what precision, and when to stop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_ext.ranges import Chance, Count, NotNegative, Seed, Size, Whole


@dataclass(frozen=True)
class TrainSection:
    """The loop."""

    micro_batch_size: Size | None = None
    """Sequences of one forward pass on one rank."""

    global_batch_size: Size | None = None
    """Sequences of one step over all ranks. Default: micro-batch-size * dp."""

    rampup_batch_size: list[Whole] | None = None
    """Start, increment, samples: the global batch grows linearly from start to its full size."""

    decrease_batch_size_if_needed: bool = False
    """Round a global batch down where micro-batch-size * dp does not divide it."""

    train_iters: Count | None = None
    """Steps of the run; excludes --train-samples."""

    train_samples: Count | None = None
    """Sequences of the run; excludes --train-iters."""

    bf16: bool = False
    """Weights and activations in bfloat16, master weights in fp32."""

    fp16: bool = False
    """Weights and activations in float16 with loss scaling."""

    seed: Seed = 1234
    """Seed of weights, dropout and data order."""

    data_parallel_random_init: bool = False
    """Different weights on each data-parallel rank; for experiments with ensembles."""

    eval_iters: Whole = 100
    """Batches of one evaluation."""

    eval_interval: Whole | None = None
    """Steps between evaluations; None: only at the end."""

    eval_only: bool = False
    """Load, evaluate, exit."""

    skip_train: bool = False
    """Megatron-LM's spelling of --eval-only."""

    full_validation: bool = False
    """Evaluate on the whole validation set instead of --eval-iters batches."""

    exit_interval: Count | None = None
    """Exit after the step that this number divides."""

    exit_duration_in_mins: Whole | None = None
    """Save and exit after this many minutes."""

    exit_signal_handler: bool = False
    """Save and exit also on --exit-signal; SIGTERM, SIGUSR1 and SIGUSR2 do it by themselves."""

    exit_signal: str = "SIGTERM"
    """Signal of --exit-signal-handler: a name such as SIGHUP, or its number."""

    manual_gc: bool = False
    """Collect Python garbage at chosen steps only, on all ranks together."""

    manual_gc_interval: Whole = 0
    """Steps between manual collections; 0: none during training."""

    iterations_to_skip: list[Whole] | None = None
    """Steps, numbered as in metrics.jsonl, that read their data and do nothing else: no update, no
    step of the schedule, no record. Megatron-LM before 0.18 counts them from 0."""

    @property
    def params_dtype(self) -> Literal["fp32", "fp16", "bf16"]:
        """Name of the weights' type."""
        if self.bf16:
            return "bf16"
        return "fp16" if self.fp16 else "fp32"


@dataclass(frozen=True)
class ScheduleSection:
    """Learning rate and weight decay over the run."""

    lr: NotNegative | None = None
    """Highest learning rate."""

    min_lr: NotNegative = 0.0
    """Lowest learning rate of the decay."""

    lr_decay_style: Literal["constant", "linear", "cosine", "inverse-square-root", "WSD"] = "linear"
    """Shape of the decay."""

    lr_decay_iters: Count | None = None
    """Steps until min-lr. Default: train-iters."""

    lr_decay_samples: Count | None = None
    """Sequences until min-lr. Default: train-samples."""

    lr_warmup_iters: Whole = 0
    """Steps of linear warm-up."""

    lr_warmup_samples: Whole = 0
    """Sequences of linear warm-up."""

    lr_warmup_fraction: Chance | None = None
    """Warm-up as a share of the decay, 0 to 1; excludes the two above."""

    lr_warmup_init: NotNegative = 0.0
    """Learning rate at the start of the warm-up."""

    lr_wsd_decay_style: Literal["exponential", "linear", "cosine", "minus_sqrt"] = "exponential"
    """Shape of WSD's last phase."""

    lr_wsd_decay_iters: Count | None = None
    """Steps of WSD's last phase."""

    lr_wsd_decay_samples: Count | None = None
    """Sequences of WSD's last phase."""

    start_weight_decay: NotNegative | None = None
    """Weight decay at the start. Default: weight-decay."""

    end_weight_decay: NotNegative | None = None
    """Weight decay at the end. Default: weight-decay."""

    weight_decay_incr_style: Literal["constant", "linear", "cosine"] = "constant"
    """Shape of the way from start to end weight decay."""

    override_opt_param_scheduler: bool = False
    """The flags' schedule, not the checkpoint's."""

    use_checkpoint_opt_param_scheduler: bool = False
    """The checkpoint's schedule, not the flags'."""
