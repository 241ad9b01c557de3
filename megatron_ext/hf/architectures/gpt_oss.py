"""GPT-OSS: a learned extra logit per head (sinks), biases everywhere, windows in every other layer,
YaRN without rounding, experts whose gate and up alternate in one transposed tensor and whose
activation is min(g, limit) * sigmoid(1.702 g) * (clamp(u) + 1).
"""

from __future__ import annotations

from typing import Any

from megatron_ext.config import RunConfig
from megatron_ext.hf.architectures.decoder import (
    ATTENTION,
    NORMS,
    QKV_BIAS,
    Architecture,
    balance,
    balance_config,
    base_config,
    base_flags,
    ends,
    sliding_layers,
    windows,
)
from megatron_ext.hf.entries import Row
from megatron_ext.hf.source import Source
from megatron_ext.hf.transforms import INTERLEAVED, TRANSPOSED

LAYER = [
    *NORMS,
    *ATTENTION,
    QKV_BIAS,
    Row("self_attention.linear_proj.bias", {"self_attn.o_proj.bias": "H"}),
    Row("self_attention.core_attention.softmax_offset", {"self_attn.sinks": "N"}),
    Row("mlp.router.weight", {"mlp.router.weight": "E H"}, where="moe"),
    Row("mlp.router.bias", {"mlp.router.bias": "E"}, where="moe"),
    Row("mlp.experts.fc1_weight", {"mlp.experts.gate_up_proj": "E H 2F"}, INTERLEAVED, "sliced"),
    Row("mlp.experts.fc1_bias", {"mlp.experts.gate_up_proj_bias": "E 2F"}, INTERLEAVED, "sliced"),
    Row("mlp.experts.fc2_weight", {"mlp.experts.down_proj": "E F H"}, TRANSPOSED, "sliced"),
    Row("mlp.experts.fc2_bias", {"mlp.experts.down_proj_bias": "E H"}, where="sliced"),
]
ALPHA = 1.702
"""Of --quick-geglu."""


def flags(c: Source) -> dict[str, Any]:
    """Its flags."""
    c.fixed(attention_bias=True, swiglu_alpha=ALPHA)
    layers = c.need("num_hidden_layers")
    default = ["sliding_attention", "full_attention"] * layers
    kinds = c.get("layer_types", default[:layers])
    width = c.need("intermediate_size")
    return {
        **base_flags(c),
        **balance(c, 0.9),
        **windows(c, [kind == "sliding_attention" for kind in kinds]),
        "layernorm_epsilon": c.get("rms_norm_eps", 1e-5),
        "add_bias_linear": True,
        "softmax_type": "learnable",
        "swiglu": False,
        "quick_geglu": True,
        "activation_func_clamp_value": float(c.get("swiglu_limit", 7.0)),
        "glu_linear_offset": 1.0,
        "ffn_hidden_size": width,
        "moe_ffn_hidden_size": width,
        "num_moe_experts": c.need("num_local_experts"),
        "moe_router_topk": c.need("num_experts_per_tok"),
    }


def config(cfg: RunConfig) -> dict[str, Any]:
    """Its config.json."""
    t = cfg.transformer
    kinds = ["sliding_attention" if flag else "full_attention" for flag in sliding_layers(cfg)]
    return {
        **base_config(cfg),
        **balance_config(cfg),
        "num_local_experts": t.num_moe_experts,
        "intermediate_size": t.moe_ffn_hidden_size,
        "layer_types": kinds,
        "sliding_window": t.window_size[0] + 1 if t.window_size else None,
        "swiglu_limit": t.activation_func_clamp_value,
        "swiglu_alpha": ALPHA,
        "attention_bias": True,
    }


GPT_OSS = Architecture(
    "gpt_oss", "GptOssForCausalLM", flags, config, lambda cfg: [*ends(cfg), *LAYER]
)
