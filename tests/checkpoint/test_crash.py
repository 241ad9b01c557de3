"""Every state that a crash may leave: the loader finds the old step or the new one, never a mix."""

import random
import shutil

import pytest

from megatron_ext.checkpoint import folder
from megatron_ext.checkpoint.reader import StoredTensors
from megatron_ext.errors import DataError
from tests.checkpoint.small_disk import recorded, replay, write_step


def _value(directory):
    """What a run would load: (step, its values), after the sweep that the lease holder makes."""
    folder.remove_unfinished(directory)
    for step in folder.steps(directory):
        try:
            tensor = StoredTensors(directory / folder.step_name(step)).read("weight")
        except DataError:
            continue
        return step, tuple(sorted(set(tensor.flatten().tolist())))
    return None


def _unsynced(log, end):
    """The writes before `end` that no fsync of their file has made durable."""
    found = {}
    for number, (kind, path, *_) in enumerate(log[:end]):
        if kind in ("write", "cut"):
            found.setdefault(path, []).append(number)
        elif kind == "sync":
            found.pop(path, None)
    return [number for numbers in found.values() for number in numbers]


@pytest.mark.parametrize("same_step", [False, True], ids=["next step", "the same step again"])
def test_every_prefix_and_every_lost_write(same_step, tmp_path):
    old, new = tmp_path / "old", 1 if same_step else 2
    write_step(old, 1, 10.0)
    shutil.copytree(old, tmp_path / "live")
    with recorded(tmp_path / "live") as log:
        write_step(tmp_path / "live", new, 20.0)
    before, after = (1, (10.0, 11.0)), (new, (20.0, 21.0))
    assert [entry[0] for entry in log].count("sync") >= 5
    chance, seen, tried = random.Random(5), set(), 0
    for end in range(len(log) + 1):
        dirty = _unsynced(log, end)
        lost = [frozenset(), frozenset(dirty)]
        lost += [frozenset(chance.sample(dirty, len(dirty) // 2)) for _ in range(2)]
        for missing in set(lost):
            state = tmp_path / "state"
            shutil.copytree(old, state)
            replay(log[:end], state, missing)
            found = _value(state)
            assert found in (before, after), (end, log[end - 1][:2], missing)
            seen.add(found)
            tried += 1
            shutil.rmtree(state)
    assert seen == {before, after}
    assert found == after and tried > len(log)
