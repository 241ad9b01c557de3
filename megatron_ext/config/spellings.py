"""Where Megatron-LM's flag differs from megatron-core's field: small tables, nothing else.

Keys are megatron-core field names.  A test checks that every key still exists in the installed
version, so that a renamed field cannot lose its flag silently.
"""

from __future__ import annotations

ALIASES: dict[str, tuple[str, ...]] = {
    "num_moe_experts": ("--num-experts",),
    "apply_rope_fusion": ("--no-rope-fusion",),
    "num_layers_in_first_pipeline_stage": ("--decoder-first-pipeline-num-layers",),
    "num_layers_in_last_pipeline_stage": ("--decoder-last-pipeline-num-layers",),
    "fp8_param": ("--fp8-param-gather",),
    "overlap_p2p_comm": ("--no-overlap-p2p-communication",),
    "grad_reduce_in_fp32": ("--accumulate-allreduce-grads-in-fp32",),
    "check_for_nan_in_grad": ("--no-check-for-nan-in-loss-and-grad",),
    "bucket_size": ("--ddp-bucket-size",),
    "average_in_collective": ("--ddp-average-in-collective",),
    "pad_buckets_for_high_nccl_busbw": ("--ddp-pad-buckets-for-high-nccl-busbw",),
    "reduce_scatter_with_fp32_accumulation": ("--ddp-reduce-scatter-with-fp32-accumulation",),
    "nccl_ub": ("--use-nccl-ub",),
    "muon_split_qkv": ("--muon-no-split-qkv",),
    "use_te_rng_tracker": ("--te-rng-tracker",),
    "tp_comm_bulk_wgrad": ("--disable-tp-comm-bulk-wgrad",),
    "tp_comm_bulk_dgrad": ("--disable-tp-comm-bulk-dgrad",),
    "tp_comm_overlap_ag": ("--disable-tp-comm-overlap-ag",),
    "tp_comm_overlap_rs": ("--disable-tp-comm-overlap-rs",),
    "tp_comm_split_ag": ("--disable-tp-comm-split-ag",),
    "tp_comm_split_rs": ("--disable-tp-comm-split-rs",),
    "fp8_wgrad": ("--disable-fp8-wgrad",),
    "clone_scatter_output_in_embedding": ("--disable-clone-scatter-output-in-embedding",),
}
"""Further spellings of a field's flag; ``--no-x``/``--disable-x`` on a field ``x`` means False."""

DEFAULTS: dict[str, object] = {
    "apply_rope_fusion": True,
    "attention_softmax_in_fp32": False,
    "bias_dropout_fusion": True,
    "check_for_nan_in_grad": True,
    "cuda_graph_scope": None,
    "deallocate_pipeline_outputs": True,
    "align_param_gather": True,
    "gradient_accumulation_fusion": True,
    "kv_lora_rank": 32,
    "masked_softmax_fusion": True,
    "muon_momentum": 0.9,
    "muon_tp_mode": "duplicated",
    "optimizer_offload_fraction": 1.0,
    "overlap_p2p_comm": None,
    "batch_p2p_comm": None,
    "persist_layer_norm": True,
    "q_lora_rank": None,
    "rotary_scaling_factor": 1.0,
}
"""Megatron-LM's default where it differs from megatron-core's."""

HELP: dict[str, str] = {
    "attention_softmax_in_fp32": "Softmax of the attention in fp32. Megatron-LM's default is off.",
    "overlap_p2p_comm": "Pipeline sends overlap with computation. Default: on with vpp, else off.",
    "batch_p2p_comm": "Pipeline sends go in one batch. Default: the opposite of the one above.",
    "q_lora_rank": "Rank of the query's low-rank form. Default: full rank, as in Megatron-LM.",
}
"""Help that replaces megatron-core's where the meaning of None or of the default changed."""

CHOICES: dict[str, tuple] = {
    "moe_router_load_balancing_type": (
        "aux_loss",
        "seq_aux_loss",
        "global_aux_loss",
        "sinkhorn",
        "none",
    ),
    "optimizer": ("adam", "sgd", "muon", "dist_muon"),
    "rope_type": ("rope", "yarn"),
    "muon_scale_mode": ("spectral", "unit_rms_norm", "shape_scaling"),
    "muon_fp32_matmul_prec": ("low", "medium", "high"),
    "muon_tp_mode": ("blockwise", "duplicated", "distributed"),
    "recompute_modules": (
        "core_attn",
        "moe_act",
        "layernorm",
        "mla_up_proj",
        "mlp",
        "moe",
        "shared_experts",
    ),
    "main_grads_dtype": ("fp32", "bf16"),
    "main_params_dtype": ("fp32", "fp16"),
}
"""Legal values where megatron-core's annotation is only ``str``."""

OPTIONAL = frozenset({"q_lora_rank", "overlap_p2p_comm", "batch_p2p_comm", "cuda_graph_scope"})
"""Fields for which None is a value of ours though megatron-core's annotation has none."""

SAME_FLAG: dict[str, str] = {"fp8_param_gather": "fp8_param"}
"""A field of another class that the same flag sets."""

NOT_FLAGS = frozenset(
    {
        "params_dtype",
        "pipeline_dtype",
        "autocast_dtype",
        "gated_linear_unit",
        "bias_activation_fusion",
        "mtp_standalone",
        "moe_token_dropping",
        "use_custom_fsdp",
        "is_hybrid_model",
        "inference_sampling_seed",
    }
)
"""Fields that the program derives itself from other flags."""
