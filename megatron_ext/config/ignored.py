"""THE table of what is parsed and not honoured: flag -> honest reason, one warning for all.

`INERT` (its lines are in inert.py) are Megatron-LM's flags that have no field elsewhere: they exist
so that a launch script keeps working.  `UNHONOURED` are flags of megatron-core's classes which this
release does not act on; `NEEDS_TRANSFORMER_ENGINE` the same, but only with ``--transformer-impl
local``.  A flag is named in the warning only if it was set to something else than what happens
anyway.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from megatron_ext.config.inert import (
    CHECKPOINT,
    CUDA_GRAPHS,
    FP8,
    FSDP,
    INERT,
    LOGS,
    OFFLOAD,
    TE,
    TP_OVERLAP,
    WEIGHTS,
)

UNHONOURED: dict[str, str] = {
    "fp8": FP8,
    "fp8_param": FP8,
    "fp8_dot_product_attention": FP8,
    "fp8_multi_head_attention": FP8,
    "fp8_recipe": FP8,
    "fp4_recipe": FP8,
    "fp4_quantizer_factory": FP8,
    "tp_only_amax_red": FP8,
    "disable_parameter_transpose_cache": FP8,
    "keep_fp8_transpose_cache": FP8,
    "fp8_margin": FP8,
    "fp8_interval": FP8,
    "fp8_amax_history_len": FP8,
    "fp8_amax_compute_algo": FP8,
    "fp8_wgrad": FP8,
    "fp8_quantizer_factory": FP8,
    "num_layers_at_start_in_bf16": FP8,
    "num_layers_at_end_in_bf16": FP8,
    "first_last_layers_bf16": FP8,
    "fp4": FP8,
    "fp4_param": FP8,
    "reuse_grad_buf_for_mxfp8_param_ag": FP8,
    "moe_router_padding_for_quantization": FP8,
    "moe_router_padding_for_fp8": FP8,
    "activation_func_fp8_input_store": FP8,
    "enable_cuda_graph": CUDA_GRAPHS,
    "external_cuda_graph": CUDA_GRAPHS,
    "cuda_graph_impl": CUDA_GRAPHS,
    "cuda_graph_scope": CUDA_GRAPHS,
    "cuda_graph_warmup_steps": CUDA_GRAPHS,
    "cuda_graph_use_single_mempool": CUDA_GRAPHS,
    "cuda_graph_retain_backward_graph": CUDA_GRAPHS,
    "tp_comm_overlap": TP_OVERLAP,
    "tp_comm_overlap_rs_dgrad": TP_OVERLAP,
    "tp_comm_overlap_disable_qkv": TP_OVERLAP,
    "tp_comm_overlap_disable_fc1": TP_OVERLAP,
    "tp_comm_atomic_ag": TP_OVERLAP,
    "tp_comm_atomic_rs": TP_OVERLAP,
    "tp_comm_bootstrap_backend": TP_OVERLAP,
    "tp_comm_bulk_wgrad": TP_OVERLAP,
    "tp_comm_bulk_dgrad": TP_OVERLAP,
    "tp_comm_overlap_ag": TP_OVERLAP,
    "tp_comm_overlap_rs": TP_OVERLAP,
    "tp_comm_split_ag": TP_OVERLAP,
    "tp_comm_split_rs": TP_OVERLAP,
    "delay_wgrad_compute": "overlap of weight gradients with dispatch is not built yet",
    "overlap_moe_expert_parallel_comm": "overlap of dispatch with computation is not built yet",
    "ep_overlap_early_attn_memory_release": "overlap of dispatch is not built yet",
    "optimizer_cpu_offload": OFFLOAD,
    "overlap_cpu_optimizer_d2h_h2d": OFFLOAD,
    "optimizer_offload_fraction": OFFLOAD,
    "use_torch_optimizer_for_cpu_offload": OFFLOAD,
    "pin_cpu_grads": OFFLOAD,
    "pin_cpu_params": OFFLOAD,
    "cpu_offloading": OFFLOAD,
    "cpu_offloading_num_layers": OFFLOAD,
    "fine_grained_activation_offloading": OFFLOAD,
    "use_megatron_fsdp": FSDP,
    "data_parallel_sharding_strategy": FSDP,
    "outer_dp_sharding_strategy": FSDP,
    "suggested_communication_unit_size": FSDP,
    "fsdp_double_buffer": FSDP,
    "fsdp_manual_registration": FSDP,
    "gradient_reduce_div_fusion": FSDP,
    "use_cpu_initialization": WEIGHTS,
    "perform_initialization": WEIGHTS,
    "init_model_with_meta_device": WEIGHTS,
    "pipeline_model_parallel_comm_backend": "the pipeline uses --distributed-backend",
    "use_kitchen": "the kitchen package is not used",
    "moe_extended_tp": "--expert-tensor-parallel-size replaced it",
    "moe_per_layer_logging": "--log-routing-interval writes every layer",
    "use_inference_optimized_layers": "an inference option",
    "flash_decode": "an inference option",
    "inference_rng_tracker": "an inference option",
    "ckpt_format": "checkpoints are always written as torch_dist",
    "openai_gelu": "GELU is PyTorch's exact one",
    "full_validation": "an evaluation takes --eval-iters batches",
    "num_workers": "the loader prefetches inside the training process",
    "num_dataset_builder_threads": "one process builds the indices",
    "dataloader_type": "samples are read in the order of the index, as with single",
    "use_persistent_ckpt_worker": CHECKPOINT,
    "ckpt_fully_parallel_load": CHECKPOINT,
    "ckpt_assume_constant_structure": CHECKPOINT,
    "dist_ckpt_strictness": CHECKPOINT,
    "dist_ckpt_optim_fully_reshardable": CHECKPOINT,
    "dist_ckpt_save_pre_mcore_014": CHECKPOINT,
    "log_progress": LOGS,
    "test_mode": "a test option of Megatron-LM",
}
"""dest -> reason: the value never reaches megatron-core."""

NEEDS_TRANSFORMER_ENGINE: dict[str, str] = {
    "apply_rope_fusion": TE,
    "bias_dropout_fusion": TE,
    "bias_gelu_fusion": TE,
    "bias_swiglu_fusion": TE,
    "gradient_accumulation_fusion": TE,
    "masked_softmax_fusion": TE,
    "moe_permute_fusion": TE,
    "moe_router_fusion": TE,
    "persist_layer_norm": TE,
    "use_precision_aware_optimizer": "needs Transformer Engine's fused Adam; states stay fp32",
    "main_grads_dtype": "needs Transformer Engine's fused Adam; states stay fp32",
    "main_params_dtype": "needs Transformer Engine's fused Adam; states stay fp32",
    "exp_avg_dtype": "needs Transformer Engine's fused Adam; states stay fp32",
    "exp_avg_sq_dtype": "needs Transformer Engine's fused Adam; states stay fp32",
    "use_te_rng_tracker": "needs Transformer Engine",
    "use_te_activation_func": "needs Transformer Engine",
    "use_fused_weighted_squared_relu": TE,
    "log_max_attention_logit": "needs Transformer Engine's attention, which reports it",
    "disable_bf16_reduced_precision_matmul": "a switch of CUDA's matrix library",
    "cross_entropy_fusion_impl": "needs Transformer Engine; the loss is computed by ours",
    "attention_backend": "local attention is PyTorch's scaled_dot_product_attention",
}
"""dest -> reason, only with ``--transformer-impl local``."""

HARMLESS: dict[str, frozenset] = {
    "disable_msc": frozenset({True}),
    "attention_backend": frozenset({"auto", "local"}),
    "ckpt_format": frozenset({"torch_dist"}),
    "dataloader_type": frozenset({"single"}),
    "pipeline_model_parallel_comm_backend": frozenset({"nccl"}),
    "verify_integrity": frozenset({True}),
    "cross_entropy_fusion_impl": frozenset({"native"}),
}
"""Values that ask for what happens anyway."""


ON_BY_DEFAULT = frozenset(
    {
        "fp8_wgrad",
        "tp_comm_bulk_wgrad",
        "tp_comm_bulk_dgrad",
        "tp_comm_overlap_ag",
        "tp_comm_overlap_rs",
        "tp_comm_split_ag",
        "tp_comm_split_rs",
        "pin_cpu_grads",
        "pin_cpu_params",
        "gradient_reduce_div_fusion",
        "perform_initialization",
    }
)
"""Switches of `UNHONOURED` of which --no-... is what has no effect."""


class _Flag(Protocol):
    dest: str
    section: str
    default: object


def asks_for_nothing(flag: _Flag, value: object) -> bool:
    """True where a value of this table's flags asks for what happens anyway."""
    if value is None or value in HARMLESS.get(flag.dest, ()):
        return True
    if flag.section == "megatron_only":
        return value == flag.default
    if flag.dest in ON_BY_DEFAULT:
        return value is True
    # a switch that is on by default still asks for its work
    return value is False if isinstance(value, bool) else value == flag.default


def reasons(values: Mapping[str, object]) -> dict[str, str]:
    """dest -> reason of everything that these values leave without effect."""
    table = {i.dest: i.reason for i in INERT} | UNHONOURED
    if values.get("transformer_impl") == "local":
        table |= NEEDS_TRANSFORMER_ENGINE
    return table
