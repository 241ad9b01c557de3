"""Megatron-LM's flags that would change the training and are not built: refused, never ignored.

`UNKNOWN` are flags that have no field elsewhere; `FIELDS` are fields of megatron-core or of ours
whose work only Megatron-LM's own loop or another model family does.  Both name the way out; their
default value asks for nothing and passes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from megatron_ext.config.inert import Inert
from megatron_ext.errors import Violation

MTP = "use --mtp-num-layers with layers of their own"
MUON = "chooses what megatron-core 0.16.1 does not have"

UNKNOWN: tuple[tuple[Inert, str], ...] = (
    (Inert("mtp_use_repeated_layer", "bool", False, "shares one layer between predictions"), MTP),
    (Inert("mtp_detach_heads", "bool", False, "cuts a gradient that this model has"), MTP),
    (
        Inert(
            "moe_router_quantile_balancing_ema",
            "Real",
            0.0,
            "belongs to quantile_balancing, another router",
        ),
        "use --moe-router-enable-expert-bias with --moe-router-score-function sigmoid",
    ),
    (
        Inert("moe_router_force_biased", "Real | None", None, "routes without the router"),
        "remove it: it is for measurements of speed",
    ),
    (
        Inert("moe_expert_rank_capacity_factor", "Real | None", None, "drops tokens by rank"),
        "use --moe-expert-capacity-factor, which drops them by expert",
    ),
    (Inert("muon_coefficient_type", "str", "quintic", MUON), "use quintic"),
    (
        Inert("muon_scalar_optimizer", "Literal['adam', 'lion']", "adam", MUON),
        "use --muon-scalar-optimizer adam",
    ),
    (
        Inert("step_batch_size_schedule", "str | None", None, "changes the batch size in steps"),
        "use --rampup-batch-size START INCREMENT SAMPLES",
    ),
    (
        Inert("freeze_all_layers", "bool", False, "trains nothing"),
        "use --eval-only, or remove it",
    ),
    (
        Inert("use_checkpoint_args", "bool", False, "takes the model from the checkpoint"),
        "use --config with the config.yaml of the run that wrote it",
    ),
    (
        Inert("use_mp_args_from_checkpoint_args", "bool", False, "takes the layout from it"),
        "remove it: a checkpoint is read in any layout",
    ),
    (
        Inert("override_ckpt_iteration", "Whole | None", None, "counts steps from another number"),
        "use --finetune to start at step 0",
    ),
    (
        Inert(
            "output_logit_dtype",
            "Literal['bf16', 'fp32'] | None",
            None,
            "sets another number format of the logits",
        ),
        "remove it: the logits have the weights' type, the loss is computed in fp32",
    ),
    (
        Inert(
            "ddp_param_name_patterns_for_fp32_local_accumulation",
            "list[str]",
            [],
            "sets the gradients' format by name",
        ),
        "use --accumulate-allreduce-grads-in-fp32 for all of them",
    ),
    (
        Inert("phase_transition_iterations", "str | None", None, "changes the order of the data"),
        "train the phases as runs, each with --load of the one before",
    ),
    (
        Inert("dataloader_inter_document_masking", "bool", False, "masks between documents"),
        "use --reset-attention-mask and --reset-position-ids",
    ),
    (
        Inert("tokenizer_special_tokens", "list[str] | None", None, "adds words to the tokenizer"),
        "put them into the tokenizer's files",
    ),
    (
        Inert("null_tokenizer_eod_id", "Whole | None", None, "moves the end of a document"),
        "remove it: NullTokenizer's is the id behind its --vocab-size",
    ),
)
"""Flag with what it asks for -> the way out."""

FIELDS: dict[str, tuple[str, str]] = {
    "apply_residual_connection_post_layernorm": (
        "is read by nothing in megatron-core 0.16.1",
        "remove it",
    ),
    "qk_clip": ("needs Megatron-LM's own training loop", "use --qk-layernorm"),
    "data_parallel_random_init": (
        "is not built: data-parallel ranks start from the same weights",
        "remove it, or use another --seed a run",
    ),
    "init_method_xavier_uniform": (
        "is not built: weights are normal",
        "use --init-method-std 0.02",
    ),
}
"""dest of a switch that exists elsewhere -> rule, way out."""


def flags() -> tuple[Inert, ...]:
    """The flags of `UNKNOWN`."""
    return tuple(replace(inert, word="Refused, it") for inert, _ in UNKNOWN)


def refusals(values: Mapping[str, object]) -> Iterator[Violation]:
    """One for everything that is set to more than its default."""
    for inert, use in UNKNOWN:
        if values[inert.dest] != inert.default:
            yield _violation(inert.dest, values, f"is not built: it {inert.reason}", use)
    for dest, (rule, use) in FIELDS.items():
        if values[dest]:
            yield _violation(dest, values, rule, use)


def _violation(dest: str, values: Mapping[str, object], rule: str, use: str) -> Violation:
    value = values[dest]
    shown = None if value is True else value
    return Violation("--" + dest.replace("_", "-"), shown, rule, use)
