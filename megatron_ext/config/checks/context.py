"""Context parallelism: the length that cuts, the strategies, the heads that they exchange.

Rules of the strategies are for --transformer-impl local; Transformer Engine has its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from megatron_ext.config.checks.numbers import divisors, multiples_near, one_of
from megatron_ext.config.run_config import RunConfig
from megatron_ext.errors import Violation

STRATEGIES = ("p2p", "all_gather", "a2a", "a2a+p2p")


def rules(cfg: RunConfig) -> Iterator[Violation]:
    """All rules of --context-parallel-size and --cp-comm-type."""
    yield from _sequence(cfg)
    if cfg.parallel.context_parallel_size == 1 or cfg.model.transformer_impl != "local":
        return
    if cfg.transformer.attention_dropout:
        yield Violation(
            "--attention-dropout",
            cfg.transformer.attention_dropout,
            "must be 0 with --context-parallel-size > 1 (no mask of it crosses the ranks)",
            "use --attention-dropout 0",
        )
    yield from _names(cfg)
    yield from _levels(cfg)
    yield from _heads(cfg)


def _sequence(cfg: RunConfig) -> Iterator[Violation]:
    """Two chunks a cp rank; with sequence parallelism a rank's part is cut by tp once more."""
    p, seq = cfg.parallel, cfg.model.seq_length
    tp, cp = p.tensor_model_parallel_size, p.context_parallel_size
    unit, rule = (2 * cp, "2*cp") if cp > 1 else (1, "1")
    if p.sequence_parallel:
        unit = math.lcm(unit, cp * tp)
        rule = "cp*tp" if unit == cp * tp else "2*cp*tp"
    if seq and seq % unit:
        where = " with --sequence-parallel" if p.sequence_parallel else ""
        yield Violation(
            "--seq-length",
            seq,
            f"must be a multiple of {rule} = {unit}{where} (cp {cp}, tp {tp})",
            f"use {one_of(multiples_near(seq, unit))}",
        )


def _types(cfg: RunConfig) -> list[str]:
    types = cfg.transformer.cp_comm_type
    if types is None:
        return ["p2p"]
    return list(types) if isinstance(types, (list, tuple)) else [types]


def _names(cfg: RunConfig) -> Iterator[Violation]:
    types, layers = _types(cfg), cfg.transformer.num_layers
    for name in sorted(set(types) - set(STRATEGIES)):
        yield Violation(
            "--cp-comm-type", name, "is no strategy of context parallelism", one_of(STRATEGIES)
        )
    if len(types) > 1 and layers and len(types) != layers:
        yield Violation(
            "--cp-comm-type",
            " ".join(types),
            f"names {len(types)} layers of --num-layers {layers}",
            f"give one name for all layers, or {layers}",
        )


def _levels(cfg: RunConfig) -> Iterator[Violation]:
    """a2a+p2p needs its two sizes."""
    cp = cfg.parallel.context_parallel_size
    sizes = cfg.transformer.hierarchical_context_parallel_sizes
    if "a2a+p2p" not in _types(cfg):
        return
    if not sizes or len(sizes) != 2 or min(sizes) < 1 or math.prod(sizes) != cp:
        pairs = [f"{a} {cp // a}" for a in divisors(cp) if 1 < a < cp]
        yield Violation(
            "--hierarchical-context-parallel-sizes",
            " ".join(map(str, sizes or ())) or None,
            f"must be two sizes, a2a and p2p, whose product is --context-parallel-size = {cp}",
            f"use {one_of(pairs)}" if pairs else "use --cp-comm-type p2p or a2a",
        )


def _heads(cfg: RunConfig) -> Iterator[Violation]:
    """Exchanging sequence for heads cuts the heads of a tp rank into equal parts."""
    t, tp = cfg.transformer, cfg.parallel.tensor_model_parallel_size
    heads, groups = t.num_attention_heads, t.num_query_groups
    if not heads or heads % tp:
        return
    mine = heads // tp
    kv = mine if t.multi_latent_attention or not groups else max(1, groups // tp)
    for parts, name in sorted(_parts(cfg)):
        if mine % parts or (kv % parts and parts % kv):
            legal = [n for n in divisors(mine) if kv % n == 0 or n % kv == 0]
            yield Violation(
                "--cp-comm-type",
                name,
                f"cuts the {mine} heads and {kv} key/value heads of a tp rank into {parts} parts:"
                " both must divide (or the parts be a multiple of the key/value heads)",
                f"use {one_of(legal)} ranks for a2a, or p2p or all_gather",
            )


def _parts(cfg: RunConfig) -> set[tuple[int, str]]:
    types, cp = _types(cfg), cfg.parallel.context_parallel_size
    parts = {(cp, "a2a")} if "a2a" in types else set()
    sizes = cfg.transformer.hierarchical_context_parallel_sizes
    if "a2a+p2p" in types and sizes and len(sizes) == 2 and math.prod(sizes) == cp:
        parts.add((sizes[0], "a2a+p2p"))
    return parts
