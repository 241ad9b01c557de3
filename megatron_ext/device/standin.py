"""What megatron-core finds under the name `torch.cuda` on a machine that runs on its CPU.

One device, one stream, events that are always done, and the CPU's own random generator. Only names
that megatron-core 0.16.1 really reaches on its training path are here, so that a new one shows as
an AttributeError.
"""

from __future__ import annotations

import contextlib
import resource
import types

import torch

_CPU = torch.device("cpu")


def is_available() -> bool:
    return False


def is_initialized() -> bool:
    return False


def is_current_stream_capturing() -> bool:
    return False


def current_device() -> torch.device:
    return _CPU


def device_count() -> int:
    """One: megatron-core divides ranks by it."""
    return 1


def set_device(device) -> None:
    """There is one device; nothing to choose."""


def synchronize(device=None) -> None:
    """CPU work is done when the call returns."""


def empty_cache() -> None:
    """There is no caching allocator."""


def get_device_capability(device=None) -> tuple[int, int]:
    return (0, 0)


def get_device_properties(device=None) -> types.SimpleNamespace:
    return types.SimpleNamespace(multi_processor_count=1, total_memory=0, name="cpu")


def max_memory_allocated(device=None) -> int:
    """Peak resident memory of this process in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


memory_allocated = max_memory_reserved = memory_reserved = max_memory_allocated


class Event:
    """An event of the only stream: done as soon as it is recorded."""

    def __init__(self, *args, **kwargs) -> None:
        pass

    def record(self, stream=None) -> None:
        pass

    def wait(self, stream=None) -> None:
        pass

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass


class Stream:
    """The only stream."""

    def __init__(self, *args, **kwargs) -> None:
        pass

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *exc) -> None:
        pass

    def wait_stream(self, stream) -> None:
        pass

    def wait_event(self, event) -> None:
        pass

    def record_event(self, event=None) -> Event:
        return event or Event()

    def synchronize(self) -> None:
        pass


class CUDAGraph:
    """A type for isinstance checks; graphs do not exist on a CPU."""


class Tensor:
    """A type for isinstance checks."""


HalfTensor, FloatTensor, BFloat16Tensor = torch.HalfTensor, torch.FloatTensor, torch.BFloat16Tensor


def current_stream(device=None) -> Stream:
    return Stream()


default_stream = current_stream


def stream(stream: Stream | None):
    return contextlib.nullcontext()


@contextlib.contextmanager
def device(device=None):
    yield


def get_rng_state(device=None) -> torch.Tensor:
    return torch.get_rng_state()


def set_rng_state(state: torch.Tensor, device=None) -> None:
    torch.set_rng_state(state)


def manual_seed(seed: int) -> None:
    torch.manual_seed(seed)


manual_seed_all = manual_seed


def _lazy_init() -> None:
    """CUDA starts lazily, a CPU is always there."""


def _lazy_call(callback) -> None:
    callback()


random = types.SimpleNamespace(get_rng_state=get_rng_state, set_rng_state=set_rng_state)
nvtx = types.SimpleNamespace(
    range_push=lambda message: None,
    range_pop=lambda: None,
    range=lambda message: contextlib.nullcontext(),
)
amp = types.SimpleNamespace(
    custom_fwd=lambda fwd=None, **_: fwd or (lambda f: f),
    custom_bwd=lambda bwd=None, **_: bwd or (lambda f: f),
)
