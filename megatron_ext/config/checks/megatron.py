"""What megatron-core's own option classes refuse, said before they are built and in our words.

Found by giving each flag alone each of its values: what passed the rules was built. The texts of
what only several flags together break are translated where they are caught (model/run_config.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from megatron_ext.config.checks.numbers import divisors, one_of
from megatron_ext.config.run_config import RunConfig
from megatron_ext.errors import Violation

ONLY_WITH_EXPERTS: tuple[tuple[str, object], ...] = (
    ("moe_router_topk", 1),
    ("moe_router_enable_expert_bias", True),
    ("moe_pad_expert_input_to_capacity", True),
)
"""megatron-core field -> the value that a model without experts may not have."""


def rules(cfg: RunConfig) -> Iterator[Violation]:
    """The checks of TransformerConfig that no other rule makes."""
    t = cfg.transformer
    if t.num_moe_experts is None:
        yield from _without_experts(cfg)
    if t.moe_token_dispatcher_type == "allgather" and t.variable_seq_lengths:
        rule = "needs --moe-token-dispatcher-type alltoall"
        yield Violation("--variable-seq-lengths", None, rule, "add it, or remove the flag")
    yield from _every_so_many(cfg)
    yield from _recomputed(cfg)
    yield from _loss_scale(cfg)
    if t.defer_embedding_wgrad_compute:
        rule = "needs the fused accumulation of gradients, which is not built"
        yield Violation("--defer-embedding-wgrad-compute", None, rule, "remove it")
    if t.overlap_p2p_comm_warmup_flush and (not t.overlap_p2p_comm or t.batch_p2p_comm):
        yield Violation(
            "--overlap-p2p-communication-warmup-flush",
            None,
            "needs --overlap-p2p-communication without --batch-p2p-comm",
            "use it with --num-virtual-stages-per-pipeline-rank, or remove it",
        )


def _every_so_many(cfg: RunConfig) -> Iterator[Violation]:
    """Frequencies that megatron-core divides by, or the layers by."""
    t = cfg.transformer
    if t.window_attn_skip_freq == 0:
        yield Violation(
            "--window-attn-skip-freq", 0, "must be at least 1", "use 1, or leave it out"
        )
    every, layers = t.no_rope_freq, t.num_layers
    if isinstance(every, int) and every and layers and layers % every:
        rule = f"must divide --num-layers = {layers}"
        yield Violation("--no-rope-freq", every, rule, f"use {one_of(divisors(layers), every)}")


def _recomputed(cfg: RunConfig) -> Iterator[Violation]:
    """Uniform recomputation takes whole groups of a model chunk's layers."""
    t, group = cfg.transformer, cfg.transformer.recompute_num_layers
    if t.recompute_granularity != "full" or t.recompute_method != "uniform" or not group:
        return
    try:
        counts = {len(chunk.layers) for rank in cfg.stages for chunk in rank if chunk.layers}
    except ValueError:
        return  # `pipeline` has named it
    wrong = sorted(n for n in counts if n % group)
    if wrong:
        rule = f"must divide the {wrong[0]} layers of a model chunk with --recompute-method uniform"
        use = f"use {one_of(divisors(math.gcd(*counts)), group)}, or --recompute-method block"
        yield Violation("--recompute-num-layers", group, rule, use)


def _loss_scale(cfg: RunConfig) -> Iterator[Violation]:
    o = cfg.optimizer
    if cfg.train.fp16 and o.loss_scale is None and o.min_loss_scale > o.initial_loss_scale:
        rule = f"must not exceed --initial-loss-scale = {o.initial_loss_scale:g}"
        yield Violation("--min-loss-scale", o.min_loss_scale, rule, "use 1")


def _without_experts(cfg: RunConfig) -> Iterator[Violation]:
    t = cfg.transformer
    for name, refused in ONLY_WITH_EXPERTS:
        if getattr(t, name) == refused:
            shown = None if refused is True else refused
            yield _needs_experts("--" + name.replace("_", "-"), shown)
    if t.moe_router_group_topk:
        yield _needs_experts("--moe-router-group-topk", t.moe_router_group_topk)


def _needs_experts(flag: str, value: object) -> Violation:
    return Violation(flag, value, "needs --num-experts", "remove it, or give --num-experts")
