"""The random streams of one rank as plain tensors, so that a checkpoint needs no pickle for them.

Streams: Python's `random`, numpy's global one, torch's CPU one, the CUDA device's, and
megatron-core's tracker (data-parallel, tensor-parallel and expert-parallel streams).
"""

from __future__ import annotations

import random
import struct

import numpy as np
import torch
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from torch import Tensor

from megatron_ext.device import current_device

_WORDS = 624  # of a Mersenne Twister


def _bits(value: float) -> int:
    return struct.unpack("<q", struct.pack("<d", value))[0]


def _float(bits: int) -> float:
    return struct.unpack("<d", struct.pack("<q", bits))[0]


def encode_python(state: tuple) -> Tensor:
    """`random.getstate()` -> int64 [628]: version, 624 words, position, has spare Gaussian, its
    bits.
    """
    version, words, spare = state
    return torch.tensor(
        [version, *words, spare is not None, _bits(spare or 0.0)], dtype=torch.int64
    )


def decode_python(encoded: Tensor) -> tuple:
    """The inverse of `encode_python`."""
    version, *words, has_spare, bits = encoded.tolist()
    return version, tuple(words), _float(bits) if has_spare else None


def encode_numpy(state: tuple) -> Tensor:
    """`np.random.get_state()` -> int64 [627]: 624 words, position, has spare Gaussian, its bits."""
    _, words, position, has_spare, spare = state
    return torch.tensor([*words.tolist(), position, has_spare, _bits(spare)], dtype=torch.int64)


def decode_numpy(encoded: Tensor) -> tuple:
    """The inverse of `encode_numpy`."""
    numbers = encoded.tolist()
    position, has_spare, bits = numbers[_WORDS:]
    words = np.array(numbers[:_WORDS], dtype=np.uint32)
    return "MT19937", words, position, has_spare, _float(bits)


def _as_bytes(state) -> Tensor:
    return state.cpu() if torch.is_tensor(state) else state.get_state().cpu()


def capture() -> dict[str, Tensor]:
    """Stream name -> 1-D CPU tensor (int64 or uint8)."""
    streams = {
        "python": encode_python(random.getstate()),
        "numpy": encode_numpy(np.random.get_state()),
        "torch": torch.get_rng_state(),
    }
    if current_device().type == "cuda":
        streams["cuda"] = torch.cuda.get_rng_state()
    for name, state in get_cuda_rng_tracker().get_states().items():
        streams[f"tracker.{name}"] = _as_bytes(state)
    return streams


def restore(streams: dict[str, Tensor]) -> None:
    """Set every stream; the last act of loading, since anything may draw."""
    random.setstate(decode_python(streams["python"]))
    np.random.set_state(decode_numpy(streams["numpy"]))
    torch.set_rng_state(streams["torch"])
    if "cuda" in streams:
        torch.cuda.set_rng_state(streams["cuda"])
    tracker = get_cuda_rng_tracker()
    states = dict(tracker.get_states())
    for name, current in states.items():
        saved = streams[f"tracker.{name}"]
        if torch.is_tensor(current):
            states[name] = saved
        else:  # a generator object, which CUDA graphs need
            current.set_state(saved)
    tracker.set_states(states)
