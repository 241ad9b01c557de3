"""Damaged and hostile checkpoints: all refused before a tensor is made, with file and offset."""

import json
import os
import resource

import pytest

from megatron_ext.checkpoint import commands, folder
from megatron_ext.checkpoint.hashes import text_hash
from megatron_ext.checkpoint.manifest import MANIFEST
from megatron_ext.checkpoint.reader import StoredTensors, object_of
from megatron_ext.errors import DataError
from tests.checkpoint.small_disk import write_step

FILE = "rank_00000.safetensors"


def _refused(path, *words):
    with pytest.raises(DataError) as caught:
        StoredTensors(path)
    text = str(caught.value)
    assert caught.value.code == 65 and "\n" not in text and "path=" in text
    assert all(word in text for word in words), text


def test_one_bit_in_every_64_kib(tmp_path):
    path = write_step(tmp_path, 1, 1.0, ranks=1, rows=80000)
    size = (path / FILE).stat().st_size
    assert size > 16 << 20
    with open(path / FILE, "r+b") as file:
        for offset in range(0, size, 64 << 10):
            file.seek(offset)
            byte = file.read(1)[0]
            file.seek(offset)
            file.write(bytes([byte ^ 0x10]))
            file.flush()
            _refused(
                path, FILE, f"offset={offset // (4 << 20) * (4 << 20)}", "expected=", "actual="
            )
            file.seek(offset)
            file.write(bytes([byte]))
            file.flush()
    StoredTensors(path)


def test_one_bit_in_every_byte_of_the_manifest(tmp_path):
    path = write_step(tmp_path, 1, 1.0)
    good = (path / MANIFEST).read_bytes()
    for offset in range(len(good) - 1):
        (path / MANIFEST).write_bytes(
            good[:offset] + bytes([good[offset] ^ 1]) + good[offset + 1 :]
        )
        try:
            stored = StoredTensors(path)
        except DataError:
            continue
        assert offset < good.index(b"\n") + 1, "only around the hash itself may a bit not matter"
        assert stored.read("weight").sum() > 0


def test_swapped_missing_and_extra_files(tmp_path):
    path = write_step(tmp_path, 1, 1.0)
    one, other = path / FILE, path / "rank_00001.safetensors"
    one.rename(path / "x")
    other.rename(one)
    (path / "x").rename(other)
    _refused(path, FILE, "expected=")
    other.unlink()
    _refused(path, "rank_00001.safetensors is missing")
    path = write_step(tmp_path, 2, 1.0)
    (path / "more.bin").write_text("")
    _refused(path, "'more.bin'")


def _rewrite(path, change):
    """Change a manifest as somebody would who can compute its hash."""
    body = json.loads((path / MANIFEST).read_text())["manifest"]
    change(body)
    text = f'"manifest": {json.dumps(body)}}}\n'.encode()
    (path / MANIFEST).write_bytes(f'{{"hash": "{text_hash(text)}",\n'.encode() + text)


def _rename_file(name):
    def change(body):
        body["files"][name] = body["files"].pop(FILE)

    return change


def _set(key, value):
    def change(body):
        body["tensors"]["weight"][key] = value

    return change


def _huge(body):
    body["tensors"]["weight"]["shape"] = [10**9, 64]


def _huge_piece(body):
    body["tensors"]["weight"]["shape"] = [10**9, 64]
    body["tensors"]["weight"]["pieces"] = [[0, 0, [0, 0], [10**9, 64]]]


def _shared_bytes(body):
    pieces = body["tensors"]["weight"]["pieces"]
    pieces[1][:2] = pieces[0][:2]


def _gap(body):
    body["tensors"]["weight"]["pieces"].pop()


def _large_file(body):
    body["files"][FILE]["bytes"] = 1 << 50


HOSTILE = {
    "parent": _rename_file("../../secret"),
    "absolute": _rename_file("/etc/passwd"),
    "nul": _rename_file("rank_00000.safetensors\0"),
    "huge shape": _huge,
    "huge piece": _huge_piece,
    "many dims": _set("shape", [1] * 10**4),
    "negative": _set("shape", [-1, 64]),
    "float": _set("shape", [128.0, 64]),
    "dtype": _set("dtype", "os.system"),
    "shared bytes": _shared_bytes,
    "gap": _gap,
    "large file": _large_file,
    "no number": _set("pieces", [["a", "b", "c", "d"]]),
    "no tensors": lambda body: body.update(tensors=[]),
    "another version": lambda body: body.update(version=99),
    "another format": lambda body: body.update(format="elsewhere"),
    "step": lambda body: body.update(step="1"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_manifests(name, tmp_path):
    path = write_step(tmp_path, 1, 1.0)
    _rewrite(path, HOSTILE[name])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    _refused(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10


def test_deep_nesting_and_links(tmp_path):
    path = write_step(tmp_path, 1, 1.0)
    text = b'"manifest": ' + b"[" * 200000 + b"]" * 200000 + b"}\n"
    (path / MANIFEST).write_bytes(f'{{"hash": "{text_hash(text)}",\n'.encode() + text)
    _refused(path, MANIFEST)
    path = write_step(tmp_path, 2, 1.0)
    (path / FILE).rename(tmp_path / "elsewhere")
    (path / FILE).symlink_to(tmp_path / "elsewhere")
    _refused(path, FILE)
    (tmp_path / "step_00000003").symlink_to(write_step(tmp_path / "other", 3, 1.0))
    _refused(tmp_path / "step_00000003", "symbolic link")
    path = write_step(tmp_path, 4, 1.0)
    (path / FILE).unlink()
    os.mkfifo(path / FILE)
    _refused(path, "not a regular file")


def test_an_extra_state_that_would_run_something_is_refused(tmp_path):
    import pickle

    import torch

    class Hostile:
        def __reduce__(self):
            return (open, (str(tmp_path / "canary"), "w"))

    for protocol in range(6):
        raw = torch.frombuffer(
            bytearray(pickle.dumps(Hostile(), protocol=protocol)), dtype=torch.uint8
        )
        with pytest.raises(DataError, match="refused"):
            object_of(raw, raw, tmp_path)
    plain = torch.frombuffer(bytearray(pickle.dumps({"scale": [1.0]}, 2)), dtype=torch.uint8)
    assert object_of(plain, plain, tmp_path) is plain
    assert not (tmp_path / "canary").exists()


def test_the_command_line_names_what_is_wrong(tmp_path, capsys):
    path = write_step(tmp_path, 1, 1.0)
    for step in (2, 3, 4):
        write_step(tmp_path, step, float(step))
    commands.verify(tmp_path, None)
    assert capsys.readouterr().out.count("verified") == 4
    assert not commands.diff(path, tmp_path / "step_00000002")
    assert "weight: max_abs_difference=1.000e+00" in capsys.readouterr().out
    commands.prune(tmp_path, 2, None, is_dry=True)
    assert "would delete: 1, 2" in capsys.readouterr().out
    commands.prune(tmp_path, 1, 2, is_dry=False)
    assert folder.steps(tmp_path) == [4, 2]
    shard = tmp_path / "step_00000004" / FILE
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    with pytest.raises(DataError, match=f"{FILE} offset=0"):
        commands.verify(tmp_path, 4)
