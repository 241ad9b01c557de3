"""The fastest layouts of a model on a cluster under a memory limit.

Every combination of tp, pp, vpp, cp, ep, etp and micro-batch that the rules allow is priced by a
closed form; the best few are simulated, with exact memory.  Stages are cut by `split_evenly`, so
that 61 layers on 16 ranks are possible; recomputation comes from `best_strategies` over the layers
of the fullest stage: keep, recompute parts of the MoE layer, or recompute all.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass, replace

from megatron_ext.config import RunConfig
from megatron_ext.config.checks.numbers import divisors
from megatron_ext.config.flags import Flag, all_flags
from megatron_ext.costs.activations import kept, layer_saved, loss_saved
from megatron_ext.costs.cluster import Cluster
from megatron_ext.costs.micro_batch import shape_of
from megatron_ext.costs.states import recipe_of
from megatron_ext.costs.tensors import layer_tensors, moe_pattern, padded_vocab_size, share_of
from megatron_ext.costs.work import embedding_work, head_work, layer_work
from megatron_ext.mesh.layout import layout_of
from megatron_ext.planner.choose import best_strategies, split_evenly, stages_text
from megatron_ext.planner.layouts import Sizes, broken_rule, with_sizes
from megatron_ext.planner.memory import StageMemory, all_stages, micro_batches_of, worst
from megatron_ext.planner.step_time import Machine, Step, layer_pass, step

STRATEGIES: tuple[tuple, ...] = (
    (None, None, None, None),
    ("selective", None, None, ("moe_act",)),
    ("selective", None, None, ("core_attn", "moe_act")),
    ("selective", None, None, ("moe", "core_attn")),
    ("full", "uniform", 1, None),
)
"""Recomputation from least to most: (granularity, method, layers, modules)."""

UNITS = 256
"""Units of memory of the dynamic programming."""

SIMULATED = 24
LARGEST_TP, LARGEST_MICRO_BATCH, LARGEST_VPP = 16, 4, 4


@dataclass(frozen=True)
class Found:
    """A layout with its prediction."""

    sizes: Sizes
    cfg: RunConfig
    step: Step
    memory: StageMemory


def candidates(cfg: RunConfig, world: int, cluster: Cluster) -> Iterator[Sizes]:
    """Sizes worth pricing: tp inside a domain, the expert fold at most as wide as the experts."""
    t = cfg.transformer
    cps = [c for c in divisors(world) if c == 1 or cfg.model.seq_length // c >= 4096]
    domain = min(part.domain for part in cluster.parts)
    for tp in [n for n in divisors(world) if n <= min(domain, LARGEST_TP)]:
        for pp in [n for n in divisors(world // tp) if n <= t.num_layers]:
            for cp in [n for n in cps if world % (tp * pp * n) == 0]:
                yield from _folds(cfg, world // pp, Sizes(tp, pp, 1, cp))


def _folds(cfg: RunConfig, inside: int, dense: Sizes) -> Iterator[Sizes]:
    experts = cfg.transformer.num_moe_experts
    batch, dp = cfg.train.global_batch_size, inside // (dense.tp * dense.cp)
    chunks = [v for v in range(1, LARGEST_VPP + 1) if dense.pp * v <= cfg.transformer.num_layers]
    sizes = [m for m in (1, 2, LARGEST_MICRO_BATCH) if batch % (m * dp) == 0]
    for etp in sorted({1, dense.tp}) if experts else [dense.tp]:
        eps = [n for n in divisors(inside // etp) if experts % n == 0] if experts else [1]
        for ep in eps:
            for vpp in chunks if dense.pp > 1 else [1]:
                for micro in sizes:
                    yield replace(dense, ep=ep, etp=etp, vpp=vpp, micro_batch=micro)


@dataclass(frozen=True)
class Price:
    """A layout with the closed form's seconds and the stages it was cut into."""

    seconds: float
    sizes: Sizes


def price(cfg: RunConfig, sizes: Sizes, world: int, cluster: Cluster, limit: float, imbalance):
    """The closed form of one layout, or None where no recomputation makes it fit."""
    one = with_sizes(cfg, replace(sizes, recompute=STRATEGIES[0]), world)
    count = micro_batches_of(one)
    if count < 1 or (sizes.vpp > 1 and count % sizes.pp):
        return None
    machine = Machine(cluster, layout_of(one.parallel))
    gpu, pattern = machine.gpu(0), moe_pattern(one)
    times: dict = {}
    for moe in set(pattern):
        ops, sends = layer_work(one, moe, 0, imbalance)
        times[moe] = [_both(layer_pass(ops, sends, machine, 0, gpu, _again(s))) for s in STRATEGIES]
    heads = sum(3 * op.seconds(gpu) for op in head_work(one))
    tail = heads * (1 + (cfg.transformer.mtp_num_layers or 0))
    tail += times[pattern[-1]][0] * (cfg.transformer.mtp_num_layers or 0)
    head = sum(3 * op.seconds(gpu) for op in embedding_work(one))
    costs = [times[moe][0] for moe in pattern]
    counts = split_evenly(costs, sizes.pp, sizes.vpp, head, tail)
    if counts is None:
        return None
    stage = _fullest(counts, sizes, pattern)
    plan = _recompute(one, stage, times, limit, sizes, imbalance)
    if plan is None:
        return None
    strategy, extra = plan
    busy = max(_rank_seconds(counts, rank, sizes, costs, head, tail) for rank in range(sizes.pp))
    busy *= 1 + extra / max(sum(costs), 1e-12)
    seconds = busy * (count + (sizes.pp - 1) / sizes.vpp)
    text = stages_text(counts, cfg.transformer.mtp_num_layers or 0) if sizes.pp > 1 else None
    return Price(seconds, replace(sizes, stages=text, recompute=STRATEGIES[strategy]))


def _both(one) -> float:
    return one.forward + one.backward


def _again(strategy: tuple) -> tuple[str, ...]:
    return ("full",) if strategy[0] == "full" else tuple(strategy[3] or ())


def _rank_seconds(counts, rank: int, sizes: Sizes, costs, head: float, tail: float) -> float:
    """One micro-batch on one pipeline rank."""
    total, place = 0.0, 0
    for stage, number in enumerate(counts):
        if stage % sizes.pp == rank:
            total += sum(costs[place : place + number])
        place += number
    total += head if rank == 0 else 0.0
    return total + (tail if rank == sizes.pp - 1 else 0.0)


def _fullest(counts, sizes: Sizes, pattern: list[bool]) -> list[bool]:
    """Kinds of the layers of rank 0, which holds most micro-batches."""
    kinds, place = [], 0
    for stage, number in enumerate(counts):
        if stage % sizes.pp == 0:
            kinds += pattern[place : place + number]
        place += number
    # a rank in the middle may hold more MoE layers: the first few layers are often dense
    return [any(pattern)] * len(kinds) if sizes.pp > 1 else kinds


def _recompute(cfg, kinds: list[bool], times: dict, limit: float, sizes: Sizes, imbalance: float):
    """(strategy for all layers, extra seconds of all layers) that fits, by Galvatron's recurrence;
    None: nothing fits.  Megatron-LM's flags name one strategy for every layer, so the strategy is
    the mildest that fits everywhere; where the recurrence mixes, it is its strongest."""
    room = limit - _states(cfg, kinds)
    flying = (
        sizes.pp if sizes.vpp == 1 else sizes.pp * (1 + (sizes.pp - 1) / (sizes.pp * sizes.vpp))
    )
    room -= loss_saved(cfg)
    if room <= 0:
        return None
    unit = room / UNITS
    parts = {moe: layer_saved(cfg, moe, imbalance) for moe in set(kinds)}
    s = shape_of(cfg)
    memories, seconds = [], []
    for moe in kinds:
        bytes_of = [kept(cfg, parts[moe], _again(x)) for x in STRATEGIES[:-1]]
        bytes_of.append(s.t * s.H * s.w)
        memories.append([int(-(-b * flying // unit)) for b in bytes_of])
        seconds.append(times[moe])
    found = best_strategies(seconds, memories, UNITS)
    if found is None:
        return None
    strategy = max(found[1])
    while sum(row[strategy] for row in memories) > UNITS and strategy < len(STRATEGIES) - 1:
        strategy += 1
    pattern = moe_pattern(cfg)
    return strategy, sum(times[moe][strategy] - times[moe][0] for moe in pattern if moe in times)


def _states(cfg: RunConfig, kinds: list[bool]) -> float:
    """Weights, gradients and optimizer of the layers and one table, about."""
    recipe, share = recipe_of(cfg), share_of(cfg)
    total = 0.0
    sizes = {False: 0, True: 0}
    for moe in set(kinds):
        for tensor in layer_tensors(cfg, moe, share):
            sizes[tensor.expert] += tensor.count * kinds.count(moe)
    sizes[False] += padded_vocab_size(cfg) * cfg.transformer.hidden_size // share.tp
    for expert, number in sizes.items():
        ranks = recipe.expert_ranks if expert else recipe.dense_ranks
        state = recipe.state / (ranks if recipe.sharded else 1)
        total += number * (recipe.weight + recipe.gradient + state)
    return total


def search(
    cfg: RunConfig,
    world: int,
    cluster: Cluster,
    limit: float,
    imbalance: float = 1.0,
    keep: int = 5,
) -> tuple[list[Found], int]:
    """(best layouts, number priced)."""
    priced = []
    number = 0
    for sizes in candidates(cfg, world, cluster):
        number += 1
        made = price(cfg, sizes, world, cluster, limit * 0.95, imbalance)
        if made is not None:
            priced.append((made.seconds, number, made.sizes))
    found: list[Found] = []
    for _, _, sizes in heapq.nsmallest(SIMULATED * 4, priced):
        if len(found) >= SIMULATED:
            break
        one = with_sizes(cfg, sizes, world)
        if broken_rule(one) is not None:
            continue
        top = worst(all_stages(one, imbalance, cluster))
        if top.total <= limit:
            found.append(Found(sizes, one, step(one, cluster, imbalance), top))
    found.sort(key=lambda f: f.step.seconds)
    return found[:keep], number


SHARDING = ("use_distributed_optimizer", "overlap_grad_reduce", "overlap_param_gather")
"""Each of these needs those before it."""


def sharded(cfg: RunConfig) -> tuple[RunConfig, list[str]]:
    """The configuration with the optimizer's state over data parallelism and its messages behind
    the passes, and the flags that say so: those of SHARDING up to the first that a file or a flag
    has switched off. No number of a training depends on them.
    """
    chosen: dict[str, bool] = {}
    for name in SHARDING:
        if not getattr(cfg.ddp, name) and cfg.origins[name] != "default":
            break
        chosen[name] = True
    flags = [f"--{name.replace('_', '-')}" for name in chosen]
    return replace(cfg, ddp=replace(cfg.ddp, **chosen)), flags


def why_not(best: Found, other: Found) -> str:
    """What the slower of two layouts loses, largest first."""
    parts = {
        "computing": max(other.step.pipeline.busy) - max(best.step.pipeline.busy),
        "bubble": _idle(other.step) - _idle(best.step),
        "optimizer": other.step.optimizer - best.step.optimizer,
    }
    for kind in {*best.step.exposed, *other.step.exposed}:
        gap = other.step.exposed.get(kind, 0.0) - best.step.exposed.get(kind, 0.0)
        parts[f"{kind} communication"] = gap
        if kind in ("tp", "ep", "etp", "cp"):
            parts["computing"] -= gap
    ranked = sorted(parts.items(), key=lambda item: -abs(item[1]))
    words = [f"{name} {gap:+.3g} s" for name, gap in ranked if abs(gap) > 1e-6][:4]
    gap = other.step.seconds - best.step.seconds
    return f"{gap:+.3g} s a step ({gap / best.step.seconds:+.1%}): {', '.join(words)}"


def _idle(one: Step) -> float:
    return one.pipeline.makespan - max(one.pipeline.busy)


SPLITS = (
    "num_layers_in_first_pipeline_stage",
    "num_layers_in_last_pipeline_stage",
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
)
"""What a layout string leaves no room for."""

RECOMPUTE = (
    "recompute_granularity",
    "recompute_method",
    "recompute_num_layers",
    "recompute_modules",
)
"""Names of the four parts of a strategy."""


def flags_of(sizes: Sizes, base: RunConfig | None = None) -> list[str]:
    """The layout as flags of pretrain_moe.py, to be read after those of `base`: what `base` says
    and the layout does not is switched off.
    """
    words = [
        f"--tensor-model-parallel-size {sizes.tp}",
        f"--pipeline-model-parallel-size {sizes.pp}",
        f"--context-parallel-size {sizes.cp}",
        f"--expert-model-parallel-size {sizes.ep}",
        f"--expert-tensor-parallel-size {sizes.etp}",
    ]
    words += [f"--micro-batch-size {sizes.micro_batch}"] if sizes.micro_batch else []
    values: dict = {
        "sequence_parallel": sizes.tp > 1,
        "num_layers_per_virtual_pipeline_stage": None,
        "num_virtual_stages_per_pipeline_rank": sizes.vpp if sizes.vpp > 1 else None,
        "pipeline_model_parallel_layout": sizes.stages,
    }
    if sizes.stages:
        values |= dict.fromkeys(SPLITS)
    if sizes.recompute:
        values |= dict(zip(RECOMPUTE, sizes.recompute))
    for name, value in values.items():
        flag = all_flags()[name]
        if value or (base and getattr(getattr(base, flag.section), name)):
            words.append(_word(flag, value))
    return words


def _word(flag: Flag, value) -> str:
    if flag.kind.base == "bool":
        return flag.names[0] if value else flag.negatives[0]
    text = "null" if value is None else str(value)
    return f"{flag.names[0]} {' '.join(value) if isinstance(value, tuple) else text}"
