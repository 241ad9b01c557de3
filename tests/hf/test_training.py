"""Import, train on two ranks, export: transformers computes what our model computes."""

import numpy as np
import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")

from megatron_ext.hf.check import reference_logits
from megatron_ext.hf.exporter import export_folder
from megatron_ext.hf.importer import import_folder, plan_import
from megatron_ext.hf.logits import logits_on_rank
from megatron_ext.hf.shards import Shards
from megatron_ext.mesh.forks import run_ranks
from tests.hf.families import random_model, save
from tests.ranks.tiny import pretrain, read_metrics

LAYOUT = "--expert-model-parallel-size 2 --use-distributed-optimizer --device cpu".split()
RUN = "--mock-data --global-batch-size 4 --train-iters 3 --lr 1e-2 --eval-iters 0 --log-interval 1"


@pytest.mark.parametrize(("variant", "dtype"), [("deepseek_v3", "fp32"), ("qwen2_moe", "bf16")])
def test_a_trained_import_goes_back(variant, dtype, tmp_path):
    kind = torch.float32 if dtype == "fp32" else torch.bfloat16
    folder = save(random_model(variant), tmp_path / "model", kind)
    path = import_folder(plan_import(folder), tmp_path / "ours")
    flags = ["--config", str(path), "--run-dir", str(tmp_path / "run"), *RUN.split()]
    load = ["--load", str(tmp_path / "ours"), "--finetune"]
    run_ranks(pretrain, 2, [*flags, *LAYOUT, *load])
    assert len(read_metrics(tmp_path / "run")) == 3

    trained = tmp_path / "run" / "checkpoints"
    export_folder(trained, tmp_path / "back")
    before, after = Shards(folder), Shards(tmp_path / "back")
    assert {n: (t.dtype, t.shape) for n, t in before.tensors.items()} == {
        n: (t.dtype, t.shape) for n, t in after.tensors.items()
    }
    moved = [n for n in after.tensors if not torch.equal(before.read(n), after.read(n))]
    assert len(moved) > 0.8 * len(after.tensors)
    tokens = np.random.default_rng(1).integers(0, 99, (2, 24), dtype=np.int64)
    words = [*flags, "--device", "cpu", "--no-bf16"]
    (ours,) = run_ranks(logits_on_rank, 1, words, str(trained), tokens)
    assert np.abs(ours - reference_logits(tmp_path / "back", tokens)).max() < 1e-4
