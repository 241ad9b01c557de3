"""Folders appear whole, `latest` moves atomically, and what is damaged says so."""

import errno
import json

import pytest

from megatron_ext.checkpoint import folder
from megatron_ext.errors import DataError, DiskError


def _complete(directory, step, text="weights"):
    writing = folder.begin(directory, step)
    (writing / "__0_0.distcp").write_text(text)
    return folder.finish(writing, directory, {"version": 1, "step": step})


def test_a_step_appears_with_its_pointer(tmp_path):
    path = _complete(tmp_path, 100)
    assert path == tmp_path / "step_00000100"
    assert folder.latest_step(tmp_path) == 100
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "100\n"
    assert folder.read_record(path)["files"] == {"__0_0.distcp": {"bytes": 7}}
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
    _complete(tmp_path, 5, "old")
    path = _complete(tmp_path, 5, "new one")
    assert (path / "__0_0.distcp").read_text() == "new one"
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


def test_damage_is_named(tmp_path):
    path = _complete(tmp_path, 1)
    shard = path / "__0_0.distcp"
    shard.write_text("weig")
    with pytest.raises(DataError, match="__0_0.distcp has 4 bytes, was written with 7"):
        folder.read_record(path)
    shard.unlink()
    with pytest.raises(DataError, match="incomplete: __0_0.distcp is missing"):
        folder.read_record(path)
    (path / folder.RECORD).write_text('{"version"')
    with pytest.raises(DataError, match="record cannot be read"):
        folder.read_record(path)
    (path / folder.RECORD).write_text(json.dumps({"version": 99, "files": {}}))
    with pytest.raises(DataError, match="version 99, this program reads up to 1"):
        folder.read_record(path)


def test_too_little_space_names_both_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(folder, "free_bytes", lambda path: 1000)
    folder.check_space(tmp_path, 900)
    with pytest.raises(DiskError) as caught:
        folder.check_space(tmp_path, 1000)
    assert caught.value.code == 74
    assert "need 1050 bytes, have 1000 bytes" in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_disk_errors_are_one_line(tmp_path):
    full = folder.disk_error(OSError(errno.ENOSPC, "no"), tmp_path, 5000)
    assert "No space left on device (need 5000 bytes, have" in str(full)
    readonly = folder.disk_error(OSError(errno.EROFS, "no", str(tmp_path / "x")), tmp_path)
    assert "Read-only file system" in str(readonly) and str(tmp_path / "x") in str(readonly)
    assert "\n" not in str(full) + str(readonly)
