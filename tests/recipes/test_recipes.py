"""Every recipe: its dry run on its ranks, its shape and parameters as published, its files."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from megatron_ext.config import parse
from megatron_ext.config.recipes import CONFIGS, machines, models
from megatron_ext.costs.cluster import load
from megatron_ext.costs.dryrun import dry_run
from megatron_ext.costs.parameters import count_parameters
from megatron_ext.hf.architectures import by_model_type
from megatron_ext.hf.configure import differences, run_config
from megatron_ext.hf.source import Source
from megatron_ext.planner.memory import all_stages, worst
from tests.policy.test_configs import ranks_of
from tests.recipes.published import MODELS

LAYOUTS = sorted((CONFIGS / "layouts").glob("*.yaml"))
MACHINES = {
    "h100": ("dgx-h100", 80e9),
    "h200": ("h200", 141e9),
    "gb200": ("gb200-nvl72", 186e9),
    "mi250x": ("mi250x-frontier", 64e9),
}
"""Machine of a layout -> its cluster file and the bytes of a rank."""
IMBALANCE = 1.2


def keys_of(path: Path) -> set[str]:
    return set(yaml.safe_load(path.read_text()))


@pytest.mark.parametrize("path", LAYOUTS, ids=lambda path: path.stem)
def test_it_passes_a_dry_run_on_its_ranks(path):
    ranks = ranks_of(path)
    cfg = parse(["--config", path.stem, "--world-size", str(ranks), "--dry-run"], {})
    assert dry_run(cfg).startswith(f"{ranks} ranks = ")
    assert cfg.warnings == ()


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_its_shape_is_the_published_one(model):
    shape = {"model_type": model.family, **model.shape}
    flags = by_model_type()[model.family].flags(Source(shape, Path("config.json")))
    published = run_config(flags)
    ours = parse(["--config", model.name, "--dry-run"], {})
    assert set(differences(ours, published)) <= {"mtp_num_layers"}
    for section, name in (
        ("model", "seq_length"),
        ("model", "max_position_embeddings"),
        ("transformer", "ffn_hidden_size"),
        ("transformer", "layernorm_epsilon"),
    ):
        assert getattr(getattr(ours, section), name) == getattr(getattr(published, section), name)
    assert ours.model.padded_vocab_size == shape["vocab_size"]


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_its_parameters_are_the_published_ones(model):
    """Within 0.5%, and active ones as printed (rounded or cut) where they have two digits."""
    cfg = parse(["--config", model.name, "--dry-run"], {})
    count = count_parameters(cfg)
    total = count.total - count.mtp + model.buffers
    assert total == pytest.approx(model.total, rel=0.005)
    if isinstance(model.total, int):
        assert total == model.total
    active = count.active - (0 if model.lookup else count.embedding // 2)
    printed = float(model.active)
    digit = 10.0 ** -len(model.active.partition(".")[2])
    is_printed = active / 1e9 - digit < printed <= active / 1e9 + digit / 2
    assert active / 1e9 == pytest.approx(printed, rel=0.005) or (
        is_printed and len(model.active.replace(".", "")) == 2
    )


def test_a_published_number_that_is_wrong_is_noticed():
    count = count_parameters(
        parse(["--config", "qwen3-30b-a3b", "--num-layers", "47", "--dry-run"])
    )
    assert count.total != pytest.approx(30.5e9, rel=0.005)


def test_every_recipe_has_all_its_files():
    names = [model.name for model in MODELS]
    assert {*names, "quickstart"} <= set(models())
    for name in names:
        assert {"h100", "h200", "gb200", "mi250x"} == set(machines(name))


def test_a_model_file_holds_no_layout_and_a_layout_nothing_else():
    of_layouts = set().union(*(keys_of(path) for path in LAYOUTS))
    for model in MODELS:
        assert keys_of(CONFIGS / f"{model.name}.yaml") & of_layouts == {"micro-batch-size"}


@pytest.mark.parametrize("path", LAYOUTS, ids=lambda path: path.stem)
def test_its_first_lines_say_how_many_nodes(path):
    found = re.search(r"on (\d+) (?:nodes|trays) of (\d+) (\w+)", path.read_text())
    per_node = 8 if "MI250X" in found[3] else int(found[2])
    assert int(found[1]) * per_node == ranks_of(path)


@pytest.mark.parametrize("path", LAYOUTS, ids=lambda path: path.stem)
def test_its_worst_stage_fits_by_the_planner(path):
    """With 20% more tokens than even on the busiest rank, and a tenth of the memory left."""
    cluster, capacity = MACHINES[path.stem.split(".")[-1]]
    cfg = parse(["--config", path.stem, "--world-size", str(ranks_of(path)), "--dry-run"], {})
    assert worst(all_stages(cfg, IMBALANCE, load(cluster))).total < 0.9 * capacity
