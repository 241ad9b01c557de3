"""What the decoders of all supported families share: rows, flags and config keys."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_ext.config import RunConfig
from megatron_ext.hf import positions
from megatron_ext.hf.entries import QKV, Row, moe_layers
from megatron_ext.hf.source import Source
from megatron_ext.hf.transforms import GATE_AND_UP, GATE_THEN_UP

LONGEST_SEQUENCE = 4096
"""--seq-length of an imported model's YAML, where its positions reach further."""


@dataclass(frozen=True)
class Architecture:
    """One family: `model_type` of config.json, its mapping, and flags <-> config in both
    directions.
    """

    model_type: str
    class_name: str
    flags: Callable[[Source], dict[str, Any]]
    config: Callable[[RunConfig], dict[str, Any]]
    rows: Callable[[RunConfig], list[Row]]


ENDS = [
    Row("embedding.word_embeddings.weight", {"model.embed_tokens.weight": "V H"}, where="model"),
    Row("decoder.final_layernorm.weight", {"model.norm.weight": "H"}, where="model"),
]
OUTPUT = Row("output_layer.weight", {"lm_head.weight": "V H"}, where="model")
NORMS = [
    Row("input_layernorm.weight", {"input_layernorm.weight": "H"}),
    Row("pre_mlp_layernorm.weight", {"post_attention_layernorm.weight": "H"}),
]
ATTENTION = [
    Row(
        "self_attention.linear_qkv.weight",
        {
            "self_attn.q_proj.weight": "Q H",
            "self_attn.k_proj.weight": "K H",
            "self_attn.v_proj.weight": "K H",
        },
        QKV,
    ),
    Row("self_attention.linear_proj.weight", {"self_attn.o_proj.weight": "H Q"}),
]
QKV_BIAS = Row(
    "self_attention.linear_qkv.bias",
    {
        "self_attn.q_proj.bias": "Q",
        "self_attn.k_proj.bias": "K",
        "self_attn.v_proj.bias": "K",
    },
    QKV,
)
ROUTER = Row("mlp.router.weight", {"mlp.gate.weight": "E H"}, where="moe")


def feed_forward(ours: str, theirs: str, width: str, where) -> list[Row]:
    """A gated feed-forward layer: the dense one, or the shared expert."""
    return [
        Row(
            f"{ours}.linear_fc1.weight",
            {f"{theirs}.gate_proj.weight": f"{width} H", f"{theirs}.up_proj.weight": f"{width} H"},
            GATE_THEN_UP,
            where,
        ),
        Row(
            f"{ours}.linear_fc2.weight",
            {f"{theirs}.down_proj.weight": f"H {width}"},
            where=where,
        ),
    ]


def experts(gate: str, up: str, down: str) -> list[Row]:
    """Routed experts whose matrices are tensors of their own."""
    return [
        Row("mlp.experts.fc1_weight", {gate: "F H", up: "F H"}, GATE_AND_UP, "expert"),
        Row("mlp.experts.fc2_weight", {down: "H F"}, where="expert"),
    ]


DENSE = feed_forward("mlp", "mlp", "I", "dense")
EXPERTS = experts(
    "mlp.experts.{e}.gate_proj.weight",
    "mlp.experts.{e}.up_proj.weight",
    "mlp.experts.{e}.down_proj.weight",
)


def ends(cfg: RunConfig) -> list[Row]:
    """Embedding, last norm, and the output layer where it has its own weight."""
    return [*ENDS, *([OUTPUT] if cfg.model.untie_embeddings_and_output_weights else [])]


def base_flags(c: Source, *, latent: bool = False, tied: bool = False) -> dict[str, Any]:
    """The flags that every family has. `tied`: the default of tie_word_embeddings."""
    c.fixed(hidden_act="silu")
    quantised = c.get("quantization_config", None)
    if quantised:
        kind = dict(quantised).get("quant_method", "unknown")
        c.refuse(f"{kind}-quantised weights", "dequantise them to bfloat16 first")
    heads, hidden = c.need("num_attention_heads"), c.need("hidden_size")
    longest = c.need("max_position_embeddings")
    found = {
        "num_layers": c.need("num_hidden_layers"),
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "vocab_size": c.need("vocab_size"),
        "max_position_embeddings": longest,
        "seq_length": min(longest, LONGEST_SEQUENCE),
        "normalization": "RMSNorm",
        "swiglu": True,
        "add_bias_linear": False,
        "untie_embeddings_and_output_weights": not c.get("tie_word_embeddings", tied),
        "attention_dropout": c.get("attention_dropout", 0.0),
        "hidden_dropout": 0.0,
        "moe_router_dtype": "fp32",
        "moe_token_dispatcher_type": "alltoall",
        "moe_grouped_gemm": True,
        **positions.flags(c, latent=latent),
    }
    if not latent:
        found |= {
            "kv_channels": c.get("head_dim", hidden // heads),
            "group_query_attention": True,
            "num_query_groups": c.get("num_key_value_heads", heads),
        }
    dtype = str(c.values.get("dtype") or c.values.get("torch_dtype")).removeprefix("torch.")
    return found | {"bf16": dtype == "bfloat16", "fp16": dtype == "float16"}


def balance(c: Source, default: float) -> dict[str, Any]:
    """The balance loss of the file's coefficient; it changes no logit."""
    return {
        "moe_router_load_balancing_type": "aux_loss",
        "moe_aux_loss_coeff": float(c.get("router_aux_loss_coef", default)),
    }


def balance_config(cfg: RunConfig) -> dict[str, Any]:
    """The same as a key of config.json: the first balance loss's coefficient, 0 without one."""
    t = cfg.transformer
    kinds, values = t.moe_router_load_balancing_type, t.moe_aux_loss_coeff
    kinds = [kinds] if isinstance(kinds, str) else kinds
    values = values if isinstance(values, (list, tuple)) else [values] * len(kinds)
    found = [value for kind, value in zip(kinds, values) if kind.endswith("aux_loss")]
    return {"router_aux_loss_coef": float(found[0]) if found else 0.0}


def layer_pattern(is_moe: Sequence[bool]) -> dict[str, Any]:
    """--moe-layer-freq of the layers that hold experts."""
    return {"moe_layer_freq": 1 if all(is_moe) else [int(flag) for flag in is_moe]}


def windows(c: Source, is_sliding: Sequence[bool]) -> dict[str, Any]:
    """A query sees itself and the `sliding_window` - 1 keys before it, in the layers named."""
    if not any(is_sliding):
        return {}
    flags: dict[str, Any] = {"window_size": [c.need("sliding_window") - 1, 0]}
    if not all(is_sliding):
        flags["window_attn_skip_freq"] = [int(flag) for flag in is_sliding]
    return flags


def base_config(cfg: RunConfig) -> dict[str, Any]:
    """The keys of config.json that every family has."""
    t, model = cfg.transformer, cfg.model
    found = {
        "num_hidden_layers": t.num_layers,
        "hidden_size": t.hidden_size,
        "intermediate_size": t.ffn_hidden_size,
        "num_attention_heads": t.num_attention_heads,
        "vocab_size": model.vocab_size,
        "max_position_embeddings": model.max_position_embeddings,
        "rms_norm_eps": t.layernorm_epsilon,
        "hidden_act": "silu",
        "tie_word_embeddings": not model.untie_embeddings_and_output_weights,
        "attention_dropout": t.attention_dropout,
        "num_experts_per_tok": t.moe_router_topk,
        "use_cache": True,
        **positions.config(cfg),
    }
    if not t.multi_latent_attention:
        found |= {"head_dim": t.kv_channels, "num_key_value_heads": t.num_query_groups}
    return found


def sliding_layers(cfg: RunConfig) -> list[bool]:
    """Which layers see a window only."""
    t = cfg.transformer
    if not t.window_size:
        return [False] * t.num_layers
    freq = t.window_attn_skip_freq
    if isinstance(freq, list):
        return [bool(flag) for flag in freq]
    return [freq is None or (layer + 1) % freq != 0 for layer in range(t.num_layers)]


def dense_layers(cfg: RunConfig) -> list[int]:
    """Indices of the layers without experts."""
    return [layer for layer, is_moe in enumerate(moe_layers(cfg)) if not is_moe]
