"""Steps that `latest` or the ledger names and that are gone: one warning, or a refusal."""

from __future__ import annotations

import os
import shutil
from types import SimpleNamespace

import pytest

from megatron_ext.checkpoint import folder, loader, starting
from megatron_ext.checkpoint.ledger import Ledger
from megatron_ext.checkpoint.lost import lost_steps
from megatron_ext.config import parse
from megatron_ext.errors import DataError
from tests.ranks.tiny import TINY


def _saved(directory, *steps):
    for step in steps:
        (directory / folder.step_name(step)).mkdir(parents=True)
        for event in ("requested", "durable", "verified"):
            Ledger(directory).add(event, step)
        folder.point_at(directory, step)
    return directory


def _remove(path):
    shutil.rmtree(path)


def _pipe(path):
    shutil.rmtree(path)
    os.mkfifo(path)


def _unmounted(path):
    shutil.rmtree(path)
    path.symlink_to("/nowhere/at/all")


@pytest.mark.parametrize("gone", [_remove, _pipe, _unmounted])
def test_an_older_step_is_taken_with_one_warning_that_names_the_lost_one(tmp_path, gone, caplog):
    save = _saved(tmp_path, 4, 8, 12)
    gone(save / folder.step_name(12))
    asked = SimpleNamespace(ckpt_step=None, allow_fresh_start=False)
    found = loader.candidates(asked, save, save, {})
    assert [entry.step for entry in found] == [8, 4]
    (record,) = caplog.records
    assert "names step 12, which is gone; going on from step 8" in record.getMessage()


@pytest.mark.parametrize("named_by", ["latest", "ledger.jsonl"])
def test_without_any_of_the_named_steps_a_start_is_refused(tmp_path, named_by):
    save = _saved(tmp_path / "checkpoints", 4, 8)
    for step in (4, 8):
        shutil.rmtree(save / folder.step_name(step))
    for other in {"latest", "ledger.jsonl"} - {named_by}:
        (save / other).unlink()
    flags = [*TINY, "--run-dir", str(tmp_path)]
    with pytest.raises(DataError) as error:
        starting.plan(parse(flags, {}), {})
    assert error.value.code == 65 and "step 8" in str(error.value)
    assert starting.plan(parse([*flags, "--allow-fresh-start"], {}), {}).step is None
    for own in (save, None):
        asked = SimpleNamespace(ckpt_step=None, allow_fresh_start=False)
        with pytest.raises(DataError, match="step 8"):
            loader.candidates(asked, save, own, {})


def test_what_was_taken_away_on_purpose_is_not_lost(tmp_path):
    save = _saved(tmp_path, 1, 2, 3, 4, 5)
    for step, event in ((1, "pruned"), (2, "quarantined"), (3, "failed"), (5, "abandoned")):
        shutil.rmtree(save / folder.step_name(step))
        Ledger(save).add(event, step)
    folder.point_at(save, 4)
    assert lost_steps(save) == []
    os.rename(save / folder.step_name(4), save / ".replaced_step_00000004_0a1b2c3d")
    assert lost_steps(save) == []  # a kill while a step is saved again: it is given back
    assert lost_steps(tmp_path / "none") == []
