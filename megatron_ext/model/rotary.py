"""Rotary position embedding by halves, written straight into the layout of the attention products.

    out_a = a cos - b sin,   out_b = b cos + a sin          (Su et al. 2021, arXiv:2104.09864)

(a, b) are the first and second half of the rotated part of a head, or its even and odd numbers
(--rotary-interleaved). megatron-core 0.16.1 computes cos and sin in every layer and concatenates
negated halves; here the angles are turned into tables once, and four products write the result
where the next matrix product reads it. The gradient is the rotation by the negated angle.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ext.native import loops


@dataclass(frozen=True)
class Rotation:
    """`cos` and `sin` [S, 1, R / 2], times `scale`, for heads of which the first R numbers turn."""

    cos: Tensor
    sin: Tensor
    interleaved: bool
    scale: float = 1.0

    @property
    def width(self) -> int:
        """R."""
        return 2 * self.cos.shape[-1]

    def halves(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The views (a, b) of x [..., D], each [..., R / 2]."""
        if self.interleaved:
            return x[..., 0 : self.width : 2], x[..., 1 : self.width : 2]
        return x[..., : self.width // 2], x[..., self.width // 2 : self.width]


@functools.lru_cache(maxsize=8)
def rotation(
    angles: Tensor,
    dtype: torch.dtype,
    *,
    interleaved: bool = False,
    concentration: float = 1.0,
    scale: float = 1.0,
) -> Rotation:
    """Tables from megatron-core's angles [S, 1, 1, R], in which each angle stands twice.

    `concentration` multiplies what turns (YaRN), `scale` all of the head. Kept for the next layers
    and steps: megatron-core hands out the same tensor of angles for the same length.
    """
    half = angles.shape[-1] // 2
    once = angles[..., ::2] if interleaved else angles[..., :half]
    once = once.reshape(angles.shape[0], 1, half).float()
    cos, sin = (table * (concentration * scale) for table in (once.cos(), once.sin()))
    return Rotation(cos.to(dtype), sin.to(dtype), interleaved, scale)


def rotate(x: Tensor, turn: Rotation | None, out: Tensor, *, back: bool = False) -> Tensor:
    """x [M, S, h, D] turned by its position's angles, or `back` by their negatives, and scaled,
    into `out` of the same shape, which must not overlap x. A `turn` of None copies.
    """
    if turn is None:
        return out.copy_(x)
    sign = -1 if back else 1
    in_rows = x.stride(-1) == out.stride(-1) == 1 and not turn.interleaved
    if in_rows and loops.serves(x, out, turn.cos, turn.sin):
        return loops.rotate_halves(x, out, turn.cos, turn.sin, turn.scale, sign)
    (a, b), (out_a, out_b) = turn.halves(x), turn.halves(out)
    torch.mul(a, turn.cos, out=out_a).addcmul_(b, turn.sin, value=-sign)
    torch.mul(b, turn.cos, out=out_b).addcmul_(a, turn.sin, value=sign)
    if turn.width < x.shape[-1]:
        torch.mul(x[..., turn.width :], turn.scale, out=out[..., turn.width :])
    return out
