"""Ranges of megatron-core's numbers, whose source does not say them: kind of `ranges` -> fields.

A test checks that every numeric field of the installed version is in exactly one line.
"""

from __future__ import annotations

from megatron_ext.ranges import RANGES, Range

_BY_KIND: dict[str, str] = {
    "Size": """hidden_size ffn_hidden_size kv_channels moe_ffn_hidden_size
        moe_shared_expert_intermediate_size moe_latent_size moe_deepep_num_sms moe_hybridep_num_sms
        max_seqlen_per_dp_cp_rank dsa_indexer_n_heads dsa_indexer_head_dim dsa_indexer_topk
        linear_conv_kernel_dim linear_key_head_dim linear_value_head_dim linear_num_key_heads
        linear_num_value_heads mamba_state_dim mamba_head_dim mamba_num_groups mamba_num_heads
        mlp_chunks_for_prefill q_lora_rank kv_lora_rank qk_head_dim qk_pos_emb_head_dim v_head_dim
        original_max_position_embeddings fp8_interval fp8_amax_history_len muon_num_ns_steps""",
    "Parts": """num_attention_heads num_query_groups num_moe_experts moe_router_topk
        hierarchical_context_parallel_sizes""",
    "Layers": """num_layers num_layers_in_first_pipeline_stage num_layers_in_last_pipeline_stage
        recompute_num_layers""",
    "Depth": """mtp_num_layers num_layers_at_start_in_bf16 num_layers_at_end_in_bf16
        cpu_offloading_num_layers moe_router_num_groups moe_router_group_topk""",
    "Count": "bucket_size suggested_communication_unit_size hysteresis",
    "Whole": """moe_layer_freq moe_router_topk_limited_devices microbatch_group_size_per_vp_stage
        no_rope_freq window_attn_skip_freq linear_attention_freq mrope_section wgrad_deferral_limit
        num_microbatches_with_partial_activation_checkpoints cuda_graph_warmup_steps
        min_offloaded_tensor_size""",
    "Integer": "fp8_margin",
    "Window": "window_size",
    "Share": "qk_clip_alpha optimizer_offload_fraction",
    "Chance": """hidden_dropout attention_dropout moe_input_jitter_eps adam_beta1 adam_beta2
        sgd_momentum muon_momentum""",
    "Positive": """layernorm_epsilon adam_eps init_method_std embedding_init_method_std
        softmax_scale activation_func_clamp_value qk_clip_threshold rotary_scaling_factor beta_fast
        beta_slow loss_scale initial_loss_scale min_loss_scale loss_scale_window
        muon_extra_scale_factor""",
    "NotNegative": """lr min_lr weight_decay clip_grad mtp_loss_scaling_factor
        moe_router_topk_scaling_factor moe_router_bias_update_rate moe_aux_loss_coeff
        moe_z_loss_coeff mscale mscale_all_dim decoupled_lr decoupled_min_lr
        dsa_indexer_loss_coeff""",
    "Factor": "moe_expert_capacity_factor",
    "Real": "glu_linear_offset",
}

RANGE_OF: dict[str, str] = {name: kind for kind, text in _BY_KIND.items() for name in text.split()}
"""Field -> kind of range."""

ANY: dict[str, str] = {"int": "Integer", "pattern": "Integer", "pair": "Integer", "float": "Real"}
"""For a number that a newer megatron-core brings."""


def range_of(name: str, base: str) -> Range | None:
    """The range of a field with values of this kind; None where they are no numbers."""
    kind = RANGE_OF.get(name, ANY.get(base))
    return RANGES[kind] if kind and base in ANY else None
