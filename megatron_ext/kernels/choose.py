"""Whether a layer of experts runs on the kernels: --moe-kernels, decided once when it is built.

torch   index_select, embedding_bag and torch.nn.functional.grouped_mm: the default
triton  this package: gathers, grouped products, SwiGLU and sums of Triton

Which is faster on a GPU is not measured; docs/performance.md has the command. What `triton` does
not serve (biases, other activations and dispatchers, padding to capacity) is refused with the flags
(config/checks/kernels.py), so that nobody trains on another road than the one asked for.
"""

from __future__ import annotations

import os

from megatron_ext.config.checks.kernels import FLAG, missing
from megatron_ext.errors import ConfigError


def uses_triton(asked: str, device_type: str) -> bool:
    """True where the layer runs on the kernels; `asked` is --moe-kernels.

    Raises ConfigError where Triton or the device for it is missing.
    """
    if asked != "triton":
        return False
    not_cuda = "" if device_type == "cuda" else f"; this run's is {device_type}"
    if lacking := missing(not_cuda, os.environ):
        rule, use = lacking
        raise ConfigError(f"{FLAG} triton {rule}", do=use)
    return True


def check_kernels(cfg, device_type: str) -> None:
    """Raises ConfigError, on every rank and before groups are made, where the run that `cfg`
    describes asks for kernels which this device does not have.
    """
    if cfg.transformer.num_moe_experts is not None:
        uses_triton(cfg.moe.moe_kernels, device_type)
