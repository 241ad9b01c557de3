"""Where a run ends: its steps and its samples, from one rule. Pure arithmetic.

    size    samples of a step: constant, or growing with --rampup-batch-size
    end_of  the last step and the samples consumed by then, from wherever the run is

The loop's last step, the length of the training data, the schedule of the learning rate, the dry
run and the log lines all ask `end_of`, so no two of them can differ. A partial last batch of
--train-samples is dropped, as in Megatron-LM.

A resume may take another batch (--accept-change): the rest is counted from where it begins, for
instance --train-iters 12, saved at step 6 with 8 samples a step and resumed with 4: End(12, 72).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class End(NamedTuple):
    """Where a run ends."""

    step: int
    """Its last step."""
    samples: int
    """What all steps have consumed by then, those before a resume included."""


def global_batch_size(
    consumed_samples: int,
    full: int,
    rampup: Sequence[int] | None = None,
    multiple: int = 1,
    round_down: bool = False,
) -> int:
    """Samples of the step that starts at `consumed_samples`.

    `rampup` = (start, increment, samples): the batch grows by `increment` in equal stretches of
    `samples` until it is `full` (Megatron-LM's rule). With `round_down` it is cut to a multiple of
    micro-batch-size * dp.
    """
    size = full
    if rampup and consumed_samples < rampup[2]:
        start, increment, samples = rampup
        stretches = (full - start) // increment
        samples_per_stretch = samples / stretches if stretches else samples
        size = min(full, start + int(consumed_samples / samples_per_stretch) * increment)
    return size // multiple * multiple if round_down else size


def size(train, multiple: int, consumed_samples: int) -> int:
    """Samples of the next global batch. `multiple`: micro-batch-size * dp."""
    return global_batch_size(
        consumed_samples,
        train.global_batch_size,
        train.rampup_batch_size,
        multiple,
        train.decrease_batch_size_if_needed,
    )


def end_of(train, multiple: int, step: int = 0, consumed_samples: int = 0) -> End:
    """Where a run that is at (`step`, `consumed_samples`) ends: after --train-iters, or before the
    first batch that --train-samples do not fill.
    """
    by_steps = train.train_iters is not None
    ramp_ends = train.rampup_batch_size[2] if train.rampup_batch_size else 0
    last = train.train_iters if by_steps else train.train_samples
    while consumed_samples < ramp_ends:
        batch = size(train, multiple, consumed_samples)
        if (step + 1 if by_steps else consumed_samples + batch) > last:
            return End(step, consumed_samples)
        step, consumed_samples = step + 1, consumed_samples + batch
    full = size(train, multiple, consumed_samples)
    more = max(0, last - step if by_steps else (last - consumed_samples) // full)
    return End(step + more, consumed_samples + more * full)
