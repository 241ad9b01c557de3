"""From what was given to what it means: derived values, each with origin ``derived``.

The rules are Megatron-LM's (its validate_args) unless a comment says otherwise; a rule is one small
function over `Values`.  What is refused is collected: here the flags of `refused`, in `checks/` the
rules across flags.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_ext.config import ignored, refused, renamed
from megatron_ext.config.argv import Setting
from megatron_ext.config.flags import all_flags
from megatron_ext.errors import Violation

GIVEN_PREFIXES = ("flag", "file:", "scale-down")


@dataclass
class Values:
    """dest -> value and origin while they are being resolved; ``notes`` become warnings, and
    ``violations`` are refused with those of `checks`.
    """

    value: dict[str, object]
    origin: dict[str, str]
    notes: list[str] = field(default_factory=list)
    violations: list[Violation] = field(default_factory=list)

    def given(self, dest: str) -> bool:
        """True where a flag or a file set it."""
        return self.origin[dest].startswith(GIVEN_PREFIXES)

    def derive(self, dest: str, value: object) -> None:
        """Sets a value that follows from others."""
        if self.value[dest] != value:
            self.value[dest] = value
            self.origin[dest] = "derived"

    def __getitem__(self, dest: str):
        return self.value[dest]


def merge(settings: Sequence[Setting]) -> Values:
    """Defaults overlaid by settings in order: the last one wins."""
    flags = all_flags()
    values = Values(
        {d: _copy(f.default) for d, f in flags.items()}, dict.fromkeys(flags, "default")
    )
    overlay(values, settings)
    return values


def overlay(values: Values, settings: Sequence[Setting]) -> None:
    """Further settings, which win over what is there; None brings the default back."""
    flags = all_flags()
    for setting in settings:
        if setting.dest not in values.value:
            continue
        is_unset = setting.value is None
        default = _copy(flags[setting.dest].default)
        values.value[setting.dest] = default if is_unset else setting.value
        values.origin[setting.dest] = "default" if is_unset else setting.origin


def _copy(default: object) -> object:
    return list(default) if isinstance(default, list) else default


def resolve(values: Values, environ: Mapping[str, str], config: str | None) -> None:
    """Applies every rule, in order."""
    _world_size(values, environ)
    _run_dir(values, environ, config)
    values.violations += refused.refusals(values.value)
    for rule in RULES:
        rule(values)


def _world_size(v: Values, environ: Mapping[str, str]) -> None:
    if v["world_size"] is None:
        text = environ.get("WORLD_SIZE", "")
        v.value["world_size"] = int(text) if text.isdecimal() and int(text) > 0 else 1
        v.origin["world_size"] = "environment" if text.isdecimal() else "default"


def _run_dir(v: Values, environ: Mapping[str, str], config: str | None) -> None:
    """Ranks start within seconds of each other, so rank 0's name must be the one that is used."""
    if v["run_dir"] is None:
        name = Path(config).stem if config else "pretrain"
        stamp = environ.get("PRETRAIN_MOE_START") or time.strftime("%Y%m%d-%H%M%S")
        v.derive("run_dir", os.path.join("runs", f"{name}-{stamp}"))


def _parallel_sizes(v: Values) -> None:
    if v["expert_tensor_parallel_size"] is None:
        v.derive("expert_tensor_parallel_size", v["tensor_model_parallel_size"])
    if v["sequence_parallel"] and v["tensor_model_parallel_size"] == 1:
        v.notes.append("--sequence-parallel has no effect with --tensor-model-parallel-size 1")
        v.derive("sequence_parallel", False)


def _backend(v: Values) -> None:
    if v["device"] == "cpu" and v["distributed_backend"] == "nccl":
        v.notes.append("--distributed-backend nccl needs GPUs: --device cpu uses gloo")
        v.derive("distributed_backend", "gloo")


def _virtual_pipeline(v: Values) -> None:
    """Model chunks from whichever of the three flags was given (the layout: see `stages`)."""
    pp = v["pipeline_model_parallel_size"]
    chunks = v["num_virtual_stages_per_pipeline_rank"]
    per_chunk = v["num_layers_per_virtual_pipeline_stage"]
    layout = v["pipeline_model_parallel_layout"]
    if chunks is not None:
        v.derive("virtual_pipeline_model_parallel_size", chunks)
    elif per_chunk and pp > 1 and v["num_layers"]:
        layers = v["num_layers"]
        layers += v["account_for_embedding_in_pipeline_split"]
        layers += v["account_for_loss_in_pipeline_split"]
        if layers % (pp * per_chunk) == 0:
            v.derive("virtual_pipeline_model_parallel_size", layers // (pp * per_chunk))
    elif layout and v["virtual_pipeline_model_parallel_size"] is None:
        v.derive("virtual_pipeline_model_parallel_size", _layout_chunks(layout, pp))
    chosen = v["virtual_pipeline_model_parallel_size"]
    if pp == 1 and chosen and chosen > 1:
        v.notes.append(
            f"{chosen} model chunks a pipeline rank have no effect with"
            " --pipeline-model-parallel-size 1"
        )
    if chosen == 1 or pp == 1:
        v.derive("virtual_pipeline_model_parallel_size", None)


def _layout_chunks(layout: str, pp: int) -> int | None:
    from megatron_ext.config.stages import parse_layout

    try:
        stages = len(parse_layout(layout))
    except ValueError:
        return None
    return stages // pp if stages % pp == 0 else None


def _point_to_point(v: Values) -> None:
    """Interleaved schedules overlap their sends: PP2 x VPP without it is silently wrong."""
    interleaved = v["virtual_pipeline_model_parallel_size"] is not None
    if v["overlap_p2p_comm"] is None or not interleaved:
        v.derive("overlap_p2p_comm", interleaved)
    if v["batch_p2p_comm"] is None:
        v.derive("batch_p2p_comm", not v["overlap_p2p_comm"])


def _sizes(v: Values) -> None:
    hidden, heads = v["hidden_size"], v["num_attention_heads"]
    if v["ffn_hidden_size"] is None and hidden:
        gated = int(4 * hidden * 2 / 3 / 64) * 64
        v.derive("ffn_hidden_size", gated if v["swiglu"] else 4 * hidden)
    if v["kv_channels"] is None and hidden and heads:
        v.derive("kv_channels", hidden // heads)
    if not v["group_query_attention"]:
        if v.given("num_query_groups") and v["num_query_groups"] not in (None, 1, heads):
            v.notes.append(
                f"--num-query-groups {v['num_query_groups']} has no effect without"
                " --group-query-attention (as in Megatron-LM)"
            )
        v.derive("num_query_groups", heads)
    if v["num_moe_experts"] is not None and v["moe_ffn_hidden_size"] is None:
        width = v["ffn_hidden_size"]
        parts = max(1, v["moe_upcycling_granularity"])
        v.derive("moe_ffn_hidden_size", width // parts if width else width)


def _positions(v: Values) -> None:
    if v["use_rotary_position_embeddings"]:
        v.derive("position_embedding_type", "rope")
    if v["rope_type"] is None or not v.given("rope_type"):
        yarn = v["multi_latent_attention"] or v["position_embedding_type"] == "yarn"
        v.derive("rope_type", "yarn" if yarn else "rope")


def _recompute(v: Values) -> None:
    if v["recompute_activations"]:
        v.derive("recompute_granularity", "selective")
    if v["moe_layer_recompute"] and v["recompute_granularity"] != "full":
        v.derive("recompute_granularity", "selective")
        v.derive("recompute_modules", sorted({*(v["recompute_modules"] or ["core_attn"]), "moe"}))
        v.derive("moe_layer_recompute", False)


def _precision(v: Values) -> None:
    if v["apply_query_key_layer_scaling"]:
        v.derive("attention_softmax_in_fp32", True)
    if v["bf16"] and not (v.given("grad_reduce_in_fp32") or v["grad_reduce_in_bf16"]):
        # Megatron-LM: bf16 gradients are accumulated and reduced in fp32 unless asked otherwise.
        v.derive("grad_reduce_in_fp32", True)
    if v["moe_enable_deepep"]:
        v.derive("moe_flex_dispatcher_backend", "deepep")


def _routing(v: Values) -> None:
    """One entry stays a scalar; megatron-core wants lists of equal length or two scalars."""
    types, coefficients = v["moe_router_load_balancing_type"], v["moe_aux_loss_coeff"]
    if isinstance(types, str) and isinstance(coefficients, list) and len(coefficients) == 1:
        v.derive("moe_aux_loss_coeff", coefficients[0])
    if v["moe_expert_capacity_factor"] is not None and v["moe_expert_capacity_factor"] < 0:
        v.derive("moe_expert_capacity_factor", None)
    limited = v["moe_router_topk_limited_devices"]
    if limited and not v["moe_router_group_topk"]:
        v.derive("moe_router_group_topk", limited)
        v.derive("moe_router_num_groups", v["expert_model_parallel_size"])
        v.derive("moe_router_topk_limited_devices", None)


def _train(v: Values) -> None:
    if v["skip_train"]:
        v.derive("eval_only", True)
    model = (
        v["tensor_model_parallel_size"]
        * v["pipeline_model_parallel_size"]
        * v["context_parallel_size"]
    )
    world, micro = v["world_size"], v["micro_batch_size"]
    if v["global_batch_size"] is None and micro and model > 0 and world % model == 0:
        v.derive("global_batch_size", micro * (world // model))
    if v["dataloader_type"] is None:
        v.derive("dataloader_type", "single")


def _schedule(v: Values) -> None:
    for decay, total in (("lr_decay_iters", "train_iters"), ("lr_decay_samples", "train_samples")):
        if v[decay] is None and v[total] is not None:
            v.derive(decay, v[total])
    for end in ("start_weight_decay", "end_weight_decay"):
        if v[end] is None and v["weight_decay_incr_style"] == "constant":
            v.derive(end, v["weight_decay"])


def _gradients(v: Values) -> None:
    """align_param_gather matters to the interleaved schedule only, as in Megatron-LM."""
    if v["virtual_pipeline_model_parallel_size"] is None or not v["overlap_param_gather"]:
        v.derive("align_param_gather", False)


def _without_kernels(v: Values) -> None:
    """Fusions default to on in Megatron-LM; local layers have none, so their default is off."""
    if v["transformer_impl"] != "local":
        return
    for dest in ignored.NEEDS_TRANSFORMER_ENGINE:
        if v[dest] is True and not v.given(dest):
            v.derive(dest, False)


RULES: tuple[Callable[[Values], None], ...] = (
    renamed.translate,
    _parallel_sizes,
    _backend,
    _virtual_pipeline,
    _point_to_point,
    _sizes,
    _positions,
    _recompute,
    _precision,
    _routing,
    _train,
    _schedule,
    _gradients,
    _without_kernels,
)
