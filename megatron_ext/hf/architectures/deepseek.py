"""DeepSeek-V2 (arXiv:2405.04434) and V3 (arXiv:2412.19437): latent attention, dense first layers,
shared experts. V2 chooses by a softmax over all experts, V3 by a sigmoid with a correction bias.

megatron-core rotates the interleaved pairs as theirs are stored, so no matrix is permuted. A group
of experts is scored there by the sum of its best `topk / kept groups` experts: V3 sums two, V2
takes the best one (--moe-router-group-score-experts says which).
"""

from __future__ import annotations

from typing import Any

from megatron_ext.config import RunConfig
from megatron_ext.hf.architectures.decoder import (
    DENSE,
    EXPERTS,
    NORMS,
    ROUTER,
    Architecture,
    base_config,
    base_flags,
    dense_layers,
    ends,
    feed_forward,
    layer_pattern,
)
from megatron_ext.hf.entries import Row
from megatron_ext.hf.source import Source

LATENT = [
    Row(
        "self_attention.linear_kv_down_proj.weight", {"self_attn.kv_a_proj_with_mqa.weight": "KA H"}
    ),
    Row("self_attention.kv_layernorm.weight", {"self_attn.kv_a_layernorm.weight": "KL"}),
    Row("self_attention.linear_kv_up_proj.weight", {"self_attn.kv_b_proj.weight": "KB KL"}),
    Row("self_attention.linear_proj.weight", {"self_attn.o_proj.weight": "H O"}),
]
LOW_RANK_QUERY = [
    Row("self_attention.linear_q_down_proj.weight", {"self_attn.q_a_proj.weight": "QL H"}),
    Row("self_attention.q_layernorm.weight", {"self_attn.q_a_layernorm.weight": "QL"}),
    Row("self_attention.linear_q_up_proj.weight", {"self_attn.q_b_proj.weight": "QB QL"}),
]
FULL_QUERY = [Row("self_attention.linear_q_proj.weight", {"self_attn.q_proj.weight": "QB H"})]
BIAS = Row("mlp.router.expert_bias", {"mlp.gate.e_score_correction_bias": "E"}, where="moe")
SHARED = feed_forward("mlp.shared_experts", "mlp.shared_experts", "S", "moe")
LATENT_NORM_EPSILON = 1e-6
"""transformers' norms of the latents have this one whatever rms_norm_eps is."""
BEST = {"deepseek_v2": 1, "deepseek_v3": 2}
"""Experts whose scores make a group's."""


def _flags(c: Source) -> dict[str, Any]:
    c.fixed(attention_bias=False, moe_layer_freq=1, mlp_bias=False)
    epsilon = c.get("rms_norm_eps", 1e-6)
    if epsilon != LATENT_NORM_EPSILON:
        c.refuse(f"rms_norm_eps = {epsilon}", f"the latents' norms have {LATENT_NORM_EPSILON}")
    layers, dense = c.need("num_hidden_layers"), c.need("first_k_dense_replace")
    nope, rope = c.need("qk_nope_head_dim"), c.need("qk_rope_head_dim")
    width = c.need("moe_intermediate_size")
    shared = c.get("n_shared_experts", 0)
    return {
        **base_flags(c, latent=True),
        **layer_pattern([layer >= dense for layer in range(layers)]),
        "layernorm_epsilon": epsilon,
        "multi_latent_attention": True,
        "qk_layernorm": True,
        "q_lora_rank": c.get("q_lora_rank", None),
        "kv_lora_rank": c.need("kv_lora_rank"),
        "qk_head_dim": nope,
        "qk_pos_emb_head_dim": rope,
        "v_head_dim": c.need("v_head_dim"),
        "kv_channels": nope + rope,
        "ffn_hidden_size": c.need("intermediate_size"),
        "moe_ffn_hidden_size": width,
        "moe_shared_expert_intermediate_size": width * shared if shared else None,
        "num_moe_experts": c.need("n_routed_experts"),
        "moe_router_topk": c.need("num_experts_per_tok"),
        "moe_router_topk_scaling_factor": float(c.get("routed_scaling_factor", 1.0)),
    }


def _groups(c: Source, best: int) -> dict[str, Any]:
    """Group-limited choice, where it limits anything."""
    groups, kept = c.get("n_group", None), c.get("topk_group", None)
    if not groups or not kept or kept >= groups:
        return {}
    return {
        "moe_router_num_groups": groups,
        "moe_router_group_topk": kept,
        "moe_router_group_score_experts": best,
    }


def v2_flags(c: Source) -> dict[str, Any]:
    """DeepSeek-V2. transformers scales by routed_scaling_factor and never normalises."""
    method = c.get("topk_method", "greedy")
    if method not in ("greedy", "group_limited_greedy"):
        c.refuse(f"topk_method = {method!r}", "supported: greedy, group_limited_greedy")
    c.fixed(norm_topk_prob=False, scoring_func="softmax")
    limited = method == "group_limited_greedy"
    return {
        **_flags(c),
        **(_groups(c, BEST["deepseek_v2"]) if limited else {}),
        "moe_router_pre_softmax": True,
        "moe_router_load_balancing_type": "seq_aux_loss",
        "moe_aux_loss_coeff": float(c.get("aux_loss_alpha", 0.001)),
    }


def v3_flags(c: Source) -> dict[str, Any]:
    """DeepSeek-V3."""
    c.fixed(
        norm_topk_prob=True, scoring_func="sigmoid", topk_method="noaux_tc", rope_interleave=True
    )
    return {
        **_flags(c),
        **_groups(c, BEST["deepseek_v3"]),
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_load_balancing_type": "seq_aux_loss",
        "moe_aux_loss_coeff": 0.0001,
    }


def _config(cfg: RunConfig) -> dict[str, Any]:
    t = cfg.transformer
    width = t.moe_ffn_hidden_size
    shared = t.moe_shared_expert_intermediate_size or 0
    dense = dense_layers(cfg)
    return {
        **base_config(cfg),
        "num_key_value_heads": t.num_attention_heads,
        "first_k_dense_replace": len(dense) if dense == list(range(len(dense))) else -1,
        "moe_layer_freq": 1,
        "qk_nope_head_dim": t.qk_head_dim,
        "qk_rope_head_dim": t.qk_pos_emb_head_dim,
        "v_head_dim": t.v_head_dim,
        "kv_lora_rank": t.kv_lora_rank,
        "q_lora_rank": t.q_lora_rank,
        "moe_intermediate_size": width,
        "n_shared_experts": shared // width if shared % width == 0 else 0,
        "n_routed_experts": t.num_moe_experts,
        "routed_scaling_factor": t.moe_router_topk_scaling_factor or 1.0,
        "attention_bias": False,
    }


def v2_config(cfg: RunConfig) -> dict[str, Any]:
    """config.json of DeepSeek-V2."""
    t = cfg.transformer
    return {
        **_config(cfg),
        "n_group": t.moe_router_num_groups or 1,
        "topk_group": t.moe_router_group_topk or 1,
        "topk_method": "group_limited_greedy" if t.moe_router_num_groups else "greedy",
        "scoring_func": "softmax",
        "norm_topk_prob": False,
    }


def v3_config(cfg: RunConfig) -> dict[str, Any]:
    """config.json of DeepSeek-V3."""
    t = cfg.transformer
    return {
        **_config(cfg),
        "n_group": t.moe_router_num_groups or 1,
        "topk_group": t.moe_router_group_topk or 1,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
        "rope_interleave": True,
        "num_nextn_predict_layers": 0,
    }


def _rows(cfg: RunConfig) -> list[Row]:
    t = cfg.transformer
    query = FULL_QUERY if t.q_lora_rank is None else LOW_RANK_QUERY
    shared = SHARED if t.moe_shared_expert_intermediate_size else []
    return [*ends(cfg), *NORMS, *LATENT, *query, *DENSE, ROUTER, *EXPERTS, *shared]


DEEPSEEK_V2 = Architecture("deepseek_v2", "DeepseekV2ForCausalLM", v2_flags, v2_config, _rows)
DEEPSEEK_V3 = Architecture(
    "deepseek_v3",
    "DeepseekV3ForCausalLM",
    v3_flags,
    v3_config,
    lambda cfg: [*_rows(cfg), BIAS],
)
