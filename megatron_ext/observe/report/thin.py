"""Long things made short for the page; pure functions."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

MAX_POINTS = 800
LEVELS_PER_EVEN = 50
"""A load is stored as a byte: this many steps for an even load, so up to 5.1 times an even one."""

Point = tuple[float, float]


def extremes(points: Sequence[Point], limit: int = MAX_POINTS) -> list[Point]:
    """At most about `limit` points: of each run of neighbours the lowest and the highest, so that
    no spike is lost, and one that is not finite; the first and the last stay.
    """
    if len(points) <= limit:
        return list(points)
    size = math.ceil(2 * len(points) / limit)
    kept: set[int] = {0, len(points) - 1}
    for start in range(0, len(points), size):
        span = range(start, min(start + size, len(points)))
        bad = [index for index in span if not math.isfinite(points[index][1])]
        good = [index for index in span if math.isfinite(points[index][1])]
        ordered = sorted(good, key=lambda index: points[index][1])
        kept.update(bad[:1], ordered[:1], ordered[-1:])
    return [points[index] for index in sorted(kept)]


def every(items: Sequence[Any], limit: int) -> list[Any]:
    """At most `limit` items at equal distances; the first and the last stay."""
    if len(items) <= limit:
        return list(items)
    if limit < 2:
        return [items[-1]]
    places = {round(index * (len(items) - 1) / (limit - 1)) for index in range(limit)}
    return [items[index] for index in sorted(places)]


def relative(counts: np.ndarray) -> np.ndarray:
    """Counts over the last axis' mean: 1 is an even load; rows without a count stay 0."""
    counts = np.asarray(counts, dtype=float)
    mean = counts.mean(axis=-1, keepdims=True)
    return np.divide(counts, mean, out=np.zeros_like(counts), where=mean > 0)


def packed(values: np.ndarray, per_unit: float = LEVELS_PER_EVEN) -> str:
    """Numbers from 0 as bytes in base64. A number over 0 never becomes 0: only dead ones do."""
    values = np.asarray(values, dtype=float)
    levels = np.clip(np.rint(values * per_unit), 0, 255)
    levels = np.where((values > 0) & (levels == 0), 1, levels)
    return base64.b64encode(levels.astype(np.uint8).tobytes()).decode()


def rounded(value: Any) -> Any:
    """Floats with 6 significant digits; what JSON cannot say becomes None."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value
