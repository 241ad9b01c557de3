"""How wide the experts are and how their weights are scaled: pure, from two configurations."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_ext.config import RunConfig
from megatron_ext.errors import ConfigError


@dataclass(frozen=True)
class Split:
    """How a dense layer becomes experts: numbers of the module's docstring."""

    num_experts: int
    granularity: int
    dense_width: int
    is_gated: bool
    up_scale: float
    down_scale: float
    bias_scale: float

    @property
    def width(self) -> int:
        """Width of one expert."""
        return self.dense_width // self.granularity


def split_of(dense: RunConfig, moe: RunConfig) -> Split:
    """The split of two configurations. Raises ConfigError where it does not exist."""
    t, width = moe.transformer, dense.transformer.ffn_hidden_size
    if dense.transformer.num_moe_experts is not None:
        raise ConfigError("--load is a mixture of experts already", do="upcycle a dense checkpoint")
    if t.num_moe_experts is None:
        raise ConfigError("--num-experts is required", do="add --num-experts 8")
    if t.moe_shared_expert_intermediate_size or t.moe_latent_size:
        raise ConfigError(
            "upcycling makes no shared experts and no latent projections",
            do="remove --moe-shared-expert-intermediate-size and --moe-latent-size",
        )
    if "local" not in (dense.model.transformer_impl, moe.model.transformer_impl):
        raise ConfigError("upcycling reads --transformer-impl local", do="use it for both runs")
    if width % t.moe_ffn_hidden_size:
        raise ConfigError(
            f"--moe-ffn-hidden-size {t.moe_ffn_hidden_size} must divide the dense width {width}",
            do="give --moe-upcycling-granularity instead",
        )
    granularity = width // t.moe_ffn_hidden_size
    for name, value in (("num-experts", t.num_moe_experts), ("moe-router-topk", t.moe_router_topk)):
        if value % granularity:
            raise ConfigError(
                f"--{name} {value} must be a multiple of the granularity {granularity}",
                do=f"use {granularity} or a multiple",
            )
    if t.moe_router_score_function == "sigmoid" and t.moe_router_topk == 1:
        raise ConfigError("one expert with a sigmoid weight is not the dense layer", do="use top-2")
    return _scaled(moe, width, granularity)


def _scaled(moe: RunConfig, width: int, granularity: int) -> Split:
    t, model = moe.transformer, moe.model
    before = t.moe_router_pre_softmax and t.moe_router_score_function == "softmax"
    sum_of_weights = t.moe_router_topk / t.num_moe_experts if before else 1.0
    sum_of_weights *= t.moe_router_topk_scaling_factor or 1.0
    scale = granularity / sum_of_weights
    is_gated = model.swiglu or model.quick_geglu
    is_linear_in_up = is_gated and not t.glu_linear_offset and t.activation_func_clamp_value is None
    up = math.sqrt(scale) if is_linear_in_up else 1.0
    return Split(
        t.num_moe_experts, granularity, width, is_gated, up, scale / up, 1.0 / sum_of_weights
    )
