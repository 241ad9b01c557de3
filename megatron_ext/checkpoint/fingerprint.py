"""What makes two runs the same: every flag but those that may change on a resume.

MAY_CHANGE says which and why; a flag that is not there counts, so a new one counts from its first
day. A resume with another fingerprint is refused and the differences are shown; --accept-change
names the ones that are meant.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from megatron_ext.checkpoint.content import DATA, TOKENIZER
from megatron_ext.config import RunConfig
from megatron_ext.config.flags import all_flags, members

SECTIONS = ("model", "moe", "data", "train", "schedule", "transformer", "optimizer", "ddp")
"""Those whose flags count. The others (layout, folders, logs, watchers) may change as a whole."""

MAY_CHANGE: dict[str, str] = {
    "the length of the run, and what is asked of this start": """
        train_iters train_samples lr_decay_iters lr_decay_samples exit_interval
        exit_duration_in_mins exit_signal exit_signal_handler eval_only skip_train
        iterations_to_skip override_opt_param_scheduler use_checkpoint_opt_param_scheduler""",
    "evaluation": """
        eval_iters eval_interval full_validation valid_data_path test_data_path""",
    "reading ahead, caches and files: the samples are the same": """
        data_cache_path check_files mmap_bin_files data_hash num_workers num_dataset_builder_threads
        create_attention_mask_in_dataloader""",
    "the initial weights, which a checkpoint replaces": """
        init_method_std embedding_init_method_std init_method_xavier_uniform
        perform_initialization use_cpu_initialization init_model_with_meta_device
        data_parallel_random_init initial_loss_scale""",
    "rows that pad the vocabulary and get no probability": """
        padded_vocab_size make_vocab_size_divisible_by""",
    "other names of a flag that counts": """
        use_rotary_position_embeddings group_query_attention recompute_activations
        moe_layer_recompute""",
    "where a layer, a micro-batch or an expert is computed": """
        micro_batch_size num_layers_in_first_pipeline_stage num_layers_in_last_pipeline_stage
        pipeline_model_parallel_layout account_for_embedding_in_pipeline_split
        account_for_loss_in_pipeline_split microbatch_group_size_per_vp_stage
        moe_token_dispatcher_type moe_enable_deepep moe_flex_dispatcher_backend
        moe_deepep_num_sms moe_hybridep_num_sms moe_extended_tp use_distributed_optimizer
        num_distributed_optimizer_instances hierarchical_context_parallel_sizes
        max_seqlen_per_dp_cp_rank hybrid_context_parallel cp_comm_type
        data_parallel_sharding_strategy outer_dp_sharding_strategy use_megatron_fsdp""",
    "messages between ranks and their overlap": """
        pipeline_model_parallel_comm_backend variable_seq_lengths overlap_p2p_comm batch_p2p_comm
        batch_p2p_sync use_ring_exchange_p2p overlap_p2p_comm_warmup_flush
        deallocate_pipeline_outputs defer_embedding_wgrad_compute wgrad_deferral_limit
        delay_wgrad_compute ep_overlap_early_attn_memory_release overlap_moe_expert_parallel_comm
        moe_shared_expert_overlap async_tensor_model_parallel_allreduce tp_comm_overlap
        tp_comm_bulk_wgrad tp_comm_bulk_dgrad tp_comm_overlap_ag tp_comm_overlap_rs
        tp_comm_overlap_rs_dgrad tp_comm_split_ag tp_comm_atomic_ag tp_comm_split_rs
        tp_comm_atomic_rs tp_comm_overlap_disable_qkv tp_comm_overlap_disable_fc1
        tp_comm_bootstrap_backend clone_scatter_output_in_embedding symmetric_ar_type
        overlap_grad_reduce overlap_param_gather align_param_gather
        overlap_param_gather_with_optimizer_step bucket_size pad_buckets_for_high_nccl_busbw
        average_in_collective reduce_scatter_with_fp32_accumulation gradient_reduce_div_fusion
        suggested_communication_unit_size nccl_ub fsdp_double_buffer
        disable_symmetric_registration fsdp_manual_registration""",
    "kernels and fusions: the same function, other last digits": """
        transformer_impl moe_kernels moe_grouped_gemm moe_use_legacy_grouped_gemm
        moe_permute_fusion moe_router_fusion moe_pad_expert_input_to_capacity attention_backend
        bias_gelu_fusion bias_swiglu_fusion gradient_accumulation_fusion masked_softmax_fusion
        persist_layer_norm memory_efficient_layer_norm bias_dropout_fusion apply_rope_fusion
        fused_single_qkv_rope use_fused_weighted_squared_relu use_te_activation_func
        cross_entropy_loss_fusion cross_entropy_fusion_impl use_te_rng_tracker deterministic_mode
        disable_bf16_reduced_precision_matmul batch_invariant_mode use_mamba_mem_eff_path
        disable_parameter_transpose_cache keep_fp8_transpose_cache enable_autocast
        enable_cuda_graph cuda_graph_use_single_mempool cuda_graph_retain_backward_graph
        cuda_graph_warmup_steps external_cuda_graph cuda_graph_impl cuda_graph_scope""",
    "memory: what is kept, computed again or moved away": """
        recompute_granularity recompute_method recompute_num_layers recompute_modules
        distribute_saved_activations num_microbatches_with_partial_activation_checkpoints
        cpu_offloading cpu_offloading_num_layers cpu_offloading_activations cpu_offloading_weights
        cpu_offloading_double_buffering fine_grained_activation_offloading offload_modules
        min_offloaded_tensor_size optimizer_cpu_offload optimizer_offload_fraction
        use_torch_optimizer_for_cpu_offload overlap_cpu_optimizer_d2h_h2d pin_cpu_grads
        pin_cpu_params manual_gc manual_gc_interval""",
    "what is shown and checked": """
        barrier_with_L1_time log_max_attention_logit log_num_zeros_in_grad moe_per_layer_logging
        config_logger_dir check_for_nan_in_grad check_for_large_grads test_mode
        moe_enable_routing_replay""",
    "writing text, not training": """
        flash_decode inference_rng_tracker use_inference_optimized_layers
        inference_fuse_tp_communication mlp_chunks_for_prefill cache_mla_latents
        hetereogenous_dist_checkpoint""",
}
"""Why -> flags that may differ between a run and its resume."""

SCHEDULE = (
    "lr",
    "min_lr",
    "decoupled_lr",
    "decoupled_min_lr",
    "lr_decay_style",
    "lr_warmup_iters",
    "lr_warmup_samples",
    "lr_warmup_fraction",
    "lr_warmup_init",
    "lr_wsd_decay_style",
    "lr_wsd_decay_iters",
    "lr_wsd_decay_samples",
    "start_weight_decay",
    "end_weight_decay",
    "weight_decay_incr_style",
)
"""What --override-opt-param-scheduler and --use-checkpoint-opt-param-scheduler set free."""

TOKENS = "tokenizer_vocab_size"
"""Name of the number of tokens that the tokenizer has; the model's tables may be larger."""


def may_change() -> frozenset[str]:
    """All names of MAY_CHANGE."""
    return frozenset(name for names in MAY_CHANGE.values() for name in names.split())


def fingerprint(cfg: RunConfig, num_tokens: int | None = None) -> dict[str, Any]:
    """Flag (its `dest`) -> value, plain JSON.

    Args:
        num_tokens: tokens of the tokenizer, where it is known.
    """
    free, found = may_change(), {}
    for section in SECTIONS:
        for member in members()[section]:
            if member.dest not in free:
                found[member.dest] = _plain(getattr(getattr(cfg, section), member.name))
    return found if num_tokens is None else {**found, TOKENS: num_tokens}


def free_to_change(cfg: RunConfig) -> frozenset[str]:
    """Flags that this run is told to take anew, or does not use."""
    if cfg.train.eval_only:
        return frozenset((*fingerprint(cfg), TOKENS, DATA, TOKENIZER))
    schedule = cfg.schedule
    if schedule.override_opt_param_scheduler or schedule.use_checkpoint_opt_param_scheduler:
        return frozenset((*SCHEDULE, "weight_decay"))
    return frozenset()


def names(text: str | None) -> frozenset[str]:
    """`--seed,num-experts` as {"seed", "num_moe_experts"}: a flag's spelling or its `dest`."""
    dests = {name: flag.dest for flag in all_flags().values() for name in flag.names}
    words = (part.strip().lstrip("-").replace("_", "-") for part in (text or "").split(","))
    return frozenset(dests.get(f"--{word}", word.replace("-", "_")) for word in words if word)


def shown(name: str) -> str:
    """The spelling of a flag, for a person."""
    flag = all_flags().get(name)
    return flag.names[0] if flag else f"--{name.replace('_', '-')}"


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def differences(
    saved: Mapping[str, Any], mine: Mapping[str, Any], accepted: Collection[str]
) -> dict[str, str]:
    """Name -> `old -> new`, without the accepted ones. A flag that one of the two does not know is
    none of them.
    """
    known = [name for name in mine if name in saved and name not in accepted]
    return {name: f"{saved[name]} -> {mine[name]}" for name in known if saved[name] != mine[name]}
