"""Loss and gradient-norm spikes: a ring of the last steps, a robust threshold, a file of evidence.

    ring = Ring(window=64, threshold=10)
    ring.spike(loss, norm)      # None, or which of the two is how far out
    ring.add(step, loss, norm, sample_ids)

A value is a spike where it lies more than `threshold` deviations above the median of the ring; a
deviation is 1.4826 times the median absolute deviation (the standard deviation of a normal
distribution), at least 5% of the median, so that a very quiet curve raises no alarm.
"""

from __future__ import annotations

import json
import math
import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

FEWEST = 16
"""Steps that the ring holds at least."""
SETTLED = 40
"""Steps in the ring (or all that it holds) before anything is called a spike: gradient norms of a
warm-up are wild (five quickstarts: up to 15 deviations at step 20, at most 3.3 from step 40 on).
"""
FLOOR = 0.05


@dataclass(frozen=True)
class StepNote:
    """One step as the ring keeps it; `sample_ids`: this rank's, [micro-batches][B]."""

    step: int
    lm_loss: float
    grad_norm: float
    sample_ids: list[list[int]]


def deviations(value: float, before: Sequence[float]) -> float:
    """How many robust deviations `value` lies above the median of `before`."""
    median = statistics.median(before)
    mad = statistics.median(abs(one - median) for one in before)
    scale = max(1.4826 * mad, FLOOR * abs(median), 1e-12)
    return (value - median) / scale


class Ring:
    """The last `window` steps of this rank; `threshold` 0 never finds a spike."""

    def __init__(self, window: int, threshold: float) -> None:
        self.threshold = threshold
        self.notes: deque[StepNote] = deque(maxlen=max(window, FEWEST))

    def spike(self, lm_loss: float, grad_norm: float | None) -> str | None:
        """What is out of line, as text, or None; the same on all ranks, as its arguments are."""
        if not self.threshold or len(self.notes) < min(SETTLED, self.notes.maxlen):
            return None
        for name, value in (("lm_loss", lm_loss), ("grad_norm", grad_norm)):
            if value is None or not math.isfinite(value):
                continue
            before = [getattr(note, name) for note in self.notes]
            distance = deviations(value, before)
            if distance > self.threshold:
                median = statistics.median(before)
                return f"{name} {value:.6g} is {distance:.1f} deviations above {median:.6g}"
        return None

    def add(self, note: StepNote) -> None:
        """Remember a finished step; steps without finite numbers are left out."""
        if math.isfinite(note.lm_loss) and math.isfinite(note.grad_norm):
            self.notes.append(note)


def write(folder: Path, step: int, what: str, rings: Sequence[dict]) -> Path:
    """RUN/spike_step_N.json: the last steps of each data-parallel rank with their samples."""
    path = folder / f"spike_step_{step}.json"
    path.write_text(json.dumps({"step": step, "what": what, "ranks": list(rings)}, indent=1))
    return path


def as_json(dp_rank: int, notes: Sequence[StepNote]) -> dict:
    """The ring of one data-parallel rank."""
    return {"dp": dp_rank, "steps": [asdict(note) for note in notes]}
