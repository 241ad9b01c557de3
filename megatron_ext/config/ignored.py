"""THE table of what is parsed and not honoured: flag -> honest reason, one warning for all.

`INERT` are Megatron-LM's flags that have no field elsewhere: they exist so that a launch script
keeps working.  `UNHONOURED` are flags of megatron-core's classes which this release does not act
on; `NEEDS_TRANSFORMER_ENGINE` the same, but only with ``--transformer-impl local``.
A flag is named in the warning only if it was set to something else than what happens anyway.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

NOT_YET = "not built yet"
TE = "a kernel of Transformer Engine; --transformer-impl local computes the same without it"
FT = "NVIDIA's resiliency extension is not used"
ONE_LOGGER = "NVIDIA's internal one-logger is not used"
STRAGGLER = "Megatron-LM's straggler detector (it opens an unauthenticated port) is not used"
RERUN = "the rerun engine is not used; a NaN loss stops the run with exit code 76"
MSC = "the multi-storage client is not used"
CONVERT = "no conversion while training"
REPLICATION = "local replicated checkpoints are not built yet"
REMOVED = "Megatron-LM removed this flag"
CUDA_GRAPHS = "CUDA graphs are not built yet"
FP8 = "fp8 and fp4 are not built yet: the run computes in its bf16, fp16 or fp32"
CHECKPOINT = "this choice of how checkpoints are written is not built yet"
LOGS = "this log is not built yet"
WANDB = "wandb is not built yet; metrics.jsonl and TensorBoard hold the same numbers"
TP_OVERLAP = "needs Transformer Engine's user buffers, not built yet"
OFFLOAD = "offloading is not built yet: the optimizer stays on its device"
FSDP = "FSDP is not built yet"


@dataclass(frozen=True)
class Inert:
    """A flag that only Megatron-LM has: its type, default and why nothing follows from it."""

    dest: str
    annotation: str
    default: object
    reason: str
    meta: dict = field(default_factory=dict)

    @property
    def help(self) -> str:
        """The help text of a flag without effect."""
        return f"No effect: {self.reason}."


def _spelled(*names: str) -> dict:
    return {"arg_names": list(names)}


_INPROCESS: tuple[tuple[str, str, object], ...] = (
    ("restart", "bool", False),
    ("max_iterations", "int | None", None),
    ("monitor_thread_interval", "float", 1.0),
    ("monitor_process_interval", "float", 1.0),
    ("progress_watchdog_interval", "float", 1.0),
    ("heartbeat_interval", "float", 30.0),
    ("soft_timeout", "float", 60.0),
    ("hard_timeout", "float", 90.0),
    ("heartbeat_timeout", "float", 60.0),
    ("barrier_timeout", "float", 120.0),
    ("completion_timeout", "float", 120.0),
    ("last_call_wait", "float", 1.0),
    ("termination_grace_time", "float", 1.0),
    ("granularity", "Literal['node', 'rank']", "node"),
    ("active_world_size", "int", 1),
    ("empty_cuda_cache", "bool", False),
)

INERT: tuple[Inert, ...] = (
    *(Inert(f"inprocess_{n}", kind, default, FT) for n, kind, default in _INPROCESS),
    Inert("enable_ft_package", "bool", False, FT),
    Inert("calc_ft_timeouts", "bool", False, FT),
    Inert("ft_num_warmup_iters", "int", 5, FT),
    Inert("enable_one_logger", "bool", False, ONE_LOGGER, _spelled("--no-one-logger")),
    Inert("one_logger_project", "str", "megatron-lm", ONE_LOGGER),
    Inert("one_logger_run_name", "str | None", None, ONE_LOGGER),
    Inert("one_logger_async", "bool", False, ONE_LOGGER),
    Inert("app_tag_run_name", "str | None", None, ONE_LOGGER),
    Inert("app_tag_run_version", "str", "0.0.0", ONE_LOGGER),
    Inert("log_straggler", "bool", False, STRAGGLER),
    Inert("straggler_ctrlr_port", "int", 65535, STRAGGLER),
    Inert("straggler_minmax_count", "int", 1, STRAGGLER),
    Inert("disable_straggler_on_startup", "bool", False, STRAGGLER),
    Inert(
        "rerun_mode",
        "Literal['disabled', 'validate_results', 'report_stats']",
        "disabled",
        RERUN,
    ),
    Inert("error_injection_rate", "int", 0, RERUN),
    Inert(
        "error_injection_type",
        "Literal['correct_result', 'transient_error', 'persistent_error']",
        "transient_error",
        RERUN,
    ),
    Inert("check_for_spiky_loss", "bool", False, RERUN),
    Inert("enable_msc", "bool", False, MSC),
    Inert("disable_msc", "bool", False, MSC),
    Inert("ckpt_convert_format", "Literal['torch', 'torch_dist'] | None", None, CONVERT),
    Inert("ckpt_convert_save", "str | None", None, CONVERT),
    Inert("ckpt_convert_update_legacy_dist_opt_format", "bool", False, CONVERT),
    Inert("replication", "bool", False, REPLICATION),
    Inert("replication_jump", "int | None", None, REPLICATION),
    Inert("replication_factor", "int", 2, REPLICATION),
    Inert("use_dist_ckpt", "bool", True, "always on (--ckpt-format torch_dist)"),
    Inert("dist_ckpt_format", "str | None", None, "--ckpt-format replaces it"),
    Inert("dist_ckpt_workers", "int", 1, NOT_YET),
    Inert("use_mcore_models", "bool", True, "always on: the model is megatron-core's"),
    Inert("use_flash_attn", "bool", False, "PyTorch's attention picks its kernel by itself"),
    Inert("enable_experimental", "bool", False, "no experimental feature waits behind it here"),
    Inert("local_rank", "int", 0, "the local rank comes from LOCAL_RANK of the environment"),
    Inert("lazy_mpu_init", "bool", False, REMOVED),
    Inert("disable_jit_fuser", "bool", False, "nothing is compiled by the jit fuser here"),
    Inert("batch_size", "int | None", None, f"{REMOVED}; use --micro-batch-size"),
    Inert("warmup", "int | None", None, f"{REMOVED}; use --lr-warmup-fraction"),
    Inert(
        "model_parallel_size", "int | None", None, f"{REMOVED}; use --tensor-model-parallel-size"
    ),
    Inert("checkpoint_activations", "bool", False, f"{REMOVED}; use --recompute-activations"),
)

UNHONOURED: dict[str, str] = {
    "fp8": FP8,
    "fp8_param": FP8,
    "fp8_dot_product_attention": FP8,
    "fp8_multi_head_attention": FP8,
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
    "tp_comm_overlap": TP_OVERLAP,
    "delay_wgrad_compute": "overlap of weight gradients with dispatch is not built yet",
    "overlap_moe_expert_parallel_comm": "overlap of dispatch with computation is not built yet",
    "ep_overlap_early_attn_memory_release": "overlap of dispatch is not built yet",
    "optimizer_cpu_offload": OFFLOAD,
    "overlap_cpu_optimizer_d2h_h2d": OFFLOAD,
    "cpu_offloading": OFFLOAD,
    "cpu_offloading_num_layers": OFFLOAD,
    "fine_grained_activation_offloading": OFFLOAD,
    "use_megatron_fsdp": FSDP,
    "use_kitchen": "the kitchen package is not used",
    "flash_decode": "an inference option",
    "inference_rng_tracker": "an inference option",
    "wandb_project": WANDB,
    "wandb_exp_name": WANDB,
    "wandb_entity": WANDB,
    "wandb_save_dir": WANDB,
    "timing_log_level": "timers beyond the step time are not built yet",
    "log_timers_to_tensorboard": "timers beyond the step time are not built yet",
    "ckpt_format": "checkpoints are always written as torch_dist",
    "openai_gelu": "GELU is PyTorch's exact one",
    "init_method_xavier_uniform": "weights are normal with --init-method-std",
    "data_parallel_random_init": "all data-parallel ranks start from the same weights",
    "full_validation": "an evaluation takes --eval-iters batches",
    "iterations_to_skip": NOT_YET,
    "num_workers": "the loader prefetches inside the training process",
    "num_dataset_builder_threads": "one process builds the indices",
    "dataloader_type": "samples are read in the order of the index, as with single",
    "use_persistent_ckpt_worker": CHECKPOINT,
    "ckpt_fully_parallel_load": CHECKPOINT,
    "ckpt_assume_constant_structure": CHECKPOINT,
    "dist_ckpt_strictness": CHECKPOINT,
    "dist_ckpt_optim_fully_reshardable": CHECKPOINT,
    "dist_ckpt_save_pre_mcore_014": CHECKPOINT,
    "log_params_norm": LOGS,
    "log_memory_to_tensorboard": LOGS,
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
    "cross_entropy_fusion_impl": frozenset({"native"}),
}
"""Values that ask for what happens anyway."""


def reasons(values: Mapping[str, object]) -> dict[str, str]:
    """dest -> reason of everything that these values leave without effect."""
    table = {i.dest: i.reason for i in INERT} | UNHONOURED
    if values.get("transformer_impl") == "local":
        table |= NEEDS_TRANSFORMER_ENGINE
    return table
