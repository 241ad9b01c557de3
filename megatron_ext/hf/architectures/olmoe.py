"""OLMoE (Muennighoff et al. 2024, arXiv:2409.02060): one norm over all query heads of a token
together, one over all its key heads (--qk-layernorm-over-heads), weights that are a softmax over
all experts.
"""

from __future__ import annotations

from typing import Any

from megatron_ext.config import RunConfig
from megatron_ext.hf.architectures.decoder import (
    ATTENTION,
    EXPERTS,
    NORMS,
    ROUTER,
    Architecture,
    balance,
    balance_config,
    base_config,
    base_flags,
    ends,
)
from megatron_ext.hf.entries import Row
from megatron_ext.hf.source import Source

LAYER = [
    *NORMS,
    *ATTENTION,
    Row("self_attention.q_layernorm.weight", {"self_attn.q_norm.weight": "Q"}),
    Row("self_attention.k_layernorm.weight", {"self_attn.k_norm.weight": "K"}),
    ROUTER,
    *EXPERTS,
]


def flags(c: Source) -> dict[str, Any]:
    """Its flags; heads of another size than hidden / heads are not known to it."""
    c.fixed(attention_bias=False, clip_qkv=None)
    width = c.need("intermediate_size")
    return {
        **base_flags(c),
        **balance(c, 0.01),
        "layernorm_epsilon": c.get("rms_norm_eps", 1e-5),
        "ffn_hidden_size": width,
        "moe_ffn_hidden_size": width,
        "num_moe_experts": c.need("num_experts"),
        "moe_router_topk": c.need("num_experts_per_tok"),
        "moe_router_pre_softmax": not c.get("norm_topk_prob", False),
        "qk_layernorm": True,
        "qk_layernorm_over_heads": True,
    }


def config(cfg: RunConfig) -> dict[str, Any]:
    """Its config.json."""
    t = cfg.transformer
    found = base_config(cfg)
    del found["head_dim"]
    return found | {
        **balance_config(cfg),
        "num_experts": t.num_moe_experts,
        "intermediate_size": t.moe_ffn_hidden_size,
        "norm_topk_prob": not t.moe_router_pre_softmax,
        "attention_bias": False,
        "clip_qkv": None,
    }


OLMOE = Architecture("olmoe", "OlmoeForCausalLM", flags, config, lambda cfg: [*ends(cfg), *LAYER])
