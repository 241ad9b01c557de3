"""Folders appear whole, `latest` moves atomically, and what is damaged says so."""

import errno

import pytest
import torch
from safetensors.torch import load_file

from megatron_ext.checkpoint import folder, manifest, tensor_file
from megatron_ext.checkpoint.reader import StoredTensors
from megatron_ext.checkpoint.spots import Spot
from megatron_ext.checkpoint.staging import Image, Pool
from megatron_ext.checkpoint.writer import write_image
from megatron_ext.errors import DataError, DiskError

SHARD = "rank_00000.safetensors"


def _complete(directory, step, value=1.0):
    """A checkpoint of one small tensor, through the code that converters use."""
    spot = Spot("weight", (4, 5), (0, 0), (4, 5), torch.float32)
    layout = tensor_file.arrange([spot])
    writing = folder.begin(directory, step)
    image = Image(layout.header, [(80, torch.full((4, 5), value))], Pool())
    image.copy()
    files = {SHARD: write_image(image, writing / SHARD)}
    record = {"step": step, "layout": {}, "run": {}, "extra": {}}
    record |= {"progress": {"step": step, "consumed_samples": step}}
    record |= {"optimizer": None, "scheduler": None}
    text = manifest.describe(record, files, iter([(spot, SHARD, layout.places[0][1])]))
    return folder.publish(writing, directory, step, text)


def test_a_step_appears_with_its_pointer(tmp_path):
    path = _complete(tmp_path, 100)
    assert path == tmp_path / "step_00000100"
    assert folder.latest_step(tmp_path) == 100
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "100\n"
    assert manifest.read(path).files[SHARD].num_bytes == (path / SHARD).stat().st_size
    assert load_file(path / SHARD)["weight"].equal(torch.ones(4, 5)), "a standard file"
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "latest",
        "latest_checkpointed_iteration.txt",
        "step_00000100",
    ]


def test_an_unfinished_step_is_no_step_and_is_removed(tmp_path):
    _complete(tmp_path, 3)
    left = folder.begin(tmp_path, 4)
    assert folder.steps(tmp_path) == [3]
    assert folder.remove_unfinished(tmp_path) == [left.name]
    assert folder.steps(tmp_path) == [3]


def test_the_same_step_again_replaces_the_whole_folder(tmp_path):
    _complete(tmp_path, 5, 1.0)
    path = _complete(tmp_path, 5, 2.0)
    assert StoredTensors(path).read("weight", (1, 2), (2, 3)).equal(torch.full((2, 3), 2.0))
    assert folder.remove_unfinished(tmp_path) == []


@pytest.mark.parametrize("text", ["", "nonsense", "step_1", "../step_00000001", "\x00"])
def test_a_damaged_pointer_is_none(tmp_path, text):
    (tmp_path / "latest").write_text(text)
    assert folder.latest_step(tmp_path) is None


def test_steps_are_sorted_by_number(tmp_path):
    for step in (20, 100, 3, 123456789):
        (tmp_path / folder.step_name(step)).mkdir()
    (tmp_path / "step_abc").mkdir()
    (tmp_path / "step_00000007").write_text("a file")
    assert folder.steps(tmp_path) == [123456789, 100, 20, 3]


def test_a_crash_between_the_two_renames_of_a_replacement_loses_nothing(tmp_path):
    path = _complete(tmp_path, 5)
    path.rename(tmp_path / ".replaced_step_00000005_0a1b2c3d")
    folder.remove_unfinished(tmp_path)
    assert folder.steps(tmp_path) == [5]


def test_damage_is_named(tmp_path):
    path = _complete(tmp_path, 1)
    shard = path / SHARD
    good = shard.read_bytes()
    shard.write_bytes(good[:-4])
    with pytest.raises(DataError, match=f"{SHARD} has {len(good) - 4} bytes, was written with"):
        StoredTensors(path)
    shard.write_bytes(good[:-1] + b"x")
    with pytest.raises(DataError, match=f"{SHARD} offset=0 .*expected=[0-9a-f]{{32}} actual="):
        StoredTensors(path)
    shard.unlink()
    with pytest.raises(DataError, match=f"incomplete: {SHARD} is missing"):
        StoredTensors(path)
    (path / manifest.MANIFEST).write_text('{"hash"')
    with pytest.raises(DataError, match="manifest.json"):
        StoredTensors(path)
    (path / manifest.MANIFEST).unlink()
    with pytest.raises(DataError, match="manifest.json is missing"):
        StoredTensors(path)
    (path / "state.json").write_text('{"version": 1}')
    with pytest.raises(DataError, match="format version 1 .*reads version 2"):
        StoredTensors(path)


def test_too_little_space_names_both_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(folder, "free_bytes", lambda path: 1000)
    folder.check_space(tmp_path, 900)
    with pytest.raises(DiskError) as caught:
        folder.check_space(tmp_path, 1000)
    assert caught.value.code == 74
    assert "need 1100 bytes, have 1000 bytes" in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_disk_errors_are_one_line(tmp_path):
    full = folder.disk_error(OSError(errno.ENOSPC, "no"), tmp_path, 5000)
    assert "No space left on device (need 5000 bytes, have" in str(full)
    readonly = folder.disk_error(OSError(errno.EROFS, "no", str(tmp_path / "x")), tmp_path)
    assert "Read-only file system" in str(readonly) and str(tmp_path / "x") in str(readonly)
    assert "\n" not in str(full) + str(readonly)
