"""Flags that only mean something beside another one: for --explain-flags, no warning is due.

    --wandb-exp-name without --wandb-project, --sgd-momentum with adam, ...

Reasons are read as "no effect: <reason>".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

Values = Mapping[str, object]


@dataclass(frozen=True)
class Need:
    """`dests` (or all that begin with one of `prefixes`) are read only where `holds(values)`."""

    reason: str
    holds: Callable[[Values], bool]
    dests: tuple[str, ...] = ()
    prefixes: tuple[str, ...] = ()

    def covers(self, dest: str) -> bool:
        """True for a flag that this need is about."""
        return dest in self.dests or (bool(self.prefixes) and dest.startswith(self.prefixes))


def _given(dest: str) -> Callable[[Values], bool]:
    return lambda v: bool(v[dest])


def _above_one(dest: str) -> Callable[[Values], bool]:
    return lambda v: (v[dest] or 1) > 1  # type: ignore[operator]


def _among(dest: str, *words: str) -> Callable[[Values], bool]:
    return lambda v: v[dest] in words


def _tier(name: str) -> Callable[[Values], bool]:
    return lambda v: name in str(v["ckpt_tiers"]).split(",")


NEEDS: tuple[Need, ...] = (
    Need(
        "the model has no experts without --num-experts",
        _given("num_moe_experts"),
        prefixes=("moe_",),
    ),
    Need(
        "--tensor-model-parallel-size is 1",
        _above_one("tensor_model_parallel_size"),
        ("sequence_parallel",),
    ),
    Need(
        "--pipeline-model-parallel-size is 1",
        _above_one("pipeline_model_parallel_size"),
        (
            "num_layers_per_virtual_pipeline_stage",
            "num_virtual_stages_per_pipeline_rank",
            "virtual_pipeline_model_parallel_size",
            "account_for_embedding_in_pipeline_split",
            "account_for_loss_in_pipeline_split",
            "overlap_p2p_comm_warmup_flush",
            "microbatch_group_size_per_vp_stage",
        ),
    ),
    Need("the model has no Mamba layers", lambda _: False, prefixes=("mamba_", "use_mamba")),
    Need(
        "--experimental-attention-variant is not given",
        _given("experimental_attention_variant"),
        prefixes=("linear_", "dsa_"),
    ),
    Need("--context-parallel-size is 1", _above_one("context_parallel_size"), ("cp_comm_type",)),
    Need(
        "--group-query-attention is not given",
        _given("group_query_attention"),
        ("num_query_groups",),
    ),
    Need(
        "--multi-latent-attention is not given",
        _given("multi_latent_attention"),
        ("kv_lora_rank", "q_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim"),
    ),
    Need(
        "--position-embedding-type is not rope or yarn",
        _among("position_embedding_type", "rope", "yarn"),
        ("rotary_base", "rotary_percent", "rotary_interleaved", "use_rope_scaling"),
    ),
    Need(
        "--moe-token-dispatcher-type is not flex",
        _among("moe_token_dispatcher_type", "flex"),
        ("moe_deepep_num_sms", "moe_hybridep_num_sms", "moe_flex_dispatcher_backend"),
    ),
    Need(
        "--moe-router-enable-expert-bias is not given",
        _given("moe_router_enable_expert_bias"),
        ("moe_router_bias_update_rate",),
    ),
    Need(
        "--moe-router-load-balancing-type is none",
        lambda v: v["moe_router_load_balancing_type"] != "none",
        ("moe_aux_loss_coeff",),
    ),
    Need(
        "--moe-expert-capacity-factor is not given: no token is dropped",
        lambda v: v["moe_expert_capacity_factor"] is not None,
        ("moe_token_drop_policy", "moe_pad_expert_input_to_capacity", "moe_capacity_scope"),
    ),
    Need("--mtp-num-layers is not given", _given("mtp_num_layers"), ("mtp_loss_scaling_factor",)),
    Need(
        "--recompute-granularity is not full",
        _among("recompute_granularity", "full"),
        ("recompute_method", "recompute_num_layers"),
    ),
    Need(
        "--recompute-granularity is not selective",
        _among("recompute_granularity", "selective"),
        ("recompute_modules",),
    ),
    Need(
        "--fp16 is not given",
        _given("fp16"),
        (
            "loss_scale",
            "initial_loss_scale",
            "min_loss_scale",
            "loss_scale_window",
            "hysteresis",
            "fp16_lm_cross_entropy",
        ),
    ),
    Need("--optimizer is not sgd", _among("optimizer", "sgd"), ("sgd_momentum",)),
    Need("--optimizer is not muon", _among("optimizer", "muon", "dist_muon"), (), ("muon_",)),
    Need(
        "--lr-decay-style is not WSD",
        _among("lr_decay_style", "WSD"),
        ("lr_wsd_decay_style", "lr_wsd_decay_iters", "lr_wsd_decay_samples"),
    ),
    Need(
        "--overlap-grad-reduce is not given: gradients are one bucket",
        _given("overlap_grad_reduce"),
        ("bucket_size", "pad_buckets_for_high_nccl_busbw"),
    ),
    Need(
        "--profile is not given",
        _given("profile"),
        (
            "profile_step_start",
            "profile_step_end",
            "profile_ranks",
            "use_pytorch_profiler",
            "pytorch_profiler_collect_shapes",
            "pytorch_profiler_collect_callstack",
        ),
    ),
    Need(
        "--wandb-project is not given",
        _given("wandb_project"),
        ("wandb_exp_name", "wandb_entity", "wandb_save_dir"),
    ),
    Need("--manual-gc is not given", _given("manual_gc"), ("manual_gc_interval",)),
    Need("--exit-signal-handler is not given", _given("exit_signal_handler"), ("exit_signal",)),
    Need(
        "--tokenizer-type is not TikTokenizer",
        _among("tokenizer_type", "TikTokenizer"),
        ("tiktoken_pattern", "tiktoken_num_special_tokens"),
    ),
    Need("--ckpt-tiers has no memory", _tier("memory"), ("ckpt_memory_interval",)),
    Need("--ckpt-tiers has no local", _tier("local"), ("ckpt_local_dir", "ckpt_local_interval")),
)


def unmet(dest: str, values: Values) -> str:
    """Why nothing reads this flag beside these values; an empty text where something does."""
    return next((n.reason for n in NEEDS if n.covers(dest) and not n.holds(values)), "")
