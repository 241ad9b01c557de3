"""Compare a layout with one rank. Pure functions over numpy and numbers.

Tolerances and their reasons. fp32: the loss of the first step is a mean over thousands of tokens of
numbers that differ by the order of sums inside matrix products, 1e-6 relative; a gradient tensor
may differ by 1e-5 of its norm; 20 steps of Adam carry that into the losses, 1e-5 relative.
Integers (samples, tokens per expert) are equal.
bf16 keeps 8 bits, so two correct orders of summation differ by about what bf16 differs from fp32.
The band of each gradient tensor is measured: three times the distance of the one-rank bf16 gradient
from the one-rank fp32 gradient (the reference's own rounding, the layout's, and its reductions in
bf16), at least 0.1: a router may choose another expert for a token whose two scores round alike,
and one such token of the model's 256 moves a gradient by 1 / sqrt(256) = 6% of its norm. At most 2%
of the assignments may move. Losses are means: 2e-3, and 5e-3 along the curve.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

Gradients = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Tolerance:
    """Largest relative differences that pass; `flips` is the share of assignments that may move."""

    loss: float
    gradient: float
    curve: float
    flips: float

    def of(self, tensor: str, rounding: Mapping[str, float]) -> float:
        """The tolerance of one gradient tensor, given each tensor's distance of bf16 from fp32."""
        return max(self.gradient, 3 * rounding.get(tensor, 0.0))


TOLERANCES = {
    "fp32": Tolerance(loss=1e-6, gradient=1e-5, curve=1e-5, flips=0.0),
    "bf16": Tolerance(loss=2e-3, gradient=1e-1, curve=5e-3, flips=0.02),
}


@dataclass(frozen=True)
class Comparison:
    """How far a layout is from one rank; `reasons` is empty where it passes."""

    loss: float
    gradient: float
    worst_tensor: str
    flips: float
    curve: float
    reasons: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """True where nothing is out of tolerance."""
        return not self.reasons


def relative(got: float, wanted: float) -> float:
    """|got - wanted| / |wanted|."""
    return abs(got - wanted) / max(abs(wanted), 1e-12)


def tensor_difference(got: np.ndarray, wanted: np.ndarray) -> float:
    """Norm of the difference over the norm of `wanted`; infinite for another shape or holes."""
    if got.shape != wanted.shape or np.isnan(got).any():
        return float("inf")
    norm = float(np.linalg.norm(wanted.astype(np.float64)))
    difference = float(np.linalg.norm(got.astype(np.float64) - wanted.astype(np.float64)))
    return difference / norm if norm else (0.0 if difference == 0 else float("inf"))


def trim_padding(got: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Vocabulary rows may be padded differently (to a multiple of tp): compare the rows that both
    have.
    """
    rows = min(got.shape[0], wanted.shape[0])
    return got[:rows], wanted[:rows]


def worst_gradient(
    got: Gradients, wanted: Gradients, tolerance: Tolerance, rounding: Mapping[str, float]
) -> tuple[float, str]:
    """(relative difference, tensor) of the tensor that is farthest out for its tolerance; one that
    only one side has counts as infinite.
    """
    worst, name, ratio = 0.0, "", 0.0
    for key in sorted(got.keys() | wanted.keys()):
        if key not in got or key not in wanted:
            return float("inf"), f"{key} (only in {'the layout' if key in got else 'one rank'})"
        pair = (got[key], wanted[key])
        if "word_embeddings" in key or "output_layer" in key:
            pair = trim_padding(*pair)
        difference = tensor_difference(*pair)
        if difference / tolerance.of(key, rounding) > ratio:
            worst, name, ratio = difference, key, difference / tolerance.of(key, rounding)
    return worst, name


def moved_assignments(got: Sequence[Sequence[int]], wanted: Sequence[Sequence[int]]) -> float:
    """Share of the assignments that are with another expert, by the counts (0 where equal)."""
    if len(got) != len(wanted):
        return 1.0
    moved = sum(abs(a - b) for row, other in zip(got, wanted) for a, b in zip(row, other)) / 2
    return moved / max(1, sum(map(sum, wanted)))


def rounding_of(bf16: Gradients, fp32: Gradients) -> dict[str, float]:
    """Distance of each bf16 gradient from its fp32 counterpart, relative."""
    return {name: tensor_difference(bf16[name], fp32[name]) for name in bf16.keys() & fp32.keys()}


def compare(
    got: dict, wanted: dict, tolerance: Tolerance, rounding: Mapping[str, float] | None = None
) -> Comparison:
    """Both sides: {"losses", "counts", "samples", "gradients"}; `rounding` widens bf16 bands."""
    rounding = rounding or {}
    loss = relative(got["losses"][0], wanted["losses"][0])
    gradient, tensor = worst_gradient(got["gradients"], wanted["gradients"], tolerance, rounding)
    flips = moved_assignments(got["counts"], wanted["counts"])
    curve = max(relative(a, b) for a, b in zip(got["losses"], wanted["losses"]))
    reasons = []
    if not loss <= tolerance.loss:
        reasons.append(f"first loss differs by {loss:.1e} > {tolerance.loss:.0e}")
    limit = tolerance.of(tensor, rounding)
    if not gradient <= limit:
        reasons.append(f"gradient of {tensor} differs by {gradient:.1e} > {limit:.0e}")
    if flips > tolerance.flips:
        reasons.append(f"{flips:.2%} of the assignments went to other experts")
    if sorted(got["samples"]) != sorted(wanted["samples"]):
        reasons.append("other samples in the first batch")
    if not curve <= tolerance.curve:
        reasons.append(f"loss curve differs by {curve:.1e} > {tolerance.curve:.0e}")
    return Comparison(loss, gradient, tensor, flips, curve, tuple(reasons))
