"""config.json -> family and RunConfig, and back: which family says exactly the flags of a run."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from megatron_ext.config import RunConfig, parse
from megatron_ext.config.flags import members
from megatron_ext.errors import ConfigError, DataError
from megatron_ext.hf import positions
from megatron_ext.hf.architectures import ARCHITECTURES, Architecture, by_model_type
from megatron_ext.hf.architectures.decoder import sliding_layers
from megatron_ext.hf.entries import moe_layers
from megatron_ext.hf.source import Source

RUN = {"micro_batch_size": 1, "train_iters": 1000, "lr": 1e-5}
"""What a run needs besides its model; the first things to change."""
NETWORK = frozenset(
    """num_layers mtp_num_layers hidden_size num_attention_heads num_query_groups kv_channels
    softmax_scale softmax_type window_size attention_output_gate no_rope_freq
    experimental_attention_variant linear_attention_freq apply_query_key_layer_scaling
    multi_latent_attention q_lora_rank kv_lora_rank qk_head_dim qk_pos_emb_head_dim v_head_dim
    normalization layernorm_epsilon layernorm_zero_centered_gamma qk_layernorm qk_l2_norm
    qk_layernorm_over_heads apply_residual_connection_post_layernorm add_bias_linear add_qkv_bias
    swiglu squared_relu quick_geglu glu_linear_offset activation_func_clamp_value
    position_embedding_type add_position_embedding rotary_interleaved heterogeneous_block_specs
    untie_embeddings_and_output_weights num_moe_experts moe_ffn_hidden_size moe_latent_size
    moe_shared_expert_intermediate_size moe_shared_expert_gate moe_router_topk moe_router_num_groups
    moe_router_group_topk moe_router_pre_softmax moe_router_score_function
    moe_router_enable_expert_bias moe_apply_probs_on_input
    """.split()
)
"""What decides which weights there are and what the logits are, besides what `network` adds: which
layers have experts and windows, positions, and scales that have two spellings. Not in it: sizes of
the vocabulary and of dense layers, which the tensors' shapes show."""


def architecture_of(c: Source) -> Architecture:
    """The family of a config.json. Raises DataError with the supported ones."""
    known, kind = by_model_type(), c.values.get("model_type")
    if kind not in known:
        raise DataError(
            f"config.json: model_type {kind!r} is not supported",
            do=f"supported: {', '.join(known)}",
            path=c.path,
        )
    return known[kind]


def yaml_text(flags: Mapping[str, Any], title: str) -> str:
    """A file for --config; keys are flag names."""
    lines = [f"# {title}"]
    for key, value in flags.items():
        text = yaml.safe_dump(value, default_flow_style=True, width=10_000).split("\n...")[0]
        lines.append(f"{key.replace('_', '-')}: {text.strip()}")
    return "\n".join(lines) + "\n"


def run_config(flags: Mapping[str, Any], *options: str) -> RunConfig:
    """The one-rank configuration of flags, with mock data. Raises ConfigError."""
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write(yaml_text({**RUN, **flags}, "imported"))
        file.flush()
        words = ["--config", file.name, "--world-size", "1", "--mock-data", *options]
        return parse(words, environ={})


def network(cfg: RunConfig) -> dict[str, Any]:
    """Every value that decides which weights there are and what the logits are."""
    found = {}
    for section in ("transformer", "model"):
        for member in members()[section]:
            if member.mla_only and not cfg.transformer.multi_latent_attention:
                continue
            if member.name in NETWORK:
                found[member.name] = getattr(getattr(cfg, section), member.name)
    found["moe_layer_freq"] = moe_layers(cfg)
    found["window_attn_skip_freq"] = sliding_layers(cfg)
    found["moe_router_topk_scaling_factor"] = cfg.transformer.moe_router_topk_scaling_factor or 1.0
    best, kept = cfg.moe.moe_router_group_score_experts, cfg.transformer.moe_router_group_topk
    if kept:
        found["moe_router_group_score_experts"] = best or cfg.transformer.moe_router_topk // kept
    if cfg.model.position_embedding_type == "learned_absolute":
        return found | {"max_position_embeddings": cfg.model.max_position_embeddings}
    return found | positions.config(cfg)["rope_parameters"]


def differences(a: RunConfig, b: RunConfig) -> list[str]:
    """Names of the values in which two networks differ."""
    one, other = network(a), network(b)
    same = {name for name in one if name in other and _equal(one[name], other[name])}
    return sorted((set(one) | set(other)) - same)


def _equal(a: Any, b: Any) -> bool:
    def plain(value: Any) -> Any:
        return list(value) if isinstance(value, tuple) else value

    return plain(a) == plain(b)


def config_of(cfg: RunConfig, wanted: str | None = None) -> tuple[Architecture, dict[str, Any]]:
    """The family (the one `wanted`, or the first that fits) and config.json of a run's network.

    Raises DataError naming what no family can express.
    """
    known = by_model_type()
    if wanted is not None and wanted not in known:
        raise ConfigError(
            f"--architecture {wanted} is not supported", do=f"use one of {', '.join(known)}"
        )
    tried = {}
    for one in ARCHITECTURES:
        if wanted not in (None, one.model_type):
            continue
        try:
            found = {
                **one.config(cfg),
                "model_type": one.model_type,
                "architectures": [one.class_name],
            }
            back = run_config(one.flags(Source(found, Path("config.json"))))
        except (DataError, TypeError, KeyError) as error:
            tried[one.model_type] = str(error)
            continue
        wrong = differences(cfg, back)
        if not wrong:
            return one, found
        tried[one.model_type] = ", ".join(wrong)
    raise DataError(
        "no supported architecture expresses this model: "
        + "; ".join(f"{name} differs in {why}" for name, why in tried.items()),
        do="export a model of a supported architecture (docs/huggingface.md)",
    )
