"""What is wrong with a folder is one FATAL line that names it, and nothing is written."""

import json

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")

from safetensors.torch import load_file, save_file

from megatron_ext.hf import memory
from megatron_ext.hf.__main__ import main
from megatron_ext.mesh.forks import run_ranks
from tests.hf.families import random_model, save

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A saved Mixtral in several shards."""
    return save(random_model("mixtral"), tmp_path_factory.mktemp("hf") / "model")


@pytest.fixture
def folder(source, tmp_path):
    """A copy that a test may damage."""
    copy = tmp_path / "model"
    copy.mkdir()
    for file in source.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    return copy


def _shard_of(folder, name):
    return folder / json.loads((folder / INDEX).read_text())["weight_map"][name]


def _config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _change(folder, name, make):
    """Replace (or with None: remove) a tensor in its shard, leaving the index alone."""
    path = _shard_of(folder, name)
    tensors = load_file(path)
    made = make(tensors.pop(name))
    save_file({**tensors, **({} if made is None else {name: made})}, path)


ROUTER = "model.layers.1.block_sparse_moe.gate.weight"


def no_config(folder):
    (folder / "config.json").unlink()
    return "no config.json"


def broken_config(folder):
    (folder / "config.json").write_text("{")
    return "config.json cannot be read"


def unknown_family(folder):
    _config(folder, model_type="llama")
    return "model_type 'llama' is not supported"


def no_index(folder):
    (folder / INDEX).unlink()
    return "no model.safetensors"


def missing_shard(folder):
    path = _shard_of(folder, ROUTER)
    path.unlink()
    return f"shard {path.name} is missing"


def cut_shard(folder):
    path = _shard_of(folder, ROUTER)
    path.write_bytes(path.read_bytes()[:-8])
    return f"shard {path.name} is damaged"


def missing_tensor(folder):
    _change(folder, ROUTER, lambda tensor: None)
    return ROUTER


def missing_layer(folder):
    _config(folder, num_hidden_layers=3)
    return "lacks 19 of 60 tensors, as model.layers.2."


def extra_tensors(folder):
    _config(folder, num_hidden_layers=1)
    return "holds 19 tensors that this architecture has not"


def wrong_shape(folder):
    _change(folder, ROUTER, lambda tensor: tensor[:3].clone())
    return f"{ROUTER} is (3, 32), config.json says (4, 32)"


def other_dtype(folder):
    name = "model.layers.0.self_attn.k_proj.weight"
    _change(folder, name, lambda tensor: tensor.to(torch.bfloat16))
    return "dtypes torch.float32, torch.bfloat16"


def quantised(folder):
    _change(folder, "model.norm.weight", lambda tensor: tensor.to(torch.float8_e4m3fn))
    return "is quantised"


def index_out_of_the_folder(folder):
    table = json.loads((folder / INDEX).read_text())
    table["weight_map"][ROUTER] = "../secret.safetensors"
    (folder / INDEX).write_text(json.dumps(table))
    return "names a file outside its folder"


DAMAGES = [
    no_config,
    broken_config,
    unknown_family,
    no_index,
    missing_shard,
    cut_shard,
    missing_tensor,
    missing_layer,
    extra_tensors,
    wrong_shape,
    other_dtype,
    quantised,
    index_out_of_the_folder,
]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_one_line_names_it_and_nothing_is_written(damage, folder, tmp_path, capsys):
    words = damage(folder)
    with pytest.raises(SystemExit) as end:
        main(["import", "--model", str(folder), "--save", str(tmp_path / "out")])
    assert end.value.code == 65
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("FATAL 65") and words in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_a_model_larger_than_memory_is_refused_before_it_is_read(
    folder, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(memory, "available_bytes", lambda: 1000)
    for words in (["import", "--save", str(tmp_path / "out")], ["check"]):
        with pytest.raises(SystemExit) as end:
            main([*words, "--model", str(folder)])
        assert end.value.code == 65
        assert "1000 bytes are available" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def _import(folder, out):
    main(["import", "--model", str(folder), "--save", str(out)])


def test_a_read_error_in_the_middle_leaves_nothing(folder, tmp_path, monkeypatch):
    from megatron_ext.errors import DataError
    from megatron_ext.hf.importer import import_folder, plan_import
    from megatron_ext.hf.shards import Shards

    plan, reads, stock = plan_import(folder), [], Shards.read

    def read(self, name, index=None):
        reads.append(name)
        if len(reads) == 30:
            raise DataError("planted", path=folder)
        return stock(self, name, index)

    monkeypatch.setattr(Shards, "read", read)
    with pytest.raises(DataError, match="planted"):
        import_folder(plan, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_a_folder_in_use_is_not_touched(folder, tmp_path, capsys):
    out = tmp_path / "out"
    run_ranks(_import, 1, folder, out)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    for words in (
        ["import", "--model", str(folder), "--save", str(out)],
        ["export", "--load", str(out), "--model", str(folder)],
    ):
        with pytest.raises(SystemExit) as end:
            main(words)
        assert end.value.code == 65
        assert "is there already" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_a_second_head_of_a_tied_model_must_be_the_embedding(tmp_path):
    from megatron_ext.errors import DataError
    from megatron_ext.hf.importer import plan_import

    folder = save(random_model("mixtral-window-tied"), tmp_path / "model")
    name = "model.embed_tokens.weight"
    path = _shard_of(folder, name)
    tensors = load_file(path)
    table = json.loads((folder / INDEX).read_text())
    table["weight_map"]["lm_head.weight"] = path.name
    (folder / INDEX).write_text(json.dumps(table))
    save_file({**tensors, "lm_head.weight": tensors[name].clone()}, path)
    assert plan_import(folder)
    save_file({**tensors, "lm_head.weight": tensors[name] + 1}, path)
    with pytest.raises(DataError, match=r"lm_head\.weight is not the embedding"):
        plan_import(folder)


def test_a_multi_token_prediction_layer_is_left_out_on_demand(tmp_path):
    from megatron_ext.errors import DataError
    from megatron_ext.hf.importer import plan_import

    folder = save(random_model("deepseek_v3"), tmp_path / "model")
    _config(folder, num_hidden_layers=2)  # the third layer stands for the prediction layer
    with pytest.raises(DataError, match="--without-mtp"):
        plan_import(folder)
    plan = plan_import(folder, without_mtp=True)
    assert len(plan.notes) == 1 and "multi-token-prediction" in plan.notes[0]
