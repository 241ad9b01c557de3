"""Bytes of one rank of every pipeline stage, and the worst of them.

    stage 3: weights 4.1 GB, gradients 8.2, optimizer 0.6, activations 31.0 (7 micro-batches), ...

Exact: weights, gradients and optimizer (costs/states.py).  Within 3% on local layers: activations
(costs/activations.py) times the micro-batches in flight of the schedule's own action lists.
Estimates: workspace of the recomputed layer, temporary logits, communication buffers, allocator.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_ext.config import RunConfig
from megatron_ext.costs.activations import chunk_saved, layer_saved, routed_rows
from megatron_ext.costs.cluster import Cluster
from megatron_ext.costs.micro_batch import shape_of
from megatron_ext.costs.states import stage_states
from megatron_ext.costs.tensors import moe_pattern, padded_vocab_size
from megatron_ext.pipeline.program import in_flight, program_of

SENT_AT_ONCE = 4
"""Buffers of a pipeline rank's messages: to and from both neighbours."""

NCCL_CHANNEL_BYTES = 4 << 20
"""What NCCL keeps for one rank of a group, about."""


@dataclass(frozen=True)
class StageMemory:
    """Bytes of a rank of one pipeline stage."""

    stage: int
    parameters: int
    gradients: int
    optimizer: int
    activations: int
    micro_batches: float
    dispatch: int
    logits: int
    recompute: int
    communication: int
    allocator: int

    @property
    def total(self) -> int:
        """All of them."""
        states = self.parameters + self.gradients + self.optimizer
        temporary = self.dispatch + self.logits + self.recompute
        return states + self.activations + temporary + self.communication + self.allocator


def micro_batches_of(cfg: RunConfig) -> int:
    """Micro-batches of a step."""
    return cfg.train.global_batch_size // (
        cfg.train.micro_batch_size * cfg.parallel.data_parallel_size
    )


def flights(cfg: RunConfig) -> list[list[int]]:
    """[stage][chunk]: micro-batches held at once."""
    p = cfg.parallel
    pp, vpp = p.pipeline_model_parallel_size, p.virtual_pipeline_model_parallel_size or 1
    group = cfg.transformer.microbatch_group_size_per_vp_stage or pp
    # beyond a few rounds the schedule repeats itself
    count = min(micro_batches_of(cfg), 4 * max(pp, group))
    return in_flight(program_of(pp, vpp, count, group))


def stage_memory(
    cfg: RunConfig,
    stage: int,
    held: list[int],
    imbalance: float = 1.0,
    cluster: Cluster | None = None,
) -> StageMemory:
    """Memory of one stage; `held` are the micro-batches in flight of its chunks."""
    chunks, s, t = cfg.stages[stage], shape_of(cfg), cfg.transformer
    states = stage_states(cfg, stage)
    saved = [chunk_saved(cfg, chunk, imbalance) for chunk in chunks]
    activations = sum(n * size for n, size in zip(held, saved))
    pattern = moe_pattern(cfg)
    own = [i for chunk in chunks for i in chunk.layers]
    has_moe = any(pattern[i] for i in own)
    rows = routed_rows(cfg, imbalance) if has_moe else 0
    logits = 0
    if any(chunk.loss for chunk in chunks):
        logits = s.T * (padded_vocab_size(cfg) // s.tp) * (4 + s.w)
    again = 0
    if t.recompute_granularity == "full" and own:
        again = max(sum(layer_saved(cfg, pattern[i], imbalance, i).values()) for i in own)
    messages = SENT_AT_ONCE * s.t * s.H * s.w if len(cfg.stages) > 1 else 0
    moved = states.parameters + states.gradients + states.optimizer + activations
    fragments = cluster.fragmentation if cluster else 0.05
    return StageMemory(
        stage,
        states.parameters,
        states.gradients,
        states.optimizer,
        activations,
        sum(held) / len(held),
        3 * rows * s.H * s.w,
        logits,
        again,
        messages + _nccl(cfg),
        int(fragments * (moved + logits + again)),
    )


def _nccl(cfg: RunConfig) -> int:
    p = cfg.parallel
    sizes = (
        p.tensor_model_parallel_size,
        p.expert_model_parallel_size,
        p.pipeline_model_parallel_size,
        p.data_parallel_size,
        p.expert_data_parallel_size,
        p.context_parallel_size,
    )
    return sum(min(n, 16) * NCCL_CHANNEL_BYTES for n in sizes if n > 1)


def all_stages(
    cfg: RunConfig, imbalance: float = 1.0, cluster: Cluster | None = None
) -> list[StageMemory]:
    """Memory of every stage."""
    held = flights(cfg)
    return [stage_memory(cfg, i, held[i], imbalance, cluster) for i in range(len(cfg.stages))]


def worst(stages: list[StageMemory]) -> StageMemory:
    """The stage that needs most."""
    return max(stages, key=lambda one: one.total)


COLUMNS = ("parameters", "gradients", "optimizer", "activations", "dispatch", "logits", "recompute")
COLUMNS += ("communication", "allocator", "total")


def table(stages: list[StageMemory], shown: int = 16) -> str:
    """The stages in GB, one a line."""
    lines = ["stage  " + "  ".join(name.rjust(11) for name in COLUMNS) + "  in flight"]
    for one in stages[:shown]:
        cells = "  ".join(f"{getattr(one, name) / 1e9:11.3f}" for name in COLUMNS)
        lines.append(f"{one.stage:5d}  {cells}  {one.micro_batches:9.2f}")
    if len(stages) > shown:
        lines.append(f"  ... {len(stages) - shown} more stages")
    top = worst(stages)
    lines.append(f"worst: stage {top.stage} with {top.total / 1e9:.3f} GB a rank (all in GB = 1e9)")
    return "\n".join(lines)
