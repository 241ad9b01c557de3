"""A number of ranks that the layout of a file cannot hold: one line, with those that it can.

The sizes of a recipe are not the user's choice, the number of ranks is: so it is named alone, and
the rules that it would break in consequence stay silent.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import lcm

from megatron_ext.config.checks.numbers import one_of
from megatron_ext.config.run_config import RunConfig
from megatron_ext.errors import Violation

SIZES = ("tensor", "pipeline", "expert")
SHOWN = 4
MOST_TRIED = 100_000
"""Multiples of the smallest number of ranks that are tried."""


def rules(cfg: RunConfig) -> Iterator[Violation]:
    """Silent where the sizes are no file's, or where no number of ranks would do."""
    origins = {cfg.origins[f"{name}_model_parallel_size"] for name in SIZES}
    files = sorted(o.removeprefix("file:") for o in origins if o.startswith("file:"))
    world = cfg.parallel.world_size
    if not files or world is None or _fits(cfg, world):
        return
    legal = legal_worlds(cfg)
    if not legal:
        return
    near = sorted(sorted(legal, key=lambda n: abs(n - world))[:SHOWN])
    flag = "WORLD_SIZE" if cfg.origins["world_size"] == "environment" else "--world-size"
    p, t = cfg.parallel, cfg.train
    rule = (
        f"does not fit the layout of {files[0]}: it needs multiples of {_unit(cfg)} ranks (tp"
        f" {p.tensor_model_parallel_size}, pp {p.pipeline_model_parallel_size}, cp"
        f" {p.context_parallel_size}, ep {p.expert_model_parallel_size}) that share"
        f" {t.global_batch_size} sequences evenly"
    )
    yield Violation(flag, world, rule, f"use {one_of(near)} ranks")


def legal_worlds(cfg: RunConfig) -> list[int]:
    """All numbers of ranks that hold the layout and share the batch, ascending."""
    unit, batch = _unit(cfg), cfg.train.global_batch_size or 0
    most = batch * _model(cfg) // unit
    return [unit * n for n in range(1, min(most, MOST_TRIED) + 1) if _fits(cfg, unit * n)]


def _model(cfg: RunConfig) -> int:
    p = cfg.parallel
    return p.tensor_model_parallel_size * p.pipeline_model_parallel_size * p.context_parallel_size


def _unit(cfg: RunConfig) -> int:
    p = cfg.parallel
    etp = p.expert_tensor_parallel_size or p.tensor_model_parallel_size
    return lcm(_model(cfg), p.pipeline_model_parallel_size * p.expert_model_parallel_size * etp)


def _fits(cfg: RunConfig, world: int) -> bool:
    if world % _unit(cfg):
        return False
    t, dp = cfg.train, world // _model(cfg)
    batches = [t.global_batch_size or 0, *(t.rampup_batch_size or ())[:2]]
    if cfg.origins["global_batch_size"] == "derived" or not t.micro_batch_size:
        return True
    one = t.micro_batch_size * dp
    if any(batch % one for batch in batches):
        return False
    pp = cfg.parallel.pipeline_model_parallel_size
    interleaved = cfg.parallel.virtual_pipeline_model_parallel_size is not None
    return not interleaved or all((batch // one) % pp == 0 for batch in batches)
