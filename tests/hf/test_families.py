"""Every family: logits and gradients are those of transformers, and what was imported comes back
bit for bit.
"""

import json

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")

from megatron_ext.hf.exporter import export_folder
from megatron_ext.hf.importer import import_folder, plan_import
from megatron_ext.hf.shards import Shards
from megatron_ext.mesh.forks import run_ranks
from tests.hf.families import VARIANTS, random_model, save
from tests.hf.measure import compare


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_and_gradients_are_those_of_transformers(variant, tmp_path):
    (found,) = run_ranks(compare, 1, variant, tmp_path, True)
    print(variant, found)
    assert found["scale"] > 0.5  # logits that differ between tokens
    assert found["logits"] < 1e-4
    assert found["gradient"] < 1e-4, found["name"]
    assert found["compared"] >= 0.9 * found["tensors"]


def _bits(shards: Shards) -> dict[str, tuple]:
    return {
        name: (stored.dtype, stored.shape, shards.read(name).view(torch.uint8).numpy().tobytes())
        for name, stored in shards.tensors.items()
    }


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_export_of_import_is_bit_for_bit_the_same(variant, dtype, tmp_path):
    folder = save(random_model(variant), tmp_path / "theirs", dtype)
    import_folder(plan_import(folder), tmp_path / "ours")
    export_folder(tmp_path / "ours", tmp_path / "back", largest_shard=30_000)
    assert _bits(Shards(tmp_path / "back")) == _bits(Shards(folder))
    index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config["dtype"] == str(dtype).removeprefix("torch.")
