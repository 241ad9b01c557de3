"""A checkpoint that is missing, damaged, hostile or of another model: one error on all ranks, or
the next best step.
"""

import pickle
import shutil

import pytest

from megatron_ext.checkpoint import folder as layout
from megatron_ext.checkpoint.loader import read_metadata
from megatron_ext.checkpoint.lock import Lease
from megatron_ext.errors import DataError, Fatal
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


def _flip_size(path):
    shard = next(path.glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-100])


def _remove_record(path):
    (path / "state.json").unlink()


def _garbage_metadata(path):
    size = (path / ".metadata").stat().st_size
    (path / ".metadata").write_bytes(b"\x00" * size)


def _garbage_shard(path):
    """The right size and the wrong bytes: only reading finds it."""
    shard = next(path.glob("*.distcp"))
    shard.write_bytes(b"\x55" * shard.stat().st_size)


@pytest.mark.parametrize(
    "damage",
    [_flip_size, _remove_record, _garbage_metadata, _garbage_shard],
    ids=lambda f: f.__name__,
)
def test_a_damaged_step_falls_back_to_the_one_before(copied, damage):
    damage(copied / "step_00000002")
    assert _outcomes(copied) == [(1, 0, "")] * 2
    _one_message(_outcomes(copied, world_size=1, ckpt_step=2), 65, "checkpoint", "step_00000002")


def test_all_steps_damaged(copied):
    _flip_size(copied / "step_00000001")
    _flip_size(copied / "step_00000002")
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
    _one_message(outcomes, 73, "another run saves into this folder", "pid")


def test_a_folder_that_cannot_be_written_is_refused_on_all_ranks(tmp_path):
    (tmp_path / "file").write_text("")
    outcomes = _outcomes(None, own=tmp_path / "file" / "ckpt")
    _one_message(outcomes, 74, "cannot write the checkpoint", str(tmp_path / "file"))


class _Hostile:
    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return (open, (str(self.canary), "w"))


def test_nothing_is_executed_while_metadata_is_read(saved, tmp_path):
    assert len(read_metadata(saved / "step_00000001").state_dict_metadata) > 100
    canary = tmp_path / "canary"
    (tmp_path / ".metadata").write_bytes(pickle.dumps(_Hostile(canary)))
    with pytest.raises(DataError, match="open does not belong into a checkpoint"):
        read_metadata(tmp_path)
    assert not canary.exists()


def test_metadata_cannot_name_files_elsewhere(saved, tmp_path):
    metadata = read_metadata(saved / "step_00000001")
    next(iter(metadata.storage_data.values())).relative_path = "../../secret"
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(DataError, match="outside its folder"):
        read_metadata(tmp_path)


def test_no_step_is_called_complete_by_its_name_alone(tmp_path):
    (tmp_path / layout.step_name(5)).mkdir()
    _one_message(_outcomes(tmp_path, world_size=1), 65, "incomplete", "state.json is missing")
