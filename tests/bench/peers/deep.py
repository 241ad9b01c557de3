"""DeepSpeed's MoE layer in decoder.py's model: `capacity` drops tokens over a factor of 1.0 (its
default), `dropless` gives each expert the places that the fullest needs. On a process without
groups; the engine around the layer (ZeRO) is not used. Auxiliary loss 0.01.
"""

from __future__ import annotations

import os

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.bench.gate import Gate
from tests.bench.peers.decoder import Decoder
from tests.bench.peers.training import initialise
from tests.bench.shapes import Shape

NOTE = "layer in decoder.py, without DeepSpeed's engine; aux loss 0.01"


class Expert(nn.Module):
    """SwiGLU: DeepSpeed leaves the expert to the user."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.up = nn.Linear(shape.hidden, 2 * shape.width, bias=False)
        self.down = nn.Linear(shape.width, shape.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., H]."""
        gate, up = self.up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Deep(nn.Module):
    """Their layer as decoder.py wants it."""

    def __init__(self, shape: Shape, keeps_all: bool) -> None:
        super().__init__()
        from deepspeed.moe.layer import MoE

        self.inner = MoE(
            shape.hidden,
            Expert(shape),
            num_experts=shape.experts,
            k=shape.topk,
            capacity_factor=1.0,
            drop_tokens=not keeps_all,
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, S, H]."""
        y, aux, _ = self.inner(x)
        return y, aux


def model(name: str, shape: Shape, gate: Gate, dtype: torch.dtype) -> nn.Module:
    """name: capacity or dropless."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed.moe.layer  # noqa: F401

    gate.imported()
    made = Decoder(shape, lambda shape: Deep(shape, name == "dropless"))
    return initialise(made).to(dtype)


def layer(name: str, shape: Shape, dtype: torch.dtype) -> nn.Module:
    """One MoE layer."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    return initialise(Deep(shape, name == "dropless")).to(dtype)
