"""Qwen2-MoE and Qwen3-MoE: fine experts, some layers dense; Qwen2 with a gated shared expert and
biases of query, key and value, Qwen3 with a norm of every query and key head.

`norm_topk_prob`: the k weights sum to one, which is a softmax after the choice; otherwise they are
the softmax over all experts (--moe-router-pre-softmax).
"""

from __future__ import annotations

from typing import Any

from megatron_ext.config import RunConfig
from megatron_ext.hf.architectures.decoder import (
    ATTENTION,
    DENSE,
    EXPERTS,
    NORMS,
    QKV_BIAS,
    ROUTER,
    Architecture,
    balance,
    balance_config,
    base_config,
    base_flags,
    dense_layers,
    ends,
    feed_forward,
    layer_pattern,
    sliding_layers,
    windows,
)
from megatron_ext.hf.entries import Row
from megatron_ext.hf.source import Source

LAYER = [*NORMS, *ATTENTION, *DENSE, ROUTER, *EXPERTS]
SHARED = [
    *feed_forward("mlp.shared_experts", "mlp.shared_expert", "S", "moe"),
    Row("mlp.shared_experts.gate_weight", {"mlp.shared_expert_gate.weight": "1 H"}, where="moe"),
]
HEAD_NORMS = [
    Row("self_attention.q_layernorm.weight", {"self_attn.q_norm.weight": "D"}),
    Row("self_attention.k_layernorm.weight", {"self_attn.k_norm.weight": "D"}),
]


def _flags(c: Source) -> dict[str, Any]:
    layers, step = c.need("num_hidden_layers"), c.get("decoder_sparse_step", 1)
    dense = set(c.get("mlp_only_layers", []))
    is_moe = [layer not in dense and (layer + 1) % step == 0 for layer in range(layers)]
    return {
        **base_flags(c),
        **balance(c, 0.001),
        **layer_pattern(is_moe),
        "layernorm_epsilon": c.get("rms_norm_eps", 1e-6),
        "ffn_hidden_size": c.need("intermediate_size"),
        "moe_ffn_hidden_size": c.need("moe_intermediate_size"),
        "num_moe_experts": c.need("num_experts", "num_local_experts"),
        "moe_router_topk": c.need("num_experts_per_tok"),
        "moe_router_pre_softmax": not c.get("norm_topk_prob", False),
    }


def qwen2_flags(c: Source) -> dict[str, Any]:
    """Windows, where used, alternate: in even layers below max_window_layers."""
    layers, below = c.need("num_hidden_layers"), c.get("max_window_layers", 28)
    kinds = c.get("layer_types", None)
    sliding = [layer % 2 == 0 and layer < below for layer in range(layers)]
    if kinds is not None:
        sliding = [kind == "sliding_attention" for kind in kinds]
    used = bool(c.get("use_sliding_window", False))
    return {
        **_flags(c),
        **windows(c, [used and flag for flag in sliding]),
        "add_qkv_bias": c.get("qkv_bias", True),
        "moe_shared_expert_intermediate_size": c.need("shared_expert_intermediate_size"),
        "moe_shared_expert_gate": True,
    }


def qwen3_flags(c: Source) -> dict[str, Any]:
    """The window, where used, is in every layer."""
    c.fixed(attention_bias=False)
    used = bool(c.get("use_sliding_window", False))
    layers = c.need("num_hidden_layers")
    return {**_flags(c), **windows(c, [used] * layers), "qk_layernorm": True}


def _config(cfg: RunConfig) -> dict[str, Any]:
    t = cfg.transformer
    return {
        **base_config(cfg),
        **balance_config(cfg),
        "num_experts": t.num_moe_experts,
        "moe_intermediate_size": t.moe_ffn_hidden_size,
        "norm_topk_prob": not t.moe_router_pre_softmax,
        "decoder_sparse_step": 1,
        "mlp_only_layers": dense_layers(cfg),
        "use_sliding_window": bool(t.window_size),
        "sliding_window": t.window_size[0] + 1 if t.window_size else None,
    }


def qwen2_config(cfg: RunConfig) -> dict[str, Any]:
    """config.json of Qwen2-MoE."""
    kinds = ["sliding_attention" if flag else "full_attention" for flag in sliding_layers(cfg)]
    found = _config(cfg)
    del found["head_dim"]
    return found | {
        "layer_types": kinds,
        "max_window_layers": cfg.transformer.num_layers,
        "qkv_bias": cfg.transformer.add_qkv_bias,
        "shared_expert_intermediate_size": cfg.transformer.moe_shared_expert_intermediate_size,
    }


def qwen3_config(cfg: RunConfig) -> dict[str, Any]:
    """config.json of Qwen3-MoE."""
    return {**_config(cfg), "attention_bias": False, "max_window_layers": 0}


def qwen2_rows(cfg: RunConfig) -> list[Row]:
    """The mapping of Qwen2-MoE."""
    bias = [QKV_BIAS] if cfg.transformer.add_qkv_bias else []
    return [*ends(cfg), *LAYER, *SHARED, *bias]


def qwen3_rows(cfg: RunConfig) -> list[Row]:
    """The mapping of Qwen3-MoE."""
    return [*ends(cfg), *LAYER, *HEAD_NORMS]


QWEN2_MOE = Architecture("qwen2_moe", "Qwen2MoeForCausalLM", qwen2_flags, qwen2_config, qwen2_rows)
QWEN3_MOE = Architecture("qwen3_moe", "Qwen3MoeForCausalLM", qwen3_flags, qwen3_config, qwen3_rows)
