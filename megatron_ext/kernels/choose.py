"""Whether a layer of experts runs on the kernels: --moe-kernels, decided once when it is built.

torch   index_select, embedding_bag and torch.nn.functional.grouped_mm: the default
triton  this package: gathers, grouped products, SwiGLU and sums of Triton

Which is faster on a GPU is not measured; docs/performance.md has the command. What `triton` does
not serve (biases, other activations and dispatchers, padding to capacity) is refused with the flags
(config/checks/kernels.py), so that nobody trains on another road than the one asked for.
"""

from __future__ import annotations

import importlib.util
import os

from megatron_ext.errors import ConfigError


def has_triton() -> bool:
    """Triton is installed; it is not imported."""
    return importlib.util.find_spec("triton") is not None


def uses_triton(asked: str, device_type: str) -> bool:
    """True where the layer runs on the kernels; `asked` is --moe-kernels. A CPU has them only in
    Triton's interpreter (TRITON_INTERPRET=1), for tests.

    Raises ConfigError where Triton or the device for it is missing.
    """
    if asked != "triton":
        return False
    if not has_triton():
        raise ConfigError(
            "--moe-kernels triton needs Triton, which is not installed",
            do="install a CUDA build of torch, which brings it, or use --moe-kernels torch",
        )
    if device_type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ConfigError(
            f"--moe-kernels triton needs a CUDA device; this run's is {device_type}",
            do="use --moe-kernels torch",
        )
    return True


def check_kernels(cfg, device_type: str) -> None:
    """Raises ConfigError, on every rank and before groups are made, where the run that `cfg`
    describes asks for kernels which this device does not have.
    """
    if cfg.transformer.num_moe_experts is not None:
        uses_triton(cfg.moe.moe_kernels, device_type)
