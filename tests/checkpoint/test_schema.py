"""Manifests that are impossible and rightly hashed: refused by `verify` and by a load alike."""

from __future__ import annotations

import copy
import json
import math
import random
import shutil

import pytest

from megatron_ext.checkpoint import commands, folder
from megatron_ext.checkpoint.hashes import Damaged, text_hash
from megatron_ext.errors import DataError, Fatal
from tests.checkpoint.small_run import checkpointer, small_run
from tests.ranks.harness import run_ranks

HOSTILE = (-1, 1 << 70, 10**18, -0.5, math.nan, math.inf, "many", "", None, [], {}, True, [[]])


def _save(where):
    with small_run("") as run, checkpointer(where) as saver:
        for _ in range(2):
            run.step()
            saver.save(run.state)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    where = tmp_path_factory.mktemp("saved") / "ckpt"
    run_ranks(_save, 1, where)
    return where


def _body(step):
    return json.loads(b"{" + (step / "manifest.json").read_bytes().partition(b"\n")[2])


def _write(step, body):
    text = f'"manifest": {json.dumps(body)}}}\n'.encode()
    data = f'{{"hash": "{text_hash(text)}",\n'.encode() + text
    (step / "manifest.json").write_bytes(data)


def _leaves(value, path=()):
    """Paths of all values that are no object or list, of the first tensor only."""
    if isinstance(value, dict):
        for name, entry in value.items():
            yield from _leaves(entry, (*path, name))
    else:
        yield path


def _changed(body, path, value):
    body = copy.deepcopy(body)
    place = body
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = value
    return body


def _mutations(step):
    """(path, value, body): every number of the record with every hostile value, and a draw of
    files and tensors.
    """
    body = _body(step)["manifest"]
    generator = random.Random(13)
    record = {name: value for name, value in body.items() if name not in ("tensors", "run")}
    paths = [*_leaves(record), *((part,) for part in record)]
    tensors = list(_leaves(body["tensors"], ("tensors",)))
    for path in [*paths, *generator.sample(tensors, 12)]:
        for value in generator.sample(HOSTILE, 6):
            yield path, value, _changed(body, path, value)


def test_verify_takes_no_impossible_number(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "ckpt")
    step = tmp_path / "ckpt" / folder.step_name(2)
    commands.check(step)
    tried = refused = 0
    for path, value, body in _mutations(step):
        _write(step, body)
        tried += 1
        try:
            commands.check(step)
        except DataError as error:
            refused += 1
            assert error.code == 65
            continue
        is_counter = path[0] in ("step", "progress") or "bytes" in path[-1]
        assert not is_counter or type(value) is int and 0 <= value < 1 << 62, (path, value)
        assert value is not math.inf and not (isinstance(value, float) and value < 0), (path, value)
    assert tried > 300 and refused > 0.7 * tried


CASES = [
    (("files", "rank_00000.safetensors", "block_bytes"), 10**18),
    (("progress", "step"), "two"),
    (("progress", "step"), -3),
    (("progress", "consumed_samples"), -8),
    (("progress", "consumed_tokens"), 1.5),
    (("scheduler", "max_lr"), math.nan),
    (("scheduler", "num_steps"), -1),
    (("scheduler", "lr_decay_style"), 7),
    (("optimizer", "step"), None),
    (("optimizer",), []),
    (("layout", "tp"), "two"),
    (("model", "num_layers"), -4),
    (("run", "fingerprint"), "no"),
]


LEFT_OUT = [
    ("optimizer",),
    ("scheduler",),
    ("optimizer", "step"),
    ("optimizer", "grad_scaler"),
    ("progress", "step"),
    ("progress", "consumed_samples"),
    ("scheduler", "min_lr"),
    ("scheduler", "wd_incr_steps"),
    ("layout",),
    ("run",),
    ("extra",),
]


def _without(body, path):
    body = copy.deepcopy(body)
    place = body
    for name in path[:-1]:
        place = place[name]
    del place[path[-1]]
    return body


@pytest.mark.parametrize("path", LEFT_OUT)
def test_a_part_that_is_not_there_is_damage(saved, tmp_path, path):
    """Not a KeyError in who needs it."""
    shutil.copytree(saved, tmp_path / "ckpt")
    step = tmp_path / "ckpt" / folder.step_name(2)
    _write(step, _without(_body(step)["manifest"], path))
    with pytest.raises(Damaged, match=path[-1]):
        commands.check(step)


def _load_each(where):
    """What a load of each of CASES as the newest step ends with."""
    step, found = where / folder.step_name(2), []
    whole = _body(step)["manifest"]
    with small_run("") as run:
        for path, value in CASES:
            _write(step, _changed(whole, path, value))
            try:
                with checkpointer(None, where) as loader:
                    loader.load(run.state)
                found.append(run.state.progress.step)
            except Fatal as error:
                found.append(error)
    return found


def test_a_load_goes_to_the_older_step_as_with_any_damage(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "ckpt")
    assert run_ranks(_load_each, 1, tmp_path / "ckpt") == [[1] * len(CASES)]


@pytest.mark.parametrize(("path", "value"), CASES)
def test_the_value_is_named(saved, tmp_path, path, value):
    shutil.copytree(saved, tmp_path / "ckpt")
    step = tmp_path / "ckpt" / folder.step_name(2)
    _write(step, _changed(_body(step)["manifest"], path, value))
    with pytest.raises(Damaged) as error:
        commands.check(step)
    assert path[-1] in str(error.value) or "bytes a block" in str(error.value)
