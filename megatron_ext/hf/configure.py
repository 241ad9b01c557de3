"""config.json -> family and RunConfig, and back: which family says exactly the flags of a run."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from megatron_ext.config import RunConfig, parse
from megatron_ext.config.flags import members
from megatron_ext.errors import DataError
from megatron_ext.hf import positions
from megatron_ext.hf.architectures import ARCHITECTURES, Architecture, by_model_type
from megatron_ext.hf.architectures.decoder import sliding_layers
from megatron_ext.hf.entries import moe_layers
from megatron_ext.hf.source import Source

RUN = {"micro_batch_size": 1, "train_iters": 1000, "lr": 1e-5}
"""What a run needs besides its model; the first things to change."""
NOT_THE_NETWORK = frozenset(
    """seq_length moe_token_dispatcher_type moe_grouped_gemm moe_router_dtype moe_z_loss_coeff
    moe_router_load_balancing_type moe_aux_loss_coeff attention_dropout hidden_dropout
    moe_router_bias_update_rate moe_per_layer_logging make_vocab_size_divisible_by padded_vocab_size
    init_method_std embedding_init_method_std moe_input_jitter_eps recompute_granularity
    recompute_method recompute_num_layers recompute_modules recompute_activations transformer_impl
    attention_softmax_in_fp32 moe_layer_recompute use_rotary_position_embeddings ffn_hidden_size
    moe_expert_capacity_factor moe_pad_expert_input_to_capacity moe_token_drop_policy
    bias_swiglu_fusion bias_gelu_fusion bias_dropout_fusion masked_softmax_fusion apply_rope_fusion
    moe_permute_fusion moe_router_fusion persist_layer_norm gradient_accumulation_fusion test_mode
    fp32_residual_connection attention_backend vocab_size deterministic_mode perform_initialization
    calculate_per_token_loss yarn_beta_fast yarn_beta_slow yarn_original_max_position_embeddings
    yarn_correction_range_round_to_int original_max_position_embeddings beta_fast beta_slow mscale
    mscale_all_dim rotary_scaling_factor group_query_attention cp_comm_type variable_seq_lengths
    hetereogenous_dist_checkpoint deallocate_pipeline_outputs distribute_saved_activations
    moe_flex_dispatcher_backend moe_enable_deepep moe_shared_expert_overlap use_cpu_initialization
    account_for_embedding_in_pipeline_split account_for_loss_in_pipeline_split
    microbatch_group_size_per_vp_stage num_layers_in_first_pipeline_stage
    num_layers_in_last_pipeline_stage pipeline_model_parallel_layout moe_router_bias_update
    moe_router_force_load_balancing moe_router_padding_for_fp8 moe_router_padding_for_quantization
    overlap_p2p_comm batch_p2p_comm defer_embedding_wgrad_compute
    """.split()
)
"""Members of the model's sections that change neither weights nor logits, or are compared through
another one (positions: by their config.json)."""


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
            if member.name not in NOT_THE_NETWORK:
                found[member.name] = getattr(getattr(cfg, section), member.name)
    found["moe_layer_freq"] = moe_layers(cfg)
    found["window_attn_skip_freq"] = sliding_layers(cfg)
    found["moe_router_topk_scaling_factor"] = cfg.transformer.moe_router_topk_scaling_factor or 1.0
    best, kept = cfg.moe.moe_router_group_score_experts, cfg.transformer.moe_router_group_topk
    if kept:
        found["moe_router_group_score_experts"] = best or cfg.transformer.moe_router_topk // kept
    if cfg.model.position_embedding_type == "learned_absolute":
        return found
    found.pop("max_position_embeddings", None)
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
