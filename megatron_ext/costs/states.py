"""Bytes of parameters, gradients and optimizer state of one rank, exact to the byte.

megatron-core's DDP puts the parameters of each chunk into one buffer for dense and one for expert
tensors, last tensor first.  With the distributed optimizer a tensor starts at a multiple of 64
elements and a bucket ends at a multiple of lcm(ranks, 128); each rank owns an equal part of every
bucket and keeps fp32 master weights and Adam moments for the elements in it (not for the padding).

    dp 2, tensors of 100 and 30 elements, last first:
      0        30  64             164    256        bucket of 256
      |--- b ---|   |----- a ------|  ....|         rank 0 owns 0..127 = 30 + 64, rank 1 owns 36

Source: param_and_grad_buffer.py, distributed_data_parallel.py and distrib_optimizer.py of
megatron-core 0.16.1; ``tests/planner/test_states.py`` compares with the real tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import lcm

from megatron_ext.config import RunConfig
from megatron_ext.costs.tensors import Tensor, chunk_tensors, padded_vocab_size, share_of

SMALLEST_BUCKET, BUCKET_PER_RANK = 40_000_000, 1_000_000
"""megatron-core's default bucket: the larger of the two, the second times dp, in elements."""

STEP_BYTES = 4
"""torch's Adam keeps the step of each parameter in a tensor of one float."""

WIDTH = {"fp32": 4, "bf16": 2, "fp16": 2, "fp8": 1}


@dataclass(frozen=True)
class States:
    """Bytes of one rank."""

    parameters: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        """All three."""
        return self.parameters + self.gradients + self.optimizer


@dataclass(frozen=True)
class Buffer:
    """Where tensors lie in one DDP buffer: spans of elements, and the ends of the buckets."""

    spans: tuple[tuple[int, int], ...]
    bucket_ends: tuple[int, ...]

    @property
    def size(self) -> int:
        """Elements, padding included."""
        return self.bucket_ends[-1] if self.bucket_ends else 0


def lay_out(
    tensors: Sequence[Tensor], ranks: int, bucket_size: int | None, *, sharded: bool, wide: bool
) -> Buffer:
    """The buffer of ``tensors`` (in module order) that ``ranks`` ranks reduce together.

    Args:
        bucket_size: elements after which a bucket is closed; None: one bucket.
        sharded: with the distributed optimizer, which pads.
        wide: --ddp-pad-buckets-for-high-nccl-busbw.
    """
    multiple = lcm(ranks, 128, 2**16) if wide else lcm(ranks, 128)
    spans, ends = [], []
    begin = start = end = 0
    is_open = False
    for tensor in reversed(tensors):
        own = tensor.shared and sharded
        start = _up(start, 64) if sharded else start
        if own and is_open:
            start = begin = _up(start, multiple) if sharded else start
            ends.append(start)
        end = start + tensor.count
        spans.append((start, end))
        start, is_open = end, True
        if own or (bucket_size is not None and end - begin >= bucket_size):
            start = begin = _up(end, multiple) if sharded else end
            ends.append(start)
            is_open = False
    if is_open:
        ends.append(_up(end, multiple) if sharded else end)
    return Buffer(tuple(spans), tuple(ends))


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def owned(buffer: Buffer, ranks: int) -> list[tuple[int, int]]:
    """(elements, tensors) that each of ``ranks`` ranks owns: its part of every bucket."""
    elements, tensors = [0] * ranks, [0] * ranks
    begin, place = 0, 0
    for end in buffer.bucket_ends:
        part = (end - begin) // ranks
        while place < len(buffer.spans) and buffer.spans[place][0] < end:
            low, high = buffer.spans[place]
            for rank in range((low - begin) // part, (high - 1 - begin) // part + 1):
                first = begin + rank * part
                elements[rank] += min(high, first + part) - max(low, first)
                tensors[rank] += 1
            place += 1
        begin = end
    return list(zip(elements, tensors))


@dataclass(frozen=True)
class Recipe:
    """What the flags say about dtypes and buckets."""

    weight: int
    gradient: int
    state: int
    sharded: bool
    wide: bool
    bucket_size: int | None
    dense_ranks: int
    expert_ranks: int


def recipe_of(cfg: RunConfig) -> Recipe:
    """The recipe of a checked configuration."""
    p, ddp, opt = cfg.parallel, cfg.ddp, cfg.optimizer
    half = cfg.train.bf16 or cfg.train.fp16
    weight = 2 if half else 4
    moments = [4, 4]
    master = 4 if half else 0
    if opt.use_precision_aware_optimizer:
        moments = [WIDTH[opt.exp_avg_dtype or "fp32"], WIDTH[opt.exp_avg_sq_dtype or "fp32"]]
        master = WIDTH[opt.main_params_dtype or "fp32"]
    if opt.optimizer == "sgd":
        moments = [4] if opt.sgd_momentum else []
    copies = p.num_distributed_optimizer_instances
    bucket = ddp.bucket_size or max(SMALLEST_BUCKET, BUCKET_PER_RANK * p.data_parallel_size)
    return Recipe(
        weight=weight,
        gradient=4 if ddp.grad_reduce_in_fp32 or not half else 2,
        state=master + sum(moments),
        sharded=ddp.use_distributed_optimizer,
        wide=bool(ddp.pad_buckets_for_high_nccl_busbw),
        bucket_size=bucket if ddp.overlap_grad_reduce else None,
        dense_ranks=p.data_parallel_size * p.context_parallel_size // copies,
        expert_ranks=max(1, p.expert_data_parallel_size // copies),
    )


def stage_states(
    cfg: RunConfig, stage: int, rank: tuple[int, int] | None = None, vocab_size: int | None = None
) -> States:
    """Bytes of a rank of pipeline stage ``stage``.

    Args:
        rank: (rank within dp x cp, rank within expert dp); None: the rank that owns most.
    """
    recipe, share = recipe_of(cfg), share_of(cfg)
    rows = padded_vocab_size(cfg, vocab_size)
    no_buckets = stage > 0 or cfg.optimizer.overlap_param_gather_with_optimizer_step
    parameters = gradients = 0
    folds: dict[bool, list[tuple[int, int]]] = {}
    for index, chunk in enumerate(cfg.stages[stage]):
        tensors = tuple(chunk_tensors(cfg, chunk, share, rows))
        bucket = None if no_buckets or index else recipe.bucket_size
        for expert in (False, True):
            mine = tuple(x for x in tensors if x.expert == expert)
            size, parts = _fold(mine, recipe, expert, bucket)
            parameters += size * recipe.weight
            gradients += size * recipe.gradient
            so_far = folds.get(expert, [(0, 0)] * len(parts))
            folds[expert] = [(a + c, b + d) for (a, b), (c, d) in zip(so_far, parts)]
    scalar = STEP_BYTES if cfg.optimizer.optimizer == "adam" else 0
    optimizer = 0
    for expert, parts in folds.items():
        costs = [elements * recipe.state + number * scalar for elements, number in parts]
        optimizer += max(costs) if rank is None else costs[rank[expert]]
    return States(parameters, gradients, optimizer)


@lru_cache(maxsize=512)
def _fold(
    tensors: tuple[Tensor, ...], recipe: Recipe, expert: bool, bucket: int | None
) -> tuple[int, list[tuple[int, int]]]:
    """(elements of the buffer, what each rank owns of it)."""
    ranks = recipe.expert_ranks if expert else recipe.dense_ranks
    buffer = lay_out(tensors, ranks, bucket, sharded=recipe.sharded, wide=recipe.wide)
    if recipe.sharded:
        return buffer.size, owned(buffer, ranks)
    return buffer.size, [(buffer.size, len(tensors))] * ranks
