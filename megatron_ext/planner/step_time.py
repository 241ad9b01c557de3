"""A simulated training step: seconds, bubble, exposed communication, tokens/s, MFU.

    layers -> seconds of each model chunk (costs/work.py, costs/links.py)
    program of actions -> timeline (pipeline/simulate.py)
    + gradients and weights over dp that nothing hides + optimizer

Rules of overlap: with --overlap-grad-reduce the gradient sums hide behind the last backward of the
stage, with --overlap-param-gather the weights behind its first forward; context parallelism hides
behind the attention; pipeline messages hide in the interleaved schedule; tp and ep collectives hide
behind nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache

from megatron_ext.config import RunConfig
from megatron_ext.config.stages import Chunk
from megatron_ext.costs.cluster import Cluster, Gpu
from megatron_ext.costs.flops import model_flops_per_token
from megatron_ext.costs.links import Links, Reach, reach_of
from megatron_ext.costs.micro_batch import shape_of
from megatron_ext.costs.states import recipe_of
from megatron_ext.costs.tensors import (
    chunk_tensors,
    moe_pattern,
    padded_vocab_size,
    share_of,
)
from megatron_ext.costs.work import (
    OPTIMIZER_TRAFFIC,
    Op,
    Send,
    embedding_work,
    head_work,
    layer_work,
)
from megatron_ext.mesh.layout import Layout, layout_of
from megatron_ext.pipeline.program import Action, program_of
from megatron_ext.pipeline.simulate import Timeline, simulate
from megatron_ext.planner.memory import micro_batches_of

FULL = "full"


@dataclass
class Pass:
    """Seconds of a forward and a backward pass, exposed communication by axis included."""

    forward: float = 0.0
    backward: float = 0.0
    exposed: dict[str, float] = field(default_factory=dict)

    def add(self, other: Pass, times: int = 1) -> None:
        """Add another pass `times` times."""
        self.forward += other.forward * times
        self.backward += other.backward * times
        for axis, seconds in other.exposed.items():
            self.exposed[axis] = self.exposed.get(axis, 0.0) + seconds * times


@dataclass(frozen=True)
class Step:
    """One predicted step; seconds.

    Attributes:
        exposed: kind -> seconds of communication that nothing hides, of the slowest stage.
    """

    seconds: float
    pipeline: Timeline
    passes: tuple[tuple[Pass, ...], ...]
    exposed: dict[str, float]
    optimizer: float
    tokens_per_s: float
    mfu: float
    model_tflops: float


@dataclass(frozen=True)
class Machine:
    """A cluster with the ranks of a layout on it; `order[rank]` is the physical slot."""

    cluster: Cluster
    layout: Layout
    order: tuple[int, ...] | None = None

    def slot(self, rank: int) -> int:
        """Where a rank stands."""
        return rank if self.order is None else self.order[rank]

    def first_rank(self, stage: int) -> int:
        """The rank of a stage whose other coordinates are 0."""
        return stage * self.layout.strides(expert=False)["pp"]

    def reach(self, stage: int, axes: str) -> Reach:
        """How far the group of a stage's first rank reaches."""
        ranks = self.layout.group_of(self.first_rank(stage), axes)
        return reach_of(self.cluster, [self.slot(rank) for rank in ranks])

    def gpu(self, stage: int) -> Gpu:
        """The slowest GPU of a stage."""
        ranks = self.layout.world_size // self.layout.pp
        strides = self.layout.strides(expert=False)
        first = self.first_rank(stage)
        watched = range(first, first + ranks, max(1, ranks // 8)) if strides["pp"] > 1 else [first]
        parts = {self.cluster.part_of(self.slot(rank)) for rank in watched}
        gpus = [self.cluster.parts[number].gpu for number in parts]
        return min(gpus, key=lambda g: g.peak_tflops * g.gemm_efficiency)


def chunk_pass(cfg: RunConfig, chunk: Chunk, machine: Machine, stage: int, imbalance: float):
    """Seconds of one micro-batch in one model chunk."""
    pattern, gpu = moe_pattern(cfg), machine.gpu(stage)
    made, total = {}, Pass()
    layers = [(pattern[i], i) for i in chunk.layers]
    layers += [(pattern[-1], cfg.transformer.num_layers - 1)] * chunk.mtp_layers
    windows = cfg.transformer.window_size is not None
    for place, (moe, index) in enumerate(layers):
        again = _recomputed(cfg, place)
        key = (moe, again, index if windows else 0)
        if key not in made:
            ops, sends = layer_work(cfg, moe, index, imbalance)
            made[key] = layer_pass(ops, sends, machine, stage, gpu, again)
        total.add(made[key])
    if chunk.embedding:
        total.add(_plain(embedding_work(cfg), gpu))
    heads = int(chunk.loss) + chunk.mtp_layers
    if heads:
        total.add(_plain(head_work(cfg), gpu), heads)
    return total


def _recomputed(cfg: RunConfig, place: int) -> tuple[str, ...]:
    """What is computed again in the layer at `place` of its chunk."""
    t = cfg.transformer
    if t.recompute_granularity == "selective":
        return tuple(t.recompute_modules or ("core_attn",))
    if t.recompute_granularity != "full":
        return ()
    is_in = t.recompute_method == "uniform" or place < (t.recompute_num_layers or 1)
    return (FULL,) if is_in else ()


def _plain(ops: list[Op], gpu: Gpu) -> Pass:
    return Pass(sum(o.seconds(gpu) for o in ops), sum(o.backward(gpu) for o in ops))


def layer_pass(
    ops: list[Op], sends: list[Send], machine: Machine, stage: int, gpu: Gpu, again: tuple[str, ...]
) -> Pass:
    """Seconds of one layer, with its collectives and what is recomputed."""
    made = _plain(ops, gpu)
    attention = sum(o.seconds(gpu) for o in ops if o.kind == "attention")
    made.backward += sum(o.seconds(gpu) for o in ops if _is_again(o.part, again))
    for send in sends:
        forward = send.times * _send_seconds(machine, stage, send.axis, send.kind, send.size)
        backward = forward * (2 if send.axis == "cp" else 1)
        if send.axis == "cp":
            forward = max(0.0, forward - attention)
            backward = max(0.0, backward - 2.5 * attention)
        if _is_again(send.part, again):
            backward += forward
        made.forward += forward
        made.backward += backward
        made.exposed[send.axis] = made.exposed.get(send.axis, 0.0) + forward + backward
    return made


def _is_again(part: str, again: tuple[str, ...]) -> bool:
    inside = part in ("moe_act", "shared_experts") and "moe" in again
    return FULL in again or part in again or inside


@lru_cache(maxsize=4096)
def _send_seconds(machine: Machine, stage: int, axis: str, kind: str, size: float) -> float:
    links, reach = Links(machine.cluster), machine.reach(stage, axis)
    return getattr(links, kind)(reach, size)


def step(
    cfg: RunConfig,
    cluster: Cluster,
    imbalance: float = 1.0,
    order: tuple[int, ...] | None = None,
) -> Step:
    """Predict one step of a checked configuration."""
    machine = Machine(cluster, layout_of(cfg.parallel), order)
    count, pp = micro_batches_of(cfg), len(cfg.stages)
    vpp = len(cfg.stages[0])
    passes = tuple(
        tuple(chunk_pass(cfg, chunk, machine, stage, imbalance) for chunk in chunks)
        for stage, chunks in enumerate(cfg.stages)
    )
    s, links = shape_of(cfg), Links(cluster)
    size = s.t * s.H * s.w

    def duration(rank: int, action: Action) -> float:
        one = passes[rank][action.chunk]
        return one.forward if action.kind == "F" else one.backward

    def message(a: int, b: int) -> float:
        slots = (machine.slot(machine.first_rank(x)) for x in (a, b))
        return links.send(*slots, size)

    group = cfg.transformer.microbatch_group_size_per_vp_stage or pp
    program = program_of(pp, vpp, count, group)
    line = simulate(program, duration, message, overlapped=bool(cfg.transformer.overlap_p2p_comm))
    tails = [_tail(cfg, machine, stage, passes[stage]) for stage in range(pp)]
    ends = {stage: 0.0 for stage in range(pp)}
    for event in line.events:
        ends[event.rank] = max(ends[event.rank], event.end)
    seconds = max(ends[stage] + sum(tails[stage].values()) for stage in range(pp))
    seconds = max(seconds, _shared_cores(cfg, cluster, line, tails))
    slowest = max(range(pp), key=lambda stage: line.busy[stage])
    exposed = {"pp": max(line.sent)} if pp > 1 else {}
    for one in passes[slowest]:
        for axis, cost in one.exposed.items():
            exposed[axis] = exposed.get(axis, 0.0) + cost * count
    exposed |= {k: v for k, v in tails[slowest].items() if k != "optimizer" and v > 0}
    tokens = cfg.train.global_batch_size * cfg.model.seq_length
    flops = model_flops_per_token(cfg) * tokens
    tflops = flops / seconds / machine.layout.world_size / 1e12
    peak = min(part.gpu.peak_tflops for part in cluster.parts)
    optimizer = max(tail["optimizer"] for tail in tails)
    rate = tokens / seconds
    return Step(seconds, line, passes, exposed, optimizer, rate, tflops / peak, tflops)


def _shared_cores(cfg: RunConfig, cluster: Cluster, line: Timeline, tails: list[dict]) -> float:
    """Where fewer cores than ranks compute: all work over all cores."""
    cores = cluster.parts[0].cores
    if not cores:
        return 0.0
    each = (cfg.parallel.world_size or 1) // len(line.busy)
    return sum(busy + sum(t.values()) for busy, t in zip(line.busy, tails)) * each / cores


def _tail(cfg: RunConfig, machine: Machine, stage: int, passes: tuple[Pass, ...]) -> dict:
    """Exposed seconds after the pipeline: gradients, optimizer, weights."""
    recipe, share, links = recipe_of(cfg), share_of(cfg), Links(machine.cluster)
    gpu = machine.gpu(stage)
    sizes = {False: 0, True: 0}
    for chunk in cfg.stages[stage]:
        for tensor in chunk_tensors(cfg, chunk, share, padded_vocab_size(cfg)):
            sizes[tensor.expert] += tensor.count
    reduce = gather = owned = 0.0
    for expert, axes in ((False, "dp-cp"), (True, "edp")):
        if sizes[expert] == 0:
            continue
        reach = machine.reach(stage, axes)
        move = links.gather if recipe.sharded else links.reduce
        reduce += move(reach, sizes[expert] * recipe.gradient)
        gather += links.gather(reach, sizes[expert] * recipe.weight) if recipe.sharded else 0.0
        ranks = recipe.expert_ranks if expert else recipe.dense_ranks
        owned += sizes[expert] / (ranks if recipe.sharded else 1)
    if cfg.ddp.overlap_grad_reduce:
        reduce = max(0.0, reduce - sum(one.backward for one in passes))
    if cfg.ddp.overlap_param_gather:
        gather = max(0.0, gather - sum(one.forward for one in passes))
    optimizer = owned * OPTIMIZER_TRAFFIC / (gpu.memory_gb_per_s * 1e9) + 20 * gpu.kernel_us * 1e-6
    return {"gradients": reduce, "optimizer": optimizer, "weights": gather}


def report(cfg: RunConfig, made: Step) -> str:
    """The step in a few lines."""
    parts = ", ".join(f"{kind} {seconds:.4g} s" for kind, seconds in made.exposed.items())
    return (
        f"step {made.seconds:.4g} s; pipeline {made.pipeline.makespan:.4g} s with bubble"
        f" {made.pipeline.bubble_share:.1%}; optimizer {made.optimizer:.3g} s\n"
        f"exposed communication of the busiest stage: {parts or 'none'}\n"
        f"{made.tokens_per_s:,.0f} tokens/s, {made.model_tflops:.1f} model TFLOP/s a GPU,"
        f" MFU {made.mfu:.1%}"
    )
