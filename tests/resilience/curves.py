"""Loss and gradient-norm curves of healthy runs, made up from a seed: what a threshold finds.

    python -m tests.resilience.curves --seed 1 --curves 1000 --steps 1000 --threshold 10

A curve falls as a power of the step from a random start to a random floor. The noise of a step is
that of a mean over few or many tokens (0.5 to 4% of the loss, every tenth step of a hard batch with
three times as much, neighbours correlated); the norm falls with the loss, rises in the warm-up and
is log-normal with a standard deviation of 5 to 30%, one step in a hundred twice as wide.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import numpy as np

from megatron_ext.resilience.spikes import Ring, StepNote


def healthy(seed: int, steps: int) -> Iterator[tuple[float, float]]:
    """(loss, gradient norm) of each step."""
    draw = np.random.default_rng(seed)
    floor, start, power = draw.uniform(1.5, 3.0), draw.uniform(6.0, 12.0), draw.uniform(0.2, 0.7)
    width, spread, warmup = (
        draw.uniform(0.005, 0.04),
        draw.uniform(0.05, 0.3),
        draw.integers(1, 200),
    )
    level = draw.uniform(0.1, 3.0)
    carried = 0.0
    for step in range(1, steps + 1):
        trend = floor + (start - floor) * step**-power
        hard = 3.0 if draw.random() < 0.1 else 1.0
        carried = 0.5 * carried + hard * width * draw.standard_normal()
        wide = 2.0 if draw.random() < 0.01 else 1.0
        norm = level * (trend / floor) * (1 + 2 * np.exp(-step / warmup))
        yield trend * (1 + carried), norm * float(np.exp(wide * spread * draw.standard_normal()))


def alarms(seed: int, steps: int, threshold: float, window: int = 64) -> list[int]:
    """Steps of a healthy curve that the rule calls spikes."""
    ring, found = Ring(window, threshold), []
    for step, (loss, norm) in enumerate(healthy(seed, steps), 1):
        if ring.spike(loss, norm):
            found.append(step)
        ring.add(StepNote(step, loss, norm, []))
    return found


def missed(seed: int, threshold: float, factor: float, of_norm: bool, window: int = 64) -> bool:
    """True where a value `factor` times too high in step 300 of a healthy curve is not seen."""
    ring = Ring(window, threshold)
    for step, (loss, norm) in enumerate(healthy(seed, 300), 1):
        if step == 300:
            return not ring.spike(*((loss, norm * factor) if of_norm else (loss * factor, norm)))
        ring.add(StepNote(step, loss, norm, []))
    raise AssertionError("a curve has 300 steps")


def main() -> None:
    """Print false alarms and misses."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--curves", type=int, default=100)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--threshold", type=float, nargs="+", default=[10.0])
    asked = parser.parse_args()
    seeds = range(asked.seed, asked.seed + asked.curves)
    for threshold in asked.threshold:
        found = sum(len(alarms(seed, asked.steps, threshold)) for seed in seeds)
        print(
            f"threshold {threshold:g}: {found} false alarms in {asked.curves * asked.steps} steps"
        )
        for name, of_norm in (("loss", False), ("norm", True)):
            for factor in (1.5, 2.0, 4.0, 10.0):
                lost = [missed(seed, threshold, factor, of_norm) for seed in seeds[:100]]
                print(f"  {name} times {factor:g}: {len(lost) - sum(lost)} of {len(lost)} found")


if __name__ == "__main__":
    main()
