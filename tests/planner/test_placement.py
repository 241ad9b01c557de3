"""Several clusters: who crosses the slow link, uneven stages, rank orders, the published rows."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest

from megatron_ext.config import parse
from megatron_ext.costs.cluster import load
from megatron_ext.errors import ConfigError
from megatron_ext.mesh import rank_order
from megatron_ext.mesh.layout import Layout, layout_of
from megatron_ext.planner import placement, published
from megatron_ext.planner.command import config_path
from megatron_ext.planner.step_time import step
from tests.costs import models
from tests.ranks.harness import run_ranks
from tests.ranks.tiny import TINY, pretrain, read_metrics

WHERE = "--world-size 64 --pipeline-model-parallel-size 4 --dry-run"


def _qwen():
    return parse(["--config", config_path("qwen3-30b-a3b"), *WHERE.split()], {})


def test_orders_are_permutations_and_pipelines_cross():
    layout = Layout(16, tp=2, pp=2, ep=2)
    for outer in (("pp", "dp", "cp"), ("dp", "pp", "cp")):
        assert sorted(placement.order_of(layout, (*outer, "tp"))) == list(range(16))
    assert placement.order_of(layout, ("pp", "dp", "cp", "tp")) == tuple(range(16))


def test_the_gain_over_naive_placement():
    cfg, cluster = _qwen(), load("two-sites")
    layout = layout_of(cfg.parallel)
    naive = step(cfg, cluster, order=placement.naive_order(layout))
    order, best = placement.best_order(cfg, cluster)
    assert naive.seconds > 1.5 * best.seconds
    for group in layout.groups("dp"):
        assert len({cluster.part_of(order[rank]) for rank in group}) == 1


def test_slower_gpus_get_fewer_layers():
    cfg, cluster = _qwen(), load("two-sites")
    part = cluster.parts[1]
    slow = replace(part, gpu=replace(part.gpu, peak_tflops=part.gpu.peak_tflops / 2))
    mixed = replace(cluster, parts=(cluster.parts[0], slow))
    order = tuple(range(64))
    cut = placement.uneven(cfg, mixed, order)
    sizes = [len(stage[0].layers) for stage in cut.stages]
    assert sum(sizes) == 48 and sizes[0] > 1.4 * sizes[3]
    assert step(cut, mixed, order=order).seconds < step(cfg, mixed, order=order).seconds


def test_rank_order_files(tmp_path):
    path = tmp_path / "order.txt"
    placement.write_order(path, (0, 2, 1))
    assert rank_order.read_order(path, 3) == (0, 2, 1)
    assert rank_order.rank_of_slot((0, 2, 1), 2) == 1
    for text in ("0\n1\n", "0\n0\n1\n", "1\n0\n2\n", "a\nb\nc\n"):
        path.write_text(text)
        with pytest.raises(ConfigError, match="--rank-order"):
            rank_order.read_order(path, 3)


def test_published_rows_stay_where_the_page_says():
    errors = [abs(error) for error in published.errors()]
    assert sum(errors) / len(errors) < 0.05
    assert max(errors) < 0.12


def test_more_of_everything_costs_more():
    cfg, cluster = parse((models.QWEN3_30B_A3B + models.RUN).split(), {}), load("dgx-h100")
    base = step(cfg, cluster).pipeline.makespan
    assert step(cfg, cluster, imbalance=4.0).pipeline.makespan > base
    full = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
    again = parse((models.QWEN3_30B_A3B + models.RUN + " " + full).split(), {})
    assert 1.2 < step(again, cluster).pipeline.makespan / base < 1.4


def _train(argv: list[str], order: str | None) -> str:
    """Train on a forked rank whose launcher gave it a slot; the rank it played."""
    if order:
        os.environ[rank_order.RANK_ORDER] = order
    pretrain(argv)
    return os.environ["RANK"]


def test_a_permuted_order_trains_the_same_curve(tmp_path):
    layout = "--pipeline-model-parallel-size 2 --train-iters 3".split()
    order = placement.naive_order(Layout(4, pp=2))
    assert order == (0, 2, 1, 3)
    placement.write_order(tmp_path / "order.txt", order)
    curves, ranks = [], []
    for name, path in (("plain", None), ("permuted", str(tmp_path / "order.txt"))):
        argv = [*TINY, *layout, "--run-dir", str(tmp_path / name)]
        ranks.append(run_ranks(_train, 4, argv, path))
        curves.append(read_metrics(tmp_path / name))
    assert ranks == [["0", "1", "2", "3"], ["0", "2", "1", "3"]]
    assert len(curves[0]) == 3 and curves[0] == curves[1]
