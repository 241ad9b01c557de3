"""Which rank stands where, when the cluster has several parts with slow links between them.

Holmes (arXiv 2312.03549): the pipeline, whose messages are smallest, crosses the slow link; data,
tensor and expert groups stay inside a part.  ``order[rank]`` is the physical slot of a rank::

    two parts of 4 slots, pp 2 x dp 4       naive (pp inside): dp group [0 2 4 6] crosses
    order for pp across: ranks 0-3 (stage 0) on part a, 4-7 (stage 1) on part b

A file holds one slot a line, line n for rank n: `megatron_ext/mesh/rank_order.py` reads it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import permutations
from pathlib import Path

from megatron_ext.config import RunConfig
from megatron_ext.costs.cluster import Cluster
from megatron_ext.mesh.layout import Layout, layout_of
from megatron_ext.planner.choose import split_evenly, stages_text
from megatron_ext.planner.layouts import sizes_of, with_sizes
from megatron_ext.planner.step_time import Machine, Step, chunk_pass, step

AXES = ("tp", "cp", "dp", "pp")


def order_of(layout: Layout, slow_to_fast: Sequence[str]) -> tuple[int, ...]:
    """Slots of the ranks when the axes are laid out in another order: the first axis is outermost,
    so it is the one that crosses the slowest links."""
    sizes = {axis: layout.size(axis) for axis in AXES}
    order = []
    for rank in range(layout.world_size):
        where, slot = layout.coordinates(rank), 0
        for axis in slow_to_fast:
            slot = slot * sizes[axis] + where[axis]
        order.append(slot)
    return tuple(order)


def naive_order(layout: Layout) -> tuple[int, ...]:
    """Data-parallel replicas outermost: what a pipeline inside each part gives."""
    return order_of(layout, ("dp", "pp", "cp", "tp"))


def best_order(cfg: RunConfig, cluster: Cluster) -> tuple[tuple[int, ...], Step]:
    """The order of the axes with the shortest simulated step; tp stays fastest, inside a node."""
    layout = layout_of(cfg.parallel)
    tried = {}
    for outer in permutations(("dp", "cp", "pp")):
        order = order_of(layout, (*outer, "tp"))
        if order not in tried:
            tried[order] = step(cfg, cluster, order=order)
    order = min(tried, key=lambda key: tried[key].seconds)
    return order, tried[order]


def uneven(cfg: RunConfig, cluster: Cluster, order: tuple[int, ...]) -> RunConfig:
    """The configuration with stages cut for the speed of each rank's GPU."""
    machine = Machine(cluster, layout_of(cfg.parallel), order)
    sizes = sizes_of(cfg)
    if sizes.pp == 1:
        return cfg
    one = cfg.stages[0][0]
    layer = replace(one, layers=one.layers[:1], embedding=False, loss=False, mtp_layers=0)
    costs = []
    for stage in range(sizes.pp):
        made = chunk_pass(cfg, layer, machine, stage, 1.0)
        costs.append(made.forward + made.backward)
    speeds = [min(costs) / cost for cost in costs]
    ones = [1.0] * cfg.transformer.num_layers
    counts = split_evenly(ones, sizes.pp, sizes.vpp, speeds=speeds)
    text = stages_text(counts, cfg.transformer.mtp_num_layers or 0)
    return with_sizes(cfg, replace(sizes, stages=text), layout_of(cfg.parallel).world_size)


def write_order(path: str, order: Sequence[int]) -> None:
    """One slot a line."""
    Path(path).write_text("".join(f"{slot}\n" for slot in order), encoding="utf-8")
