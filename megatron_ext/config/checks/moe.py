"""Routing, balancing losses, capacity and dispatch of the experts."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_ext.config.checks.numbers import divisors, one_of
from megatron_ext.config.run_config import RunConfig
from megatron_ext.errors import Violation

TYPES = "--moe-router-load-balancing-type"
COEFFICIENT = "--moe-aux-loss-coeff"


def rules(cfg: RunConfig) -> Iterator[Violation]:
    """All rules of expert layers; without --num-experts, that nothing asks for them."""
    t = cfg.transformer
    yield from _upcycling(cfg)
    if t.num_moe_experts is None:
        if t.moe_ffn_hidden_size is not None:
            yield Violation(
                "--moe-ffn-hidden-size",
                t.moe_ffn_hidden_size,
                "needs --num-experts",
                "remove it, or give --num-experts",
            )
        return
    yield from _layers(cfg)
    yield from _choice(cfg)
    yield from _groups(cfg)
    yield from _group_score(cfg)
    yield from _losses(cfg)
    yield from _capacity(cfg)
    yield from _shared(cfg)


def _upcycling(cfg: RunConfig) -> Iterator[Violation]:
    t, wanted = cfg.transformer, cfg.checkpoint
    parts = wanted.moe_upcycling_granularity
    flag = "--moe-upcycling-granularity"
    if parts > 1 and t.moe_ffn_hidden_size and t.moe_ffn_hidden_size * parts != t.ffn_hidden_size:
        yield Violation(
            flag,
            parts,
            f"times --moe-ffn-hidden-size = {t.moe_ffn_hidden_size} must be"
            f" --ffn-hidden-size = {t.ffn_hidden_size}",
            "leave --moe-ffn-hidden-size out, or use a divisor of --ffn-hidden-size",
        )
    if wanted.moe_use_upcycling and (t.num_moe_experts is None or wanted.load is None):
        yield Violation("--moe-use-upcycling", None, "needs --num-experts and --load", "add them")


def _layers(cfg: RunConfig) -> Iterator[Violation]:
    freq, layers = cfg.transformer.moe_layer_freq, cfg.transformer.num_layers
    if isinstance(freq, int):
        if freq < 1:
            yield Violation("--moe-layer-freq", freq, "must be at least 1", "use 1")
        return
    if layers and len(freq) != layers:
        yield Violation(
            "--moe-layer-freq",
            f"({len(freq)} entries)",
            f"must have one entry for each of the {layers} layers",
            f"use for instance ([0]*1+[1]*{layers - 1})",
        )
    if any(entry not in (0, 1) for entry in freq):
        yield Violation(
            "--moe-layer-freq", freq, "may hold only 0 (dense) and 1 (experts)", "use 0 and 1"
        )


def _choice(cfg: RunConfig) -> Iterator[Violation]:
    t = cfg.transformer
    experts, topk = t.num_moe_experts, t.moe_router_topk
    if not 1 <= topk <= experts:
        yield Violation(
            "--moe-router-topk",
            topk,
            f"must be from 1 to --num-experts = {experts}",
            f"use {one_of(range(1, experts + 1), topk)}",
        )
    sinkhorn = "sinkhorn" in _types(t)
    softmax = t.moe_router_score_function == "softmax"
    if topk == 1 and softmax and not t.moe_router_pre_softmax and not sinkhorn:
        yield Violation(
            "--moe-router-topk",
            1,
            "needs --moe-router-pre-softmax: softmax over one expert has no gradient",
            "add --moe-router-pre-softmax",
        )
    if t.moe_router_enable_expert_bias and softmax:
        yield Violation(
            "--moe-router-enable-expert-bias",
            None,
            "needs --moe-router-score-function sigmoid",
            "add --moe-router-score-function sigmoid",
        )


def _groups(cfg: RunConfig) -> Iterator[Violation]:
    t = cfg.transformer
    experts, groups, kept = t.num_moe_experts, t.moe_router_num_groups, t.moe_router_group_topk
    if not kept:
        if groups:
            yield Violation(
                "--moe-router-num-groups",
                groups,
                "needs --moe-router-group-topk",
                "add --moe-router-group-topk, or remove it",
            )
        return
    if not groups:
        yield Violation("--moe-router-group-topk", kept, "needs --moe-router-num-groups", "add it")
        return
    if experts % groups:
        yield Violation(
            "--moe-router-num-groups",
            groups,
            f"must divide --num-experts = {experts}",
            f"use {one_of(divisors(experts), groups)}",
        )
    if kept > groups:
        yield Violation(
            "--moe-router-group-topk",
            kept,
            f"must not exceed --moe-router-num-groups = {groups}",
            f"use {groups} or less",
        )
    if t.moe_router_topk % kept:
        yield Violation(
            "--moe-router-group-topk",
            kept,
            f"must divide --moe-router-topk = {t.moe_router_topk}",
            f"use {one_of(divisors(t.moe_router_topk), kept)}",
        )
    elif experts % groups == 0 and t.moe_router_topk > kept * (experts // groups):
        yield Violation(
            "--moe-router-topk",
            t.moe_router_topk,
            f"exceeds the {kept * (experts // groups)} experts of the kept groups",
            "raise --moe-router-group-topk",
        )


def _group_score(cfg: RunConfig) -> Iterator[Violation]:
    t, best = cfg.transformer, cfg.moe.moe_router_group_score_experts
    if best is None:
        return
    flag = "--moe-router-group-score-experts"
    if not t.moe_router_group_topk:
        yield Violation(flag, best, "needs --moe-router-group-topk", "remove it")
    elif t.moe_router_num_groups:
        size = t.num_moe_experts // t.moe_router_num_groups
        if not 1 <= best <= size:
            rule = f"must be from 1 to the {size} experts of a group"
            yield Violation(flag, best, rule, f"use {size} or less")


def _types(t: object) -> list[str]:
    types = t.moe_router_load_balancing_type  # type: ignore[attr-defined]
    return [types] if isinstance(types, str) else list(types)


def _losses(cfg: RunConfig) -> Iterator[Violation]:
    t, types = cfg.transformer, _types(cfg.transformer)
    given = t.moe_aux_loss_coeff
    coefficients = given if isinstance(given, list) else [given]
    listed = isinstance(t.moe_router_load_balancing_type, list)
    if len(coefficients) != len(types) or listed != isinstance(given, list):
        yield Violation(
            COEFFICIENT,
            " ".join(map(str, coefficients)),
            f"has {len(coefficients)} entries; {TYPES} has {len(types)}",
            f"give {len(types)}: one for each of {', '.join(types)}",
        )
    if listed and ({"sinkhorn", "none"} & set(types) or len(set(types)) < len(types)):
        yield Violation(
            TYPES,
            " ".join(types),
            "may list each loss once, sinkhorn and none never",
            "use aux_loss, seq_aux_loss or global_aux_loss",
        )
    if types == ["sinkhorn"] and any(coefficients):
        yield Violation(COEFFICIENT, given, "must be 0 with sinkhorn", f"use {COEFFICIENT} 0")


def _capacity(cfg: RunConfig) -> Iterator[Violation]:
    t = cfg.transformer
    factor = t.moe_expert_capacity_factor
    if factor is not None and "sinkhorn" in _types(t):
        yield Violation(
            "--moe-expert-capacity-factor",
            factor,
            "does not work with sinkhorn",
            f"use {TYPES} aux_loss, or remove it",
        )
    if t.moe_pad_expert_input_to_capacity and factor is None:
        yield Violation(
            "--moe-pad-expert-input-to-capacity",
            None,
            "needs --moe-expert-capacity-factor",
            "add --moe-expert-capacity-factor 1.0",
        )


def _shared(cfg: RunConfig) -> Iterator[Violation]:
    t = cfg.transformer
    width = t.moe_shared_expert_intermediate_size
    if width is not None and t.add_bias_linear:
        yield Violation(
            "--moe-shared-expert-intermediate-size",
            width,
            "needs --disable-bias-linear: shared experts have no biases",
            "add --disable-bias-linear",
        )
    if t.moe_shared_expert_gate and width is None:
        yield Violation(
            "--moe-shared-expert-gate",
            None,
            "needs --moe-shared-expert-intermediate-size",
            "remove it",
        )
    if t.moe_shared_expert_overlap and t.moe_token_dispatcher_type != "alltoall":
        yield Violation(
            "--moe-shared-expert-overlap",
            None,
            "needs --moe-token-dispatcher-type alltoall",
            "add it, or remove the overlap",
        )
