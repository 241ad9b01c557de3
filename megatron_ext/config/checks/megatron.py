"""What megatron-core's own option classes refuse, said before they are built and in our words.

Found by giving each flag alone each of its values: what passed the rules was built. The texts of
what only several flags together break are translated where they are caught (model/run_config.py).
"""

from __future__ import annotations

from collections.abc import Iterator

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
