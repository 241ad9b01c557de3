"""A checkpoint that is missing, damaged, hostile or of another model: one error on all ranks, or
the next best step.
"""

import errno
import os
import shutil

import pytest

from megatron_ext.checkpoint import folder as layout
from megatron_ext.checkpoint.lock import Lease
from megatron_ext.errors import Fatal
from tests.checkpoint.small_run import PP2, checkpointer, small_run
from tests.ranks.harness import run_ranks


def _save(folder):
    with small_run("") as run, checkpointer(folder) as saver:
        for _ in range(2):
            run.step()
            saver.save(run.state)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Steps 1 and 2 of a run on one rank; copy it before changing it."""
    folder = tmp_path_factory.mktemp("saved") / "ckpt"
    run_ranks(_save, 1, folder)
    return folder


@pytest.fixture
def copied(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "ckpt")
    return tmp_path / "ckpt"


def _load(flags, folder, own, changed):
    """(step that was loaded or None, exit code, text) of this rank."""
    with small_run(flags) as run:
        try:
            with checkpointer(own, folder, **changed) as loader:
                return loader.load(run.state) and run.state.progress.step, 0, ""
        except Fatal as error:
            return None, error.code, "".join(error.lines())


def _outcomes(folder, flags="", own=None, world_size=2, **changed):
    return run_ranks(_load, world_size, flags, folder, own, changed)


def _one_message(outcomes, code, *words):
    """All ranks end with the code, exactly one of them says why."""
    assert [outcome[1] for outcome in outcomes] == [code] * len(outcomes)
    (text,) = [outcome[2] for outcome in outcomes if outcome[2]]
    assert all(word in text for word in words), text
    assert "\n" not in text


def test_an_empty_folder_is_refused_unless_allowed(tmp_path):
    empty = tmp_path / "empty"
    _one_message(_outcomes(empty), 65, "no checkpoint", "--allow-fresh-start", str(empty))
    assert _outcomes(empty, world_size=1, allow_fresh_start=True) == [(False, 0, "")]
    assert _outcomes(empty, world_size=1, own=empty) == [(False, 0, "")]


def test_an_asked_step_must_be_there(saved):
    assert _outcomes(saved, world_size=1, ckpt_step=1) == [(1, 0, "")]
    _one_message(
        _outcomes(saved, world_size=1, ckpt_step=7), 65, "--ckpt-step 7", "use one of: 2, 1"
    )


def _shard(path):
    return path / "rank_00000.safetensors"


def _cut(path):
    _shard(path).write_bytes(_shard(path).read_bytes()[:-100])


def _remove_manifest(path):
    (path / "manifest.json").unlink()


def _garbage_manifest(path):
    size = (path / "manifest.json").stat().st_size
    (path / "manifest.json").write_bytes(b"\x00" * size)


def _one_bit(path):
    """The right size and one wrong bit: only its hash finds it."""
    data = bytearray(_shard(path).read_bytes())
    data[len(data) // 2] ^= 4
    _shard(path).write_bytes(data)


def _shard_of_another_step(path):
    shutil.copy(_shard(path.with_name("step_00000001")), _shard(path))


@pytest.mark.parametrize(
    "damage",
    [_cut, _remove_manifest, _garbage_manifest, _one_bit, _shard_of_another_step],
    ids=lambda f: f.__name__,
)
def test_a_damaged_step_falls_back_to_the_one_before(copied, damage):
    damage(copied / "step_00000002")
    assert _outcomes(copied) == [(1, 0, "")] * 2
    _one_message(_outcomes(copied, world_size=1, ckpt_step=2), 65, "checkpoint", "step_00000002")
    assert _outcomes(copied, own=copied) == [(1, 0, "")] * 2, "of the run's own: moved aside"
    assert [path.name[:17] for path in copied.glob("*.bad-*")] == ["step_00000002.bad"]
    assert not (copied / "step_00000002").exists()


def test_all_steps_damaged(copied):
    _cut(copied / "step_00000001")
    _cut(copied / "step_00000002")
    _one_message(_outcomes(copied, own=copied), 65, "damaged", "step_00000001", "was written with")


def test_latest_is_not_needed_and_wins_over_newer_steps(copied):
    (copied / "latest").unlink()
    assert _outcomes(copied, world_size=1) == [(2, 0, "")]
    (copied / "latest").write_text("step_00000001\n")
    assert _outcomes(copied, world_size=1) == [(1, 0, "")]


def test_another_model_does_not_fit(saved):
    wider = "--moe-ffn-hidden-size 64"
    _one_message(
        _outcomes(saved, wider, world_size=1), 64, "fc1_weight", "in this model", "model flags"
    )
    deeper = f"--num-layers 6 --moe-layer-freq ([0]*1+[1]*5) {PP2}"
    _one_message(_outcomes(saved, deeper), 64, "the checkpoint has no decoder.layers")
    shallower = "--num-layers 2 --moe-layer-freq ([0]*1+[1]*1)"
    _one_message(
        _outcomes(saved, shallower, world_size=2), 64, "weights that this model has not", "layers.2"
    )


def test_a_folder_in_use_is_refused_on_all_ranks(tmp_path):
    lease = Lease(tmp_path / "ckpt")
    lease.take()
    outcomes = _outcomes(None, own=tmp_path / "ckpt")
    lease.release()
    _one_message(outcomes, 73, "another run holds this folder", "pid")


def test_a_folder_that_cannot_be_written_is_refused_on_all_ranks(tmp_path):
    (tmp_path / "file").write_text("")
    outcomes = _outcomes(None, own=tmp_path / "file" / "ckpt")
    _one_message(outcomes, 74, "cannot write into the folder", str(tmp_path / "file"))


def test_no_step_is_called_complete_by_its_name_alone(tmp_path):
    (tmp_path / layout.step_name(5)).mkdir()
    _one_message(_outcomes(tmp_path, world_size=1), 65, "incomplete", "manifest.json is missing")


def _load_from_a_failing_disk(folder, call, name, error, times):
    """The disk refuses `call` on files of this name: (what `_load` finds, seconds waited)."""
    from megatron_ext.checkpoint import patience

    left, waited, stock = [times], [], getattr(os, call)
    opened: dict[int, str] = {}
    stock_open = os.open

    def open_(path, *args, **kwargs):
        descriptor = stock_open(path, *args, **kwargs)
        opened[descriptor] = str(path)
        return descriptor

    def refuse(target, *args, **kwargs):
        path = opened.get(target, "") if isinstance(target, int) else str(target)
        if path.endswith(name) and "step_00000002" in path and left[0] > 0:
            left[0] -= 1
            raise OSError(error, os.strerror(error), path)
        return (open_ if call == "open" else stock)(target, *args, **kwargs)

    os.open = open_
    setattr(os, call, refuse)
    patience.time.sleep = waited.append
    return _load("", folder, folder, {}), waited


REFUSALS = [
    ("open", "rank_00000.safetensors", errno.ESTALE),
    ("open", "rank_00000.safetensors", errno.EACCES),
    ("open", "manifest.json", errno.ESTALE),
    ("preadv", "rank_00000.safetensors", errno.EIO),
    ("listdir", "step_00000002", errno.EIO),
    ("stat", "step_00000002", errno.ESTALE),
    ("stat", "step_00000002", errno.EACCES),
]


@pytest.mark.parametrize(("call", "name", "error"), REFUSALS)
def test_a_read_error_is_tried_again_and_costs_no_step(copied, call, name, error):
    ((found, waited),) = run_ranks(_load_from_a_failing_disk, 1, copied, call, name, error, 1)
    assert found == (2, 0, "") and waited == [0.2]
    assert layout.steps(copied) == [2, 1]


@pytest.mark.parametrize(("call", "name", "error"), REFUSALS)
def test_a_disk_that_goes_on_refusing_is_reported_and_the_checkpoint_left_alone(
    copied, call, name, error
):
    """Not the older step: four steps would be lost to a file server that was away."""
    before = sorted(path.name for path in copied.iterdir())
    ((found, waited),) = run_ranks(_load_from_a_failing_disk, 1, copied, call, name, error, 99)
    step, code, text = found
    assert (step, code) == (None, 74) and "it is left as it is" in text and len(waited) == 3
    assert sorted(path.name for path in copied.iterdir()) == before
