"""Compare a layout with one rank. Pure functions over numpy and numbers.

Tolerances and their reasons (fp32): the loss of the first step is a mean over thousands of tokens
of numbers that differ by the order of sums inside matrix products, 1e-6 relative; a gradient tensor
may differ by 1e-5 of its norm; 20 steps of Adam carry that into the losses, 1e-5 relative. bf16
keeps 8 bits, 2^-8 = 4e-3: the same quantities are held to 2e-3 (a mean), 5e-2 (a gradient tensor,
whose terms are rounded before they are added) and 5e-3. Integers (samples, and in fp32 tokens per
expert) are equal; in bf16 a router may choose another expert for a token whose two scores round
alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Tolerance:
    """Largest relative differences that pass; `flips` is the share of assignments that may move."""

    loss: float
    gradient: float
    curve: float
    flips: float


TOLERANCES = {
    "fp32": Tolerance(loss=1e-6, gradient=1e-5, curve=1e-5, flips=0.0),
    "bf16": Tolerance(loss=2e-3, gradient=5e-2, curve=5e-3, flips=0.02),
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


def worst_gradient(got: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> tuple[float, str]:
    """(largest relative difference, its tensor); a tensor that only one side has counts as
    infinite.
    """
    worst, name = 0.0, ""
    for key in sorted(got.keys() | wanted.keys()):
        if key not in got or key not in wanted:
            return float("inf"), f"{key} (only in {'the layout' if key in got else 'one rank'})"
        pair = (got[key], wanted[key])
        if "word_embeddings" in key or "output_layer" in key:
            pair = trim_padding(*pair)
        difference = tensor_difference(*pair)
        if difference > worst:
            worst, name = difference, key
    return worst, name


def moved_assignments(got: Sequence[Sequence[int]], wanted: Sequence[Sequence[int]]) -> float:
    """Share of the assignments that are with another expert, by the counts (0 where equal)."""
    if len(got) != len(wanted):
        return 1.0
    moved = sum(abs(a - b) for row, other in zip(got, wanted) for a, b in zip(row, other)) / 2
    return moved / max(1, sum(map(sum, wanted)))


def compare(got: dict, wanted: dict, tolerance: Tolerance) -> Comparison:
    """Both sides: {"losses", "counts", "samples", "gradients"}."""
    loss = relative(got["losses"][0], wanted["losses"][0])
    gradient, tensor = worst_gradient(got["gradients"], wanted["gradients"])
    flips = moved_assignments(got["counts"], wanted["counts"])
    curve = max(relative(a, b) for a, b in zip(got["losses"], wanted["losses"]))
    reasons = []
    if not loss <= tolerance.loss:
        reasons.append(f"first loss differs by {loss:.1e} > {tolerance.loss:.0e}")
    if not gradient <= tolerance.gradient:
        reasons.append(f"gradient of {tensor} differs by {gradient:.1e} > {tolerance.gradient:.0e}")
    if flips > tolerance.flips:
        reasons.append(f"{flips:.2%} of the assignments went to other experts")
    if sorted(got["samples"]) != sorted(wanted["samples"]):
        reasons.append("other samples in the first batch")
    if not curve <= tolerance.curve:
        reasons.append(f"loss curve differs by {curve:.1e} > {tolerance.curve:.0e}")
    return Comparison(loss, gradient, tensor, flips, curve, tuple(reasons))
