"""Every legal layout of a world size, by the same rules that check a run (config/checks)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from megatron_ext.config import RunConfig
from megatron_ext.config.checks import violations_of
from megatron_ext.config.checks.numbers import divisors


@dataclass(frozen=True)
class Sizes:
    """One layout, with what else the planner varies.

    Attributes:
        stages: text of --pipeline-model-parallel-layout, or None for equal stages.
        recompute: (granularity, method, layers, modules), or None for the flags' own.
    """

    tp: int = 1
    pp: int = 1
    vpp: int = 1
    cp: int = 1
    ep: int = 1
    etp: int = 1
    micro_batch: int | None = None
    stages: str | None = None
    recompute: tuple | None = None

    def __str__(self) -> str:
        text = f"tp{self.tp} pp{self.pp} vpp{self.vpp} cp{self.cp} ep{self.ep} etp{self.etp}"
        return text if self.micro_batch is None else f"{text} mbs{self.micro_batch}"


def with_sizes(cfg: RunConfig, sizes: Sizes, world_size: int) -> RunConfig:
    """The configuration in another layout, derived values as `parse` derives them."""
    vpp = sizes.vpp if sizes.vpp > 1 and sizes.pp > 1 else None
    parallel = replace(
        cfg.parallel,
        world_size=world_size,
        tensor_model_parallel_size=sizes.tp,
        pipeline_model_parallel_size=sizes.pp,
        virtual_pipeline_model_parallel_size=vpp,
        num_virtual_stages_per_pipeline_rank=vpp,
        num_layers_per_virtual_pipeline_stage=None,
        context_parallel_size=sizes.cp,
        expert_model_parallel_size=sizes.ep,
        expert_tensor_parallel_size=sizes.etp,
        sequence_parallel=sizes.tp > 1,
    )
    changes: dict = {
        "overlap_p2p_comm": vpp is not None,
        "batch_p2p_comm": vpp is None,
        "pipeline_model_parallel_layout": sizes.stages,
    }
    if sizes.stages:
        changes |= {
            "num_layers_in_first_pipeline_stage": None,
            "num_layers_in_last_pipeline_stage": None,
            "account_for_embedding_in_pipeline_split": False,
            "account_for_loss_in_pipeline_split": False,
        }
    if sizes.recompute is not None:
        granularity, method, layers, modules = sizes.recompute
        changes |= {
            "recompute_granularity": granularity,
            "recompute_method": method,
            "recompute_num_layers": layers,
            "recompute_modules": list(modules) if modules else None,
        }
    train = cfg.train
    if sizes.micro_batch:
        train = replace(train, micro_batch_size=sizes.micro_batch)
    origins = {**cfg.origins, "world_size": "flag"}
    transformer = replace(cfg.transformer, **changes)
    parts = {"parallel": parallel, "transformer": transformer, "train": train}
    return replace(cfg, **parts, origins=origins, action="dry-run")


def sizes_of(cfg: RunConfig) -> Sizes:
    """The layout that a configuration has."""
    p = cfg.parallel
    return Sizes(
        p.tensor_model_parallel_size,
        p.pipeline_model_parallel_size,
        p.virtual_pipeline_model_parallel_size or 1,
        p.context_parallel_size,
        p.expert_model_parallel_size,
        p.expert_tensor_parallel_size or 1,
        stages=cfg.transformer.pipeline_model_parallel_layout,
    )


def broken_rule(cfg: RunConfig) -> str | None:
    """The first rule that a configuration breaks, as `parse` would print it."""
    found = violations_of(cfg, {})
    return None if not found else str(found[0])


@dataclass(frozen=True)
class Verdict:
    """A layout and the rule that rejects it (None: legal)."""

    sizes: Sizes
    rule: str | None


def verdicts(cfg: RunConfig, world_size: int) -> Iterator[Verdict]:
    """Every combination of divisors: dense axes first; expert axes where those are legal."""
    base = sizes_of(cfg)
    layers = cfg.transformer.num_layers
    options = divisors(world_size)
    for tp in options:
        for pp in options:
            if tp * pp > world_size:
                break
            for cp in options:
                if tp * pp * cp > world_size:
                    break
                yield from _of_dense(cfg, world_size, Sizes(tp, pp, 1, cp, 1, 1), base, layers)


def _of_dense(cfg, world_size: int, dense: Sizes, base: Sizes, layers: int) -> Iterator[Verdict]:
    """Verdicts of one (tp, pp, cp): each vpp, and each (ep, etp) of a legal one."""
    fits = base.stages if dense.pp == base.pp else None
    chunks = [base.vpp] if fits else [1]
    if dense.pp > 1 and layers % dense.pp == 0 and not fits:
        chunks = divisors(layers // dense.pp)
    for vpp in chunks:
        sizes = replace(dense, vpp=vpp, stages=fits)
        rule = broken_rule(with_sizes(cfg, sizes, world_size))
        if rule is not None or not cfg.transformer.num_moe_experts:
            yield Verdict(sizes, rule)
        if rule is None and cfg.transformer.num_moe_experts:
            yield from _of_expert(cfg, world_size, sizes)


def _of_expert(cfg: RunConfig, world_size: int, sizes: Sizes) -> Iterator[Verdict]:
    inside = divisors(world_size // sizes.pp)
    for etp in [n for n in inside if n <= max(sizes.tp, 1)]:
        for ep in [n for n in inside if n <= cfg.transformer.num_moe_experts]:
            one = replace(sizes, ep=ep, etp=etp)
            yield Verdict(one, broken_rule(with_sizes(cfg, one, world_size)))


def legal(cfg: RunConfig, world_size: int) -> list[Sizes]:
    """All legal layouts."""
    return [v.sizes for v in verdicts(cfg, world_size) if v.rule is None]
