"""Import, train on two ranks, export: transformers computes what our model computes."""

import json
import shutil

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


IDS = {"bos_token_id": 5, "eos_token_id": [7, 9], "pad_token_id": 3}
SMALL_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")


def _with_words(folder):
    """The folder with a tokenizer, a generation config and ids that no default has."""
    vocabulary = {f"w{number}": number for number in range(90)} | {"<|end|>": 90}
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "w0"}
    values = {"version": "1.0", "added_tokens": [], "model": model}
    values |= dict.fromkeys(
        ("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder")
    )
    (folder / "tokenizer.json").write_text(json.dumps(values))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|end|>"}')
    (folder / "generation_config.json").write_text('{"top_k": 17}')
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | IDS | {"router_aux_loss_coef": 0.25}))
    return folder


def _config(folder):
    return json.loads((folder / "config.json").read_text())


def _check_words(folder, trained, tmp_path):
    """Ids, tokenizer and generation config go through; also the ids once the import is gone."""
    back = tmp_path / "back"
    for name in SMALL_FILES:
        assert (back / name).read_text() == (folder / name).read_text(), name
    shutil.rmtree(tmp_path / "ours")
    said = []
    export_folder(trained, tmp_path / "again", note=said.append)
    assert any("imported folder is gone" in line for line in said)
    for made in (_config(back), _config(tmp_path / "again")):
        assert {name: made[name] for name in IDS} == IDS
        assert made["router_aux_loss_coef"] == 0.25


def test_a_tokenizer_of_the_run_itself(tmp_path):
    """Trained on another tokenizer than the imported one, or on none: no id of the import's."""
    folder = _with_words(save(random_model("mixtral"), tmp_path / "model"))
    path = import_folder(plan_import(folder), tmp_path / "ours")
    own = tmp_path / "own"
    own.mkdir()
    text = (folder / "tokenizer.json").read_text().replace("<|end|>", "</s>")
    (own / "tokenizer.json").write_text(text)
    flags = ["--config", str(path), *RUN.split(), "--device", "cpu", "--moe-aux-loss-coeff", "0.5"]
    flags += ["--tokenizer-model", str(own), "--train-iters", "1", "--load", str(tmp_path / "ours")]
    run_ranks(pretrain, 1, [*flags, "--finetune", "--run-dir", str(tmp_path / "run")])
    export_folder(tmp_path / "run" / "checkpoints", tmp_path / "back")
    made = _config(tmp_path / "back")
    assert [made[name] for name in IDS] == [None, 90, None]
    assert made["router_aux_loss_coef"] == 0.5
    assert (tmp_path / "back/tokenizer.json").read_text() == text
    assert not (tmp_path / "back/generation_config.json").exists()


@pytest.mark.parametrize(("variant", "dtype"), [("deepseek_v3", "fp32"), ("qwen2_moe", "bf16")])
def test_a_trained_import_goes_back(variant, dtype, tmp_path):
    kind = torch.float32 if dtype == "fp32" else torch.bfloat16
    folder = _with_words(save(random_model(variant), tmp_path / "model", kind))
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
    if variant == "qwen2_moe":
        _check_words(folder, trained, tmp_path)
