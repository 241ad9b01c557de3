"""How many samples a step takes: constant, or growing with --rampup-batch-size. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Sequence


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


def samples_of_steps(num_steps: int, full: int, rampup: Sequence[int] | None = None) -> int:
    """Samples that the first `num_steps` steps consume."""
    consumed = 0
    for step in range(num_steps):
        if not rampup or consumed >= rampup[2]:
            return consumed + (num_steps - step) * full
        consumed += global_batch_size(consumed, full, rampup)
    return consumed
