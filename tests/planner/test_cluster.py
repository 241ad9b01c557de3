"""Cluster files: all are readable, bad ones get one line; times of collectives."""

from __future__ import annotations

import copy

import pytest
import yaml

from megatron_ext.costs.cluster import FOLDER, from_values, load, names
from megatron_ext.costs.links import Links, reach_of
from megatron_ext.errors import ConfigError

H100 = yaml.safe_load((FOLDER / "dgx-h100.yaml").read_text())


def test_all_clusters_are_read():
    wanted = {"dgx-a100", "dgx-h100", "h200", "gb200-nvl72", "mi250x-frontier", "two-sites"}
    assert wanted <= set(names())
    for name in names():
        assert load(name).parts


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("gpus_per_node", 0, "gpus_per_node 0 must be a whole number of more than 0"),
        ("nodes", 0, "nodes 0"),
        ("inside.gb_per_s", -5, "inside: gb_per_s -5 must be a number of more than 0"),
        ("network.latency_us", -1, "at least 0"),
        ("gpu.peak_tflops", "fast", "peak_tflops fast"),
        ("gpu.gemm_efficiency", 1.5, "a share of the peak"),
        ("gpu.peak_tflop", 1, "is not a key"),
        ("netwrok", {"gb_per_s": 1}, "use network"),
        ("domain", 12, "must be a multiple of gpus_per_node = 8"),
        ("gpu", None, "peak_tflops is missing"),
    ],
)
def test_impossible_clusters(path, value, words):
    values = copy.deepcopy(H100)
    *outer, last = path.split(".")
    place = values
    for name in outer:
        place = place[name]
    place[last] = value
    with pytest.raises(ConfigError) as error:
        from_values(values)
    assert words in "\n".join(error.value.lines())


def test_several_parts_need_a_link_and_sizes():
    values = {**copy.deepcopy(H100), "parts": [{"name": "a"}, {"name": "b"}]}
    with pytest.raises(ConfigError) as error:
        from_values(values)
    text = "\n".join(error.value.lines())
    assert "need a link" in text and "nodes" in text


def test_unknown_names_get_the_nearest():
    with pytest.raises(ConfigError, match="no such file") as error:
        load("dgx-h10")
    assert "dgx-h100" in error.value.do


def test_collectives_by_hand():
    """8 ranks of one node, and 16 of two: 1 GB over NVLink and over 8 NICs."""
    cluster = load("dgx-h100")
    links, inside = Links(cluster), cluster.parts[0].inside.gb_per_s
    network = cluster.parts[0].network.gb_per_s
    one, two = reach_of(cluster, range(8)), reach_of(cluster, range(16))
    assert links.gather(one, 1e9) == pytest.approx(7 / 8 / inside + 18e-6)
    assert links.gather(two, 1e9) == pytest.approx(
        max(7 / 8 / inside, 1 / 2 / (8 * network)) + 30e-6
    )
    assert links.reduce(one, 1e9) == 2 * links.gather(one, 1e9)
    spread = reach_of(cluster, range(0, 64, 8))
    assert (spread.local, spread.domains) == (1, 8)
    assert links.exchange(spread, 1e9) == pytest.approx(7 / 8 / network, rel=0.01)
    assert links.gather(reach_of(cluster, [3]), 1e9) == 0


def test_seventy_two_gpus_are_one_domain():
    cluster = load("gb200-nvl72")
    assert reach_of(cluster, range(64)).domains == 1
    assert reach_of(cluster, range(0, 144)).domains == 2
