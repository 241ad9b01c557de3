"""Which kernels a layer gets: asked for by --moe-kernels, decided once when the layer is built.

auto    Triton on a CUDA device where Triton can be imported, else torch
triton  Triton, or an error that says what is missing
torch   index_select, embedding_bag and torch.nn.functional.grouped_mm everywhere
"""

from __future__ import annotations

import importlib.util
import os

import torch

from megatron_ext.errors import ConfigError

FEW_ROWS = 64
"""Mean rows of an expert under which Triton's grouped product is taken: half a tile of CUTLASS's.
Not measured."""


def has_triton() -> bool:
    """Triton is installed; it is not imported."""
    return importlib.util.find_spec("triton") is not None


def uses_triton(asked: str, device_type: str) -> bool:
    """True where the layer runs on the kernels; `asked` is --moe-kernels.

    A CPU has them only in Triton's interpreter (TRITON_INTERPRET=1), for tests.
    """
    is_interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if asked == "triton":
        if not has_triton():
            raise ConfigError(
                "--moe-kernels triton: Triton is not installed",
                do="install a CUDA build of torch, which brings it, or use --moe-kernels auto",
            )
        if device_type == "cpu" and not is_interpreted:
            raise ConfigError(
                "--moe-kernels triton: there is no CUDA device to run them",
                do="use --moe-kernels auto",
            )
        return True
    return asked == "auto" and device_type == "cuda" and has_triton()


def grouped_mm_stays_on_device(dtype: torch.dtype, capability: tuple[int, int]) -> bool:
    """torch's grouped_mm is one kernel for bf16 on compute capability 9 and 10; elsewhere it loops
    over the experts and copies their offsets to the host (torch 2.10's GroupedBlas.cpp).
    """
    return dtype == torch.bfloat16 and capability[0] in (9, 10)


def product_kind(
    asked: str, dtype: torch.dtype, capability: tuple[int, int], rows_per_expert: float
) -> str:
    """ "triton" or "grouped_mm", from shapes and types alone."""
    if asked == "triton" or not grouped_mm_stays_on_device(dtype, capability):
        return "triton"
    return "triton" if rows_per_expert < FEW_ROWS else "grouped_mm"
