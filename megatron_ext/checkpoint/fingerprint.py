"""What makes two runs the same: the flags that change which model is trained on which samples.

The layout, intervals, names of folders, the length of the run and everything about speed do not
count. A resume with another fingerprint is refused and the differences are shown;
--accept-change names the ones that are meant.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from megatron_ext.config import RunConfig

_FIELDS = {
    "transformer": (
        "num_layers",
        "hidden_size",
        "ffn_hidden_size",
        "num_attention_heads",
        "num_query_groups",
        "kv_channels",
        "normalization",
        "multi_latent_attention",
        "num_moe_experts",
        "moe_ffn_hidden_size",
        "moe_layer_freq",
        "moe_shared_expert_intermediate_size",
        "moe_router_topk",
        "moe_router_score_function",
        "moe_router_load_balancing_type",
        "moe_aux_loss_coeff",
        "moe_z_loss_coeff",
        "moe_router_enable_expert_bias",
        "moe_router_bias_update_rate",
        "mtp_num_layers",
        "hidden_dropout",
        "attention_dropout",
    ),
    "model": (
        "seq_length",
        "position_embedding_type",
        "rotary_base",
        "vocab_size",
        "swiglu",
        "untie_embeddings_and_output_weights",
    ),
    "data": (
        "data_path",
        "train_data_path",
        "per_split_data_args_path",
        "split",
        "mock_data",
        "eod_mask_loss",
        "reset_position_ids",
        "reset_attention_mask",
        "tokenizer_type",
        "tokenizer_model",
    ),
    "train": ("seed", "global_batch_size", "rampup_batch_size", "bf16", "fp16"),
    "optimizer": ("optimizer", "weight_decay", "adam_beta1", "adam_beta2", "adam_eps", "clip_grad"),
}
SCHEDULE = (
    "lr",
    "min_lr",
    "lr_decay_style",
    "lr_warmup_iters",
    "lr_warmup_samples",
    "lr_warmup_fraction",
    "start_weight_decay",
    "end_weight_decay",
    "weight_decay_incr_style",
)


def fingerprint(cfg: RunConfig) -> dict[str, Any]:
    """Flag -> value, plain JSON."""
    found = {
        name: getattr(getattr(cfg, section), name)
        for section, names in _FIELDS.items()
        for name in names
        if hasattr(getattr(cfg, section), name)
    }
    found |= {name: getattr(cfg.schedule, name) for name in SCHEDULE}
    return {name: _plain(value) for name, value in found.items()}


def free_to_change(cfg: RunConfig) -> frozenset[str]:
    """Flags that this run is told to take anew, or does not use."""
    if cfg.train.eval_only:
        return frozenset(fingerprint(cfg))
    schedule = cfg.schedule
    if schedule.override_opt_param_scheduler or schedule.use_checkpoint_opt_param_scheduler:
        return frozenset((*SCHEDULE, "weight_decay"))
    return frozenset()


def names(text: str | None) -> frozenset[str]:
    """`--seed,data-path` as {"seed", "data_path"}."""
    parts = (part.strip().lstrip("-").replace("-", "_") for part in (text or "").split(","))
    return frozenset(part for part in parts if part)


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def differences(
    saved: Mapping[str, Any], mine: Mapping[str, Any], accepted: Collection[str]
) -> dict[str, str]:
    """Flag -> `old -> new`, without the accepted ones. A flag that one of the two does not know is
    none of them.
    """
    known = [name for name in mine if name in saved and name not in accepted]
    return {name: f"{saved[name]} -> {mine[name]}" for name in known if saved[name] != mine[name]}
