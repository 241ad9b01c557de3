"""Choose the device of this process and make it fast."""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass

import torch

from megatron_ext.device import lift
from megatron_ext.errors import ConfigError
from megatron_ext.native import loops, tensor_memory

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # names of glibc's mallopt(3)
_HEAP_UP_TO = 1 << 30


@dataclass(frozen=True)
class Device:
    """The device of this rank; `kind` is "cpu" or "cuda", `backend` the collectives' library,
    `kernels` who makes the row-wise steps of a CPU, in words.
    """

    kind: str
    backend: str
    kernels: str = "torch"

    @property
    def torch_device(self) -> torch.device:
        return current_device()


def current_device() -> torch.device:
    """The device on which this rank's tensors live (the CPU exactly when megatron-core was lifted
    to it).
    """
    if lift.is_lifted():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def _mallopt(name: int, value: int) -> None:
    try:
        ctypes.CDLL("libc.so.6").mallopt(name, value)
    except (OSError, AttributeError):
        return  # not glibc: its allocator has other habits and no such knob


def keep_large_blocks() -> None:
    """Stop glibc from returning tensors over 32 MB to the kernel at every free: 9x on large
    element-wise work.
    """
    _mallopt(_M_MMAP_THRESHOLD, _HEAP_UP_TO)
    _mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def medium_matmul_keeps_float32() -> bool:
    """True when "medium" fp32 matrix products are still fp32 here (oneDNN on AMD) and not bf16
    (AMX).
    """
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(256, 256, generator=generator) for _ in range(2))
    exact = a.double() @ b.double()
    torch.set_float32_matmul_precision("medium")
    error = ((a @ b).double() - exact).abs().max().item()
    torch.set_float32_matmul_precision("highest")
    return error < 1e-4


def _tune_cpu(local_world_size: int) -> None:
    keep_large_blocks()
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_world_size))
    if medium_matmul_keeps_float32():
        torch.set_float32_matmul_precision("medium")


def _choose_kernels(asked: str) -> str:
    """What is used, in words."""
    why_not = loops.use(asked)
    if why_not and asked == "native":
        raise ConfigError(
            f"--cpu-kernels native cannot be compiled here: {why_not}",
            do="install g++, or use --cpu-kernels auto",
        )
    if why_not:
        return f"torch ({why_not})"
    why_not = tensor_memory.use()
    return f"native, tensors in torch's memory ({why_not})" if why_not else "native"


def start(requested: str = "auto", backend: str | None = None, cpu_kernels: str = "auto") -> Device:
    """Choose ("auto": CUDA where there is one), tune, lift and correct. Raises ConfigError for
    --device cuda without one, and for --cpu-kernels native without a compiler.
    """
    has_cuda = torch.cuda.is_available()
    if requested == "cuda" and not has_cuda:
        raise ConfigError(
            "--device cuda: torch finds no CUDA device here",
            do="use --device cpu, or install a CUDA build of torch",
        )
    kind = "cuda" if has_cuda and requested != "cpu" else "cpu"
    if kind == "cpu":
        _tune_cpu(int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        kernels = _choose_kernels(cpu_kernels)
        lift.lift()
    else:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    from megatron_ext.device import corrections

    corrections.apply(kind)
    if kind == "cpu":
        return Device(kind, "gloo", kernels)
    return Device(kind, backend or "nccl")
