"""Megatron-LM's flags that have no field elsewhere and change no number: flag -> honest reason.

They exist so that a launch script keeps working; `ignored` is the one table of everything without
effect, these included.  A flag that would change the training is not here: `refused` has it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

NOT_YET = "not built yet"
TE = "a kernel of Transformer Engine; --transformer-impl local computes the same without it"
FT = "NVIDIA's resiliency extension is not used"
ONE_LOGGER = "NVIDIA's internal one-logger is not used"
STRAGGLER = "--straggler-interval finds stragglers without Megatron-LM's open port"
RERUN = "--rerun-mode replays NaNs and spikes (--spike-threshold); nothing injects errors"
MSC = "the multi-storage client is not used"
CONVERT = "no conversion while training"
REPLICATION = "local replicated checkpoints are not built yet"
REMOVED = "Megatron-LM removed this flag"
CUDA_GRAPHS = "CUDA graphs are not built yet"
FP8 = "fp8 and fp4 are not built yet: the run computes in its bf16, fp16 or fp32"
CHECKPOINT = "this choice of how checkpoints are written is not built yet"
LOGS = "this log is not built yet"
TP_OVERLAP = "needs Transformer Engine's user buffers, not built yet"
OFFLOAD = "offloading is not built yet: the optimizer stays on its device"
FSDP = "FSDP is not built yet"
KERNEL = "a choice of kernels or of the storage behind them; the numbers are the same without it"
SCHEDULING = "a choice of when work and messages run; the numbers are the same without it"
WRITER = "checkpoints have a writer and reader of their own (docs/checkpoints.md)"
RECORDER = "torch reads TORCH_NCCL_* variables for it; --hang-limit-s writes stacks and collectives"
EVALUATION = "an evaluation comes at every --eval-interval with the training's batch sizes"
WEIGHTS = "weights are drawn on their device, the same in every layout"
LOADER = "the loader has an index and a cache of its own (docs/data.md)"
TOKENS = "training reads tokens; data.prepare made them from the text"


@dataclass(frozen=True)
class Inert:
    """A flag that only Megatron-LM has: its type, default and why nothing follows from it."""

    dest: str
    annotation: str
    default: object
    reason: str
    meta: dict = field(default_factory=dict)
    word: str = "No effect"

    @property
    def help(self) -> str:
        """The help text."""
        return f"{self.word}: {self.reason}."


def _spelled(*names: str) -> dict:
    return {"arg_names": list(names)}


_INPROCESS: tuple[tuple[str, str, object], ...] = (
    ("restart", "bool", False),
    ("max_iterations", "Whole | None", None),
    ("monitor_thread_interval", "Seconds", 1.0),
    ("monitor_process_interval", "Seconds", 1.0),
    ("progress_watchdog_interval", "Seconds", 1.0),
    ("heartbeat_interval", "Seconds", 30.0),
    ("soft_timeout", "Seconds", 60.0),
    ("hard_timeout", "Seconds", 90.0),
    ("heartbeat_timeout", "Seconds", 60.0),
    ("barrier_timeout", "Seconds", 120.0),
    ("completion_timeout", "Seconds", 120.0),
    ("last_call_wait", "Seconds", 1.0),
    ("termination_grace_time", "Seconds", 1.0),
    ("granularity", "Literal['node', 'rank']", "node"),
    ("active_world_size", "Whole", 1),
    ("empty_cuda_cache", "bool", False),
)

_BY_REASON: dict[str, tuple[tuple[str, str, object], ...]] = {
    FP8: (
        ("fp8_output_proj", "bool", False),
        ("te_precision_config_file", "str | None", None),
        ("moe_dispatch_fwd_dtype", "Literal['bf16', 'mxfp8']", "bf16"),
        ("moe_combine_bwd_dtype", "Literal['bf16', 'mxfp8']", "bf16"),
    ),
    CUDA_GRAPHS: (
        ("cuda_graph_modules", "list[str]", []),
        ("optimizer_cuda_graph", "bool", False),
    ),
    KERNEL: (
        ("use_transformer_engine_op_fuser", "bool", False),
        ("moe_permute_fusion_into_hybridep", "bool", False),
        ("muon_use_syrk", "bool", False),
        ("flash_attention_version", "Literal[2, 3, 4] | None", None),
        ("fused_residual_rmsnorm", "bool", False),
        ("mla_down_proj_fusion", "bool", False),
        ("use_grouped_gemm_for_shared_expert", "bool", False),
        ("use_grouped_gemm_for_dense_mlp", "bool", False),
        ("moe_use_grouped_tensor", "bool", False),
        ("moe_single_grouped_weight", "bool", False),
        ("moe_single_grouped_bias", "bool", False),
        ("moe_shared_expert_glu_interleave_size", "Whole | None", None),
        ("moe_mlp_glu_interleave_size", "Whole | None", None),
    ),
    SCHEDULING: (
        ("overlap_dispatch_backward_with_experts_wgrad", "bool", False),
        ("high_priority_a2a_comm_stream", "bool", False),
        ("high_priority_stream_groups", "list[str]", []),
        ("create_all_gather_group", "bool", False),
        ("mlp_chunks_for_training", "Whole", 1),
        ("train_sync_interval", "Whole | None", None),
        ("empty_unused_memory_level", "Literal[0, 1, 2]", 0),
    ),
    "use --moe-deepep-num-sms or --moe-hybridep-num-sms": (
        ("moe_flex_dispatcher_num_sms", "Whole | None", None),
    ),
    "MTP is placed by --pipeline-model-parallel-layout": (("mtp_standalone", "bool", False),),
    TP_OVERLAP: (("tp_comm_overlap_cfg", "str | None", None),),
    OFFLOAD: (("cpu_offloading_retain_pinned_cpu_buffers", "bool", False),),
    WRITER: (
        ("async_strategy", "Literal['nvrx', 'mcore']", "nvrx"),
        ("async_ckpt_use_cpu_shm", "bool", False),
        ("async_ckpt_cpu_priority", "Integer", 10),
        ("async_ckpt_io_priority", "Integer", 3),
        (
            "ckpt_fully_parallel_load_exchange_algo",
            "Literal['broadcast', 'gather_rounds', 'gather_object']",
            "broadcast",
        ),
        ("ckpt_fully_parallel_load_per_rank_objects", "bool", False),
        ("ckpt_fully_parallel_save_process_group", "Literal['dp', 'ep_dp']", "dp"),
        ("ckpt_fully_parallel_load_process_group", "Literal['dp', 'ep_dp']", "dp"),
        ("ckpt_pg_tensors_cache_path", "str | None", None),
        ("ckpt_pg_tensors_cache_create", "bool", False),
        ("distrib_optim_fully_reshardable_mem_efficient", "bool", False),
        ("ckpt_drop_redundant_extra_state", "bool", False),
        (
            "non_persistent_local_ckpt_algo",
            "Literal['fully_parallel', 'atomic']",
            "fully_parallel",
        ),
    ),
    "every checkpoint is read back and compared with its hashes": (
        ("verify_integrity", "bool", False),
    ),
    "the fp32 weights start from the loaded ones": (("load_main_params_from_ckpt", "bool", False),),
    LOGS: (
        ("dump_param_to_param_group_map", "str | None", None),
        ("save_params_interval", "Whole | None", None),
        ("save_activations_interval", "Whole | None", None),
        ("save_wgrads_interval", "Whole | None", None),
        ("save_dgrads_interval", "Whole | None", None),
        ("log_energy", "bool", False),
        ("gpu_sniff_test_interval", "Whole | None", None),
        ("result_rejected_tracker_filename", "str | None", None),
    ),
    "--log-routing-interval writes the load of every expert": (
        ("save_tokens_per_expert_interval", "Whole | None", None),
    ),
    "the number of ranks stands in RUN/config.json and at the start of the log": (
        ("log_world_size_to_tensorboard", "bool", False),
    ),
    "--log-memory-to-tensorboard writes memory at each --tensorboard-log-interval": (
        ("log_memory_interval", "Whole | None", None),
        ("log_device_memory_used", "bool", False),
    ),
    "--timing-log-level prints mean and worst rank": (
        ("timing_log_option", "Literal['max', 'minmax', 'all']", "minmax"),
    ),
    "--profile records with torch's profiler, not with nsys or Chakra": (
        ("pytorch_profiler_collect_chakra", "bool", False),
        ("record_shapes", "bool", False),
        ("nvtx_ranges", "bool", False),
    ),
    "the memory of an out-of-memory error is written into RUN": (
        ("memory_snapshot_path", "str", "snapshot.pickle"),
    ),
    "the loader lives in the training process, whose signals are handled": (
        ("exit_signal_handler_for_dataloader", "bool", False),
    ),
    "NCCL reads its own NCCL_* variables": (("nccl_communicator_config_path", "str | None", None),),
    "one time limit holds from the start; --hang-limit-s finds hangs before it": (
        ("distributed_timeout_seconds_after_init", "Whole | None", None),
    ),
    RECORDER: (
        ("flight_recorder_dump_path", "str | None", None),
        ("flight_recorder_trace_buffer_size", "Whole", 2000),
        ("flight_recorder_include_stack_trace", "bool", False),
    ),
    "buckets have a size, not a number: use --ddp-bucket-size": (
        ("ddp_num_buckets", "Whole | None", None),
    ),
    EVALUATION: (
        ("start_eval_at_iter", "Whole | None", None),
        ("eval_global_batch_size", "Whole | None", None),
        ("eval_micro_batch_size", "Whole | None", None),
    ),
    "one validation loss for the blend, and one for each of its domains": (
        ("multiple_validation_sets", "bool", False),
        ("validation_set_names", "list[str] | None", None),
    ),
    LOADER: (
        ("per_dataset_sequences_path", "str | None", None),
        ("dataloader_fast_cache_load", "bool", False),
        ("dataloader_defer_npy_index_mmap", "bool", False),
        ("object_storage_cache_path", "str | None", None),
        ("mid_level_dataset_surplus", "NotNegative", 0.005),
        ("allow_ambiguous_pad_tokens", "bool", False),
        ("null_tokenizer_pad_id", "Integer", -1),
    ),
    TOKENS: (
        ("trust_remote_code", "bool", False),
        ("tokenizer_metadata", "str | None", None),
        ("tokenizer_sentencepiece_legacy", "bool", False),
        ("tokenizer_hf_no_use_fast", "bool", False),
        ("tokenizer_hf_no_include_special_tokens", "bool", False),
    ),
}
"""Reason -> dest, type and default of the flags that share it."""

_SWITCHES_OFF: dict[str, str] = {
    "log_loss_scale_to_tensorboard": "the loss scale is written with --fp16 only",
    "use_layer_wise_param_layout": SCHEDULING,
    "manual_gc_eval": "garbage is collected at --manual-gc-interval only",
    "use_tokenizer_model_from_checkpoint_args": "the tokenizer is the one of the flags",
    "ckpt_load_validate_sharding_integrity": "checkpoints are always read with every check",
    "strict_fsdp_dtensor_load": FSDP,
    "save_tokenizer_assets": "tokenizer files are not copied into checkpoints",
    "align_grad_reduce": SCHEDULING,
    "flight_recorder_dump_on_timeout": RECORDER,
    "flight_recorder_include_only_active": RECORDER,
    "flight_recorder_extra_dump_on_exec": RECORDER,
    "pad_vocab_size": "padded rows get no probability: the loss is the same without them",
    "tokenizer_sentencepiece_ignore_extra_whitespaces": TOKENS,
}
"""Switches that are on, and are spelled --no-... or --disable-... -> why that changes nothing."""

OFF = ("no", "disable")

INERT: tuple[Inert, ...] = (
    *(Inert(f"inprocess_{n}", kind, default, FT) for n, kind, default in _INPROCESS),
    Inert("enable_ft_package", "bool", False, FT),
    Inert("calc_ft_timeouts", "bool", False, FT),
    Inert("ft_num_warmup_iters", "Whole", 5, FT),
    Inert("enable_one_logger", "bool", False, ONE_LOGGER, _spelled("--no-one-logger")),
    Inert("one_logger_project", "str", "megatron-lm", ONE_LOGGER),
    Inert("one_logger_run_name", "str | None", None, ONE_LOGGER),
    Inert("one_logger_async", "bool", False, ONE_LOGGER),
    Inert("app_tag_run_name", "str | None", None, ONE_LOGGER),
    Inert("app_tag_run_version", "str", "0.0.0", ONE_LOGGER),
    Inert("log_straggler", "bool", False, STRAGGLER),
    Inert("straggler_ctrlr_port", "Port", 65535, STRAGGLER),
    Inert("straggler_minmax_count", "Whole", 1, STRAGGLER),
    Inert("disable_straggler_on_startup", "bool", False, STRAGGLER),
    Inert("error_injection_rate", "Whole", 0, RERUN),
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
    Inert("replication_jump", "Whole | None", None, REPLICATION),
    Inert("replication_factor", "Whole", 2, REPLICATION),
    Inert("use_dist_ckpt", "bool", True, "always on (--ckpt-format torch_dist)"),
    Inert("dist_ckpt_format", "str | None", None, "--ckpt-format replaces it"),
    Inert("dist_ckpt_workers", "Whole", 1, NOT_YET),
    Inert("use_mcore_models", "bool", True, "always on: the model is megatron-core's"),
    Inert("use_flash_attn", "bool", False, "PyTorch's attention picks its kernel by itself"),
    Inert("enable_experimental", "bool", False, "no experimental feature waits behind it here"),
    Inert("local_rank", "Integer", 0, "the local rank comes from LOCAL_RANK of the environment"),
    Inert("lazy_mpu_init", "bool", False, REMOVED),
    Inert("disable_jit_fuser", "bool", False, "nothing is compiled by the jit fuser here"),
    *(Inert(dest, *rest, why) for why, flags in _BY_REASON.items() for dest, *rest in flags),
    *(
        Inert(
            dest, "bool", True, why, _spelled(*(f"--{off}-{dest.replace('_', '-')}" for off in OFF))
        )
        for dest, why in _SWITCHES_OFF.items()
    ),
)
