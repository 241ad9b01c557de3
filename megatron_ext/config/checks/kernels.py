"""--moe-kernels triton: what its kernels do not serve, and what they need.

Refused rather than computed on torch's road: who asks for the kernels would think he had them.
`megatron_ext.kernels.choose` asks once more for the device when it is known.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.util import find_spec

from megatron_ext.config.run_config import RunConfig
from megatron_ext.errors import Violation

FLAG = "--moe-kernels"
TORCH = f"{FLAG} torch"


def missing(not_cuda: str, environ: Mapping[str, str]) -> tuple[str, str] | None:
    """(rule, way out) of what the kernels need and this machine lacks: Triton, which is looked for
    and not imported, or the device. `not_cuda` names a device that is none, "" for CUDA; a CPU has
    the kernels only in Triton's interpreter (TRITON_INTERPRET=1), for tests.
    """
    if find_spec("triton") is None:
        use = f"install a CUDA build of torch, which brings it, or use {TORCH}"
        return "needs Triton, which is not installed", use
    if not_cuda and environ.get("TRITON_INTERPRET") != "1":
        return f"needs a CUDA device{not_cuda}", f"use {TORCH}"
    return None


def _unserved(cfg: RunConfig) -> Iterator[tuple[str, str]]:
    """(rule, way out) of everything in this configuration that the kernels do not compute."""
    t = cfg.transformer
    if cfg.model.transformer_impl != "local":
        yield f"excludes --transformer-impl {cfg.model.transformer_impl}", "use local"
    if t.moe_token_dispatcher_type != "alltoall":
        rule = "needs --moe-token-dispatcher-type alltoall"
        yield f"{rule}, not {t.moe_token_dispatcher_type}", "use alltoall"
    if not cfg.model.swiglu:
        yield "needs --swiglu: no other unit of the experts has a kernel", "add --swiglu"
    if t.add_bias_linear:
        yield "has no biases of experts", "add --disable-bias-linear"
    for name in ("activation_func_clamp_value", "glu_linear_offset"):
        if getattr(t, name):
            yield f"excludes --{name.replace('_', '-')}", "remove it"
    if t.moe_pad_expert_input_to_capacity:
        yield "excludes --moe-pad-expert-input-to-capacity", "remove it: dropping works without"
    for name in ("moe_apply_probs_on_input", "moe_shared_expert_overlap"):
        if getattr(t, name):
            yield f"excludes --{name.replace('_', '-')}", "remove it"


def rules(cfg: RunConfig, environ: Mapping[str, str]) -> Iterator[Violation]:
    """Nothing without experts, or with torch's road."""
    if cfg.moe.moe_kernels != "triton" or cfg.transformer.num_moe_experts is None:
        return
    for rule, use in _unserved(cfg):
        yield Violation(FLAG, "triton", rule, f"{use}, or {TORCH}")
    if cfg.action != "train" and cfg.parallel.device != "cpu":
        return  # it may be about another machine
    not_cuda = ", not --device cpu" if cfg.parallel.device == "cpu" else ""
    if lacking := missing(not_cuda, environ):
        yield Violation(FLAG, "triton", *lacking)
