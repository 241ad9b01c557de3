"""What a step changes before the optimizer does, put back so that the same step can run again.

Weights and optimizer are not touched before the update. Forward and backward passes (and
megatron-core's `finalize_model_grads`) change: random streams, the buffers of the modules (expert
bias and its counters, the running counts of the global balance loss) and, with fp16, the loss
scale. Gradient buffers are zeroed at the start of every attempt, tallies and the tracker of the
multi-token-prediction loss are emptied by every attempt.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from torch import Tensor, nn

from megatron_ext.device import current_device


def _streams() -> list[tuple[Callable, object]]:
    """(function that sets it, value now) of every random stream of this rank."""
    tracker = get_cuda_rng_tracker()
    states = tracker.get_states()
    streams: list[tuple[Callable, object]] = [
        (random.setstate, random.getstate()),
        (np.random.set_state, np.random.get_state()),
        (torch.set_rng_state, torch.get_rng_state()),
    ]
    if current_device().type == "cuda":
        streams.append((torch.cuda.set_rng_state, torch.cuda.get_rng_state()))
    for generator in states.values():
        if not torch.is_tensor(generator):  # a generator object, which CUDA graphs need
            streams.append((generator.set_state, generator.get_state()))
    kept = {k: v.clone() if torch.is_tensor(v) else v for k, v in states.items()}
    streams.append((tracker.set_states, kept))
    return streams


def _scalers(optimizer) -> list:
    leaves = getattr(optimizer, "chained_optimizers", [optimizer])
    scalers = (getattr(leaf, "grad_scaler", None) for leaf in leaves)
    return [scaler for scaler in scalers if scaler is not None]


@dataclass(frozen=True)
class Snapshot:
    """The state before a step's forward passes; small: no weight, no gradient, no moment."""

    buffers: list[tuple[Tensor, Tensor]]
    streams: list[tuple[Callable, object]]
    scalers: list[tuple[object, dict]]

    @classmethod
    def take(cls, chunks: Sequence[nn.Module], optimizer) -> Snapshot:
        """Copies of this rank's buffers, random streams and loss scales."""
        models = [getattr(chunk, "module", chunk) for chunk in chunks]  # DDP.buffers is a list
        buffers = [buffer for model in models for buffer in model.buffers()]
        scalers = [
            (scaler, {k: _copied(v) for k, v in scaler.state_dict().items()})
            for scaler in _scalers(optimizer)
        ]
        return cls([(one, one.detach().clone()) for one in buffers], _streams(), scalers)

    @torch.no_grad()
    def restore(self) -> None:
        """Put everything back, bit for bit; may be called again."""
        for buffer, value in self.buffers:
            buffer.copy_(value)
        for scaler, state in self.scalers:
            scaler.load_state_dict({k: _copied(v) for k, v in state.items()})
        for put, value in self.streams:
            put(dict(value) if isinstance(value, dict) else value)


def _copied(value):
    return value.clone() if torch.is_tensor(value) else value
