"""How the kernels are launched: tuning lists that never change a result, and Triton's interpreter.

Every list of configurations varies only what leaves each output's order of summation alone (tile
height and width, warps, stages); the block along a sum is fixed, and tiles that the compiler gives
to another tensor-core instruction are not offered together (`grouped_gemm`). So a tuner that picks
differently after a restart should not move a resumed run (not verified on a GPU). The interpreter
takes the first configuration.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
from torch import Tensor

INTERPRETED = triton.knobs.runtime.interpret


def tuned(configs: list[triton.Config], key: list[str], offered: Callable | None = None):
    """`triton.autotune` over the list on a GPU, its first entry in the interpreter.
    `offered(configs, arguments, **arguments)`: those that fit a call; it may read what `key` names
    and dtypes.
    """
    if INTERPRETED:
        return triton.autotune(configs=configs[:1], key=key)
    prune = None if offered is None else {"early_config_prune": offered}
    return triton.autotune(configs=configs, key=key, prune_configs_by=prune)


def bucket(count: int) -> int:
    """The next power of two: a tuning key that does not change with every micro-batch."""
    return 1 << max(count - 1, 0).bit_length()


def precision(tensor: Tensor) -> str:
    """What tl.dot does with fp32: torch's own setting. bf16 always accumulates in fp32."""
    exact = tensor.dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest"
    return "ieee" if exact else "tf32"


def rows_contiguous(matrix: Tensor) -> Tensor:
    """The matrix itself if its rows are contiguous (an expanded gradient's are not)."""
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()
