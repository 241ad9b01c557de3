"""Mixtral (Jiang et al. 2024, arXiv:2401.04088): top-k of the logits, then softmax over the k."""

from __future__ import annotations

from typing import Any

from megatron_ext.config import RunConfig
from megatron_ext.hf.architectures.decoder import (
    ATTENTION,
    NORMS,
    Architecture,
    balance,
    balance_config,
    base_config,
    base_flags,
    ends,
    experts,
    sliding_layers,
    windows,
)
from megatron_ext.hf.entries import Row
from megatron_ext.hf.source import Source

LAYER = [
    *NORMS,
    *ATTENTION,
    Row("mlp.router.weight", {"block_sparse_moe.gate.weight": "E H"}, where="moe"),
    *experts(
        "block_sparse_moe.experts.{e}.w1.weight",
        "block_sparse_moe.experts.{e}.w3.weight",
        "block_sparse_moe.experts.{e}.w2.weight",
    ),
]


def flags(c: Source) -> dict[str, Any]:
    """Its flags. transformers normalises the k weights, which is a softmax over the k logits."""
    c.fixed(router_jitter_noise=0.0)
    width, layers = c.need("intermediate_size"), c.need("num_hidden_layers")
    window = c.get("sliding_window", None) is not None
    return {
        **base_flags(c),
        **balance(c, 0.001),
        **windows(c, [window] * layers),
        "layernorm_epsilon": c.get("rms_norm_eps", 1e-5),
        "ffn_hidden_size": width,
        "moe_ffn_hidden_size": width,
        "num_moe_experts": c.need("num_local_experts"),
        "moe_router_topk": c.need("num_experts_per_tok"),
    }


def config(cfg: RunConfig) -> dict[str, Any]:
    """Its config.json."""
    t = cfg.transformer
    return {
        **base_config(cfg),
        **balance_config(cfg),
        "num_local_experts": t.num_moe_experts,
        "intermediate_size": t.moe_ffn_hidden_size,
        "sliding_window": t.window_size[0] + 1 if all(sliding_layers(cfg)) else None,
        "router_jitter_noise": 0.0,
    }


MIXTRAL = Architecture(
    "mixtral", "MixtralForCausalLM", flags, config, lambda cfg: [*ends(cfg), *LAYER]
)
