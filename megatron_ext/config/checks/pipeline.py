"""Layers over pipeline ranks and model chunks, and what the interleaved schedule needs."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_ext.config.checks.numbers import divisors, multiples_near, one_of
from megatron_ext.config.run_config import RunConfig
from megatron_ext.errors import Violation

PAIR = 2
"""Pipeline ranks for which interleaving without overlapped sends gives wrong losses."""


def rules(cfg: RunConfig) -> Iterator[Violation]:
    """Split of the layers, virtual stages, MTP, interleaving."""
    conflicts = [*_exclusive(cfg), *_chunk_layers(cfg)]
    yield from conflicts
    if cfg.transformer.num_layers and not conflicts:
        yield from _split(cfg)
    yield from _interleaved(cfg)


def _exclusive(cfg: RunConfig) -> Iterator[Violation]:
    p, t = cfg.parallel, cfg.transformer
    if p.num_layers_per_virtual_pipeline_stage and p.num_virtual_stages_per_pipeline_rank:
        yield Violation(
            "--num-layers-per-virtual-pipeline-stage",
            p.num_layers_per_virtual_pipeline_stage,
            "excludes --num-virtual-stages-per-pipeline-rank",
            "use one of them",
        )
    uneven = [t.num_layers_in_first_pipeline_stage, t.num_layers_in_last_pipeline_stage]
    account = t.account_for_embedding_in_pipeline_split or t.account_for_loss_in_pipeline_split
    if any(n is not None for n in uneven) and account:
        yield Violation(
            "--decoder-first/last-pipeline-num-layers",
            None,
            "excludes --account-for-embedding/loss-in-pipeline-split",
            "use one of them",
        )
    if t.pipeline_model_parallel_layout and (account or any(n is not None for n in uneven)):
        yield Violation(
            "--pipeline-model-parallel-layout",
            t.pipeline_model_parallel_layout,
            "excludes the other flags that split the pipeline",
            "remove the others",
        )
    if t.pipeline_model_parallel_layout and p.num_layers_per_virtual_pipeline_stage:
        yield Violation(
            "--pipeline-model-parallel-layout",
            t.pipeline_model_parallel_layout,
            "excludes --num-layers-per-virtual-pipeline-stage",
            "remove the latter",
        )


def _chunk_layers(cfg: RunConfig) -> Iterator[Violation]:
    per_chunk = cfg.parallel.num_layers_per_virtual_pipeline_stage
    layers, pp = cfg.split.num_layers, cfg.split.pp
    layers += cfg.split.account_for_embedding + cfg.split.account_for_loss
    if per_chunk and pp > 1 and layers and layers % (pp * per_chunk):
        legal = divisors(layers // pp) if layers % pp == 0 else []
        yield Violation(
            "--num-layers-per-virtual-pipeline-stage",
            per_chunk,
            f"times pp = {pp} must divide the {layers} layers",
            f"use {one_of(legal, per_chunk)}",
        )


def _split(cfg: RunConfig) -> Iterator[Violation]:
    split = cfg.split
    chunks, layout = cfg.parallel.virtual_pipeline_model_parallel_size, split.layout
    try:
        table = cfg.stages
    except ValueError as error:
        yield _unsplittable(cfg, str(error))
        return
    built = sum(len(chunk.layers) for rank in table for chunk in rank)
    assert built == split.num_layers, f"{built} layers are placed, not {split.num_layers}"
    if layout and split.pp > 1 and len(table[0]) != (chunks or 1):
        yield Violation(
            "--pipeline-model-parallel-layout",
            layout,
            f"has {len(table[0])} chunks a rank, but {chunks or 1} were asked for",
            f"use --num-virtual-stages-per-pipeline-rank {len(table[0])}",
        )


def _unsplittable(cfg: RunConfig, rule: str) -> Violation:
    split = cfg.split
    if split.layout:
        return Violation(
            "--pipeline-model-parallel-layout",
            split.layout,
            rule,
            "use for instance 'Et*3|t*4|t*4|t*3L' for 14 layers on 4 ranks",
        )
    for flag, value in (
        ("--decoder-first-pipeline-num-layers", split.first),
        ("--decoder-last-pipeline-num-layers", split.last),
    ):
        if value is not None:
            return Violation(flag, value, rule, "choose it so that the rest divides evenly")
    extra = split.account_for_embedding + split.account_for_loss
    step = split.pp * split.vpp
    layers = split.num_layers + extra
    if layers % step == 0:
        return Violation("--num-layers", split.num_layers, rule, "use more layers or fewer stages")
    near = [m - extra for m in multiples_near(layers, step)]
    pps = [d for d in divisors(layers) if (layers // d) % split.vpp == 0]
    added = f" (plus {extra} for embedding and loss)" if extra else ""
    name = "pp" if split.vpp == 1 else "pp*vpp"
    return Violation(
        "--num-layers",
        split.num_layers,
        f"{added} must be a multiple of {name} = {step}".strip(),
        f"use {one_of(near)} layers" + (f", or pp {one_of(pps, split.pp)}" if pps else ""),
    )


def _interleaved(cfg: RunConfig) -> Iterator[Violation]:
    p, t = cfg.parallel, cfg.transformer
    pp = p.pipeline_model_parallel_size
    if p.virtual_pipeline_model_parallel_size is None:
        return
    if pp == PAIR and not t.overlap_p2p_comm:
        yield Violation(
            "--no-overlap-p2p-communication",
            None,
            "is silently wrong with pp = 2 and virtual stages",
            "remove it, or use --pipeline-model-parallel-size 4",
        )
    if t.overlap_p2p_comm and t.batch_p2p_comm:
        yield Violation(
            "--batch-p2p-comm", None, "excludes --overlap-p2p-communication", "remove one of them"
        )
    group = t.microbatch_group_size_per_vp_stage or pp
    if group < pp:
        yield Violation(
            "--microbatch-group-size-per-virtual-pipeline-stage",
            group,
            f"must be at least pp = {pp}",
            f"use {pp}",
        )
        return
    micro, dp = cfg.train.micro_batch_size, p.data_parallel_size
    batch = cfg.train.global_batch_size
    if not (micro and dp and batch) or batch % (micro * dp):
        return
    count = batch // (micro * dp)
    if count < group or 0 < count % group < pp:
        near = [n * micro * dp for n in multiples_near(count, group)]
        yield Violation(
            "--global-batch-size",
            batch,
            f"gives {count} micro-batches; the interleaved schedule needs a multiple of"
            f" pp = {group}",
            f"use {one_of(near)}",
        )
