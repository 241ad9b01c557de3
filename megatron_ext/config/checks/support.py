"""What this release, or this machine, cannot do: refused rather than silently done otherwise."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

from megatron_ext.config.run_config import RunConfig
from megatron_ext.errors import Violation

LOCAL_ONLY: tuple[tuple[str, tuple, str], ...] = (
    ("experimental_attention_variant", (None,), "remove it"),
    ("linear_attention_freq", (None,), "remove it"),
    ("moe_latent_size", (None,), "use --transformer-impl transformer_engine, or remove it"),
    ("heterogeneous_block_specs", (False,), "remove it"),
    ("hybrid_context_parallel", (False,), "remove it"),
    ("attention_output_gate", (False,), "remove it"),
    ("batch_invariant_mode", (False,), "remove it"),
    ("symmetric_ar_type", (None,), "remove it"),
    ("inference_fuse_tp_communication", (False,), "remove it"),
)
"""megatron-core field, the values that our local layers build, the way out."""


def rules(cfg: RunConfig) -> Iterator[Violation]:
    """Missing packages and features."""
    yield from _implementation(cfg)
    yield from _dispatcher(cfg)
    if (
        cfg.optimizer.optimizer in ("muon", "dist_muon")
        and find_spec("emerging_optimizers") is None
    ):
        yield Violation(
            "--optimizer",
            cfg.optimizer.optimizer,
            "needs the package emerging_optimizers, which is not installed",
            "use --optimizer adam, or install it from NVIDIA's source",
        )


def _implementation(cfg: RunConfig) -> Iterator[Violation]:
    if cfg.model.transformer_impl == "transformer_engine":
        if cfg.parallel.device == "cpu":
            yield Violation(
                "--transformer-impl",
                "transformer_engine",
                "needs CUDA, not --device cpu",
                "use --transformer-impl local",
            )
        if cfg.action == "train" and find_spec("transformer_engine") is None:
            yield Violation(
                "--transformer-impl",
                "transformer_engine",
                "needs Transformer Engine, which is not installed",
                "pip install -r requirements-gpu.txt, or --transformer-impl local",
            )
        return
    for name, legal, use in LOCAL_ONLY:
        value = getattr(cfg.transformer, name)
        if value not in legal:
            yield Violation(
                "--" + name.replace("_", "-"),
                value,
                "is not built by --transformer-impl local",
                use,
            )


def _dispatcher(cfg: RunConfig) -> Iterator[Violation]:
    t = cfg.transformer
    flex = t.moe_token_dispatcher_type == "flex"
    if t.moe_enable_deepep and not flex:
        yield Violation(
            "--moe-enable-deepep",
            None,
            "needs --moe-token-dispatcher-type flex",
            "add it, or remove --moe-enable-deepep",
        )
    if t.num_moe_experts is None or not flex:
        return
    if cfg.action == "train" and find_spec("deep_ep") is None:
        yield Violation(
            "--moe-token-dispatcher-type",
            "flex",
            f"needs DeepEP ({t.moe_flex_dispatcher_backend}), which is not installed",
            "use alltoall, or install DeepEP from its source",
        )
    ranks = cfg.parallel.expert_model_parallel_size * cfg.parallel.expert_tensor_parallel_size
    if ranks == 1:
        yield Violation(
            "--moe-token-dispatcher-type", "flex", "needs ep*etp > 1, not 1", "use alltoall"
        )
