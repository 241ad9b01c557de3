"""What a start into a folder means: nothing is lost without being asked, and the same command goes
on. Pure: folders are made by hand, as the program and as the version before run.json leave them.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_ext.checkpoint import aside, folder, identity, starting, tiers
from megatron_ext.checkpoint.identity import Identity
from megatron_ext.checkpoint.record import read_record
from megatron_ext.errors import ConfigError
from tests.checkpoint.imagined import Folder
from tests.ranks.tiny import TINY


@pytest.fixture
def run(tmp_path):
    return Folder(tmp_path / "run")


def refused(run: Folder, *flags: object, **environ: str) -> str:
    """The text of the refusal; nothing was written."""
    before = sorted(run.root.parent.rglob("*"))
    with pytest.raises(ConfigError) as caught:
        run.plan(*flags, **environ)
    assert sorted(run.root.parent.rglob("*")) == before
    return str(caught.value)


def test_a_folder_without_a_run_begins_one_and_keeps_what_else_is_there(run):
    start = run.plan("--load", "elsewhere")
    assert (
        start.is_new and start.step is None and not start.goes_on and len(start.identity.id) == 32
    )
    assert [origin["load"] for origin in start.identity.origins] == [
        str(Path("elsewhere").resolve())
    ]
    run.root.mkdir()
    (run.root / "notes.txt").write_text("mine")
    assert run.plan("--overwrite-run").is_new and not run.plan("--overwrite-run").overwrites


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize(
    "again",
    [
        (),
        ("--load", "{save}"),
        ("--train-iters", "99"),
        ("--micro-batch-size", "1"),
        ("--lr", "2e-3", "--accept-change", "lr"),
        ("--lr", "2e-3", "--override-opt-param-scheduler"),
        ("--num-experts", "4", "--eval-only"),
    ],
)
def test_the_same_run_goes_on(run, again, old):
    """Also in a folder of the version before run.json."""
    known = run.begin(old=old)
    start = run.plan(*(word.format(save=run.save) for word in again))
    assert start.goes_on and start.step == 3 and not start.is_new
    assert old or start.identity.id == known.id
    cfg = starting.settled(run.cfg("--load", "x", "--finetune", "--ckpt-step", "2"), start)
    assert cfg.checkpoint.load == str(run.save)
    assert (cfg.checkpoint.finetune, cfg.checkpoint.ckpt_step) == (False, None)


FIRST_STARTS = (
    ("--load", "{other}"),
    ("--load", "{other}", "--finetune"),
    ("--load", "{other}", "--ckpt-step", "4"),
    ("--load", "{save}"),
    ("--load", "{save}", "--no-load-optim"),
)


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("flags", FIRST_STARTS)
def test_what_the_first_start_loaded_does_not_count_again(run, tmp_path, flags, old):
    words = [word.format(other=tmp_path / "other", save=run.save) for word in flags]
    run.begin(*words, old=old)
    assert run.plan(*words).goes_on
    assert run.plan().goes_on, "nor must it be repeated"


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("step", [3, None])
@pytest.mark.parametrize(
    "change", ["--num-experts 4", "--lr 2e-3", "--seed 7", "--hidden-size 96", "--vocab-size 260"]
)
def test_another_model_or_data_is_refused_with_three_ways_out(run, change, step, old):
    run.begin(step=step, old=old)
    text = refused(run, *change.split())
    flag, new = change.split()
    old_value = {"--num-experts": "8", "--lr": "0.001", "--seed": "1234", "--hidden-size": "64"}
    assert f"{flag} {old_value.get(flag, '250')} -> {float(new):g}" in text
    for way in ("--load", "another --run-dir", "--overwrite-run"):
        assert way in text


def test_another_beginning_is_refused(run, tmp_path):
    run.begin()
    other = Folder(tmp_path / "other")
    other.begin()
    for flags in (
        ("--load", other.save),
        ("--finetune",),
        ("--load", run.save, "--finetune"),
        ("--load", other.save, "--ckpt-step", "3"),
        ("--load", other.save, "--eval-only"),
    ):
        text = refused(run, *flags)
        assert "that did not begin with" in text and str(flags[0]) in text


def test_a_run_that_died_before_its_first_save_begins_anew_only_as_itself(run):
    known = run.begin("--load", "other", step=None)
    start = run.plan("--load", "other")
    assert not start.goes_on and start.identity.id == known.id
    assert "did not begin with" in refused(run, "--load", "a third")


def test_steps_of_another_run_are_not_its_own(run):
    """A restart takes only what this run saved."""
    known = run.begin(step=None)
    run.saved(10, id="another")
    assert "of another run" in refused(run)
    run.saved(2, id=known.id)
    assert run.plan().step == 2


def test_a_save_folder_belongs_to_a_run_too(run, tmp_path):
    """--save of a run beside a new --run-dir (the default one has the time in its name)."""
    known = run.begin()
    new = Folder(tmp_path / "new")
    start = new.plan("--save", run.save)
    assert start.goes_on and start.identity.id == known.id
    assert "--num-experts 8 -> 4" in refused(new, "--save", run.save, "--num-experts", "4")


def test_another_save_folder_does_not_make_the_run_begin_anew(run, tmp_path):
    known = run.begin()
    text = refused(run, "--save", tmp_path / "second")
    assert f"--load {run.save}" in text
    start = run.plan("--save", tmp_path / "second", "--load", run.save)
    assert not start.goes_on and start.identity.id == known.id


def test_damaged_steps_are_no_empty_folder(run):
    run.begin()
    (run.save / "step_00000003/manifest.json").write_bytes(b"garbage")
    assert run.plan().goes_on, "the load says what is damaged"


def test_going_back_is_done_once(run):
    known = run.begin(step=8)
    run.saved(12, id=known.id)
    back = ("--load", run.save, "--ckpt-step", "8", "--skip-samples", "3-4")
    start = run.plan(*back)
    assert start.goes_back and run.plan("--ckpt-step", "8").goes_back
    assert starting.settled(run.cfg("--ckpt-step", "8"), start).checkpoint.load == str(run.save)
    identity.write(run.root, replace(known, course={"step": 8, "command": start.command}))
    aside.abandon_later(run.save, 8)
    assert run.plan(*back).goes_back, "nothing new is saved yet: from step 8 again"
    run.saved(11, id=known.id)
    again = run.plan(*back)
    assert again.goes_on and again.step == 11 and "went back to step 8" in again.note
    assert run.plan(*back[:-1], "3-5").goes_back, "with other flags it is another going back"


def test_later_steps_are_kept_under_another_name(run):
    known = run.begin(step=8)
    for step in (12, 16):
        run.saved(step, id=known.id)
    assert sorted(aside.abandon_later(run.save, 8)) == [12, 16]
    assert folder.steps(run.save) == [8] and folder.latest_step(run.save) == 8
    kept = sorted(run.save.glob("step_*.old-*"))
    assert [path.name[:13] for path in kept] == ["step_00000012", "step_00000016"]
    assert read_record(kept[1])["step"] == 16


def test_a_complete_run_has_nothing_to_do(run):
    done = {"step": 5, "train_iters": 5, "train_samples": None}
    run.begin(step=5, finished=done)
    assert run.plan().is_complete and "complete at step 5" in run.plan().told(run.cfg())
    assert run.plan("--train-iters", "4").is_complete
    assert not run.plan("--train-iters", "9").is_complete
    assert not run.plan("--eval-only").is_complete


def test_an_old_run_is_moved_aside_once_a_launch(run):
    known = run.begin()
    start = run.plan("--overwrite-run", "--num-experts", "4", PRETRAIN_MOE_START="now")
    assert start.overwrites and start.identity.id != known.id
    assert "--overwrite-run moves what --load" in refused(
        run, "--overwrite-run", "--load", run.save
    )
    restart = {"TORCHELASTIC_RESTART_COUNT": "1"}
    assert run.plan("--overwrite-run", **restart).goes_on
    (run.root / "data").mkdir()
    (run.root / "data/tokens.bin").write_text("tokens")
    old = aside.move_run(run.root, run.save)
    assert old.name.startswith("run.old-") and read_record(old / "checkpoints/step_00000003")
    assert identity.read(old).id == known.id and (old / "metrics.jsonl").exists()
    assert sorted(path.name for path in run.root.rglob("*")) == [
        "checkpoints",
        "data",
        "tokens.bin",
    ]
    run.begin("--num-experts", "4", stamp="now")
    assert run.plan("--overwrite-run", "--num-experts", "4", PRETRAIN_MOE_START="now").goes_on


def test_after_75_the_same_command_goes_on_also_with_overwrite_run(run):
    run.begin(overwrote=True)
    assert run.plan("--overwrite-run").overwrites
    (run.root / "exit_reason.json").write_text('{"code": 75}')
    assert run.plan("--overwrite-run").goes_on


def test_checkpoints_beside_the_run_are_moved_beside_themselves(run, tmp_path):
    save = tmp_path / "save"
    run.begin("--save", save, step=None)
    run.saved(3, id="x", save=save)
    old = aside.move_run(run.root, save)
    (moved,) = tmp_path.glob("save.old-*/step_00000003")
    assert read_record(moved) and not (old / "checkpoints").exists() and folder.steps(save) == []


def test_a_dry_run_refuses_it(run):
    from pretrain_moe import main

    run.begin()
    with pytest.raises(SystemExit) as caught:
        main([*TINY, "--num-experts", "4", "--run-dir", str(run.root), "--dry-run"])
    assert caught.value.code == 64


@pytest.mark.parametrize("text", ["", "{", "[]", '{"id": 3}', '{"id": "a"}'])
def test_an_unreadable_run_json_is_none(tmp_path, text):
    (tmp_path / identity.RUN).write_text(text)
    assert identity.read(tmp_path) is None
    identity.write(tmp_path, Identity().named())
    assert identity.read(tmp_path).id


def test_a_fast_tier_counts_only_with_steps_of_this_run(run, tmp_path):
    """Runs that share --ckpt-local-dir have folders of their own in it; a step there that a removed
    run of the same name has left is another run's.
    """
    local = tmp_path / "local"
    flags = ("--ckpt-tiers", "local,store", "--ckpt-local-dir", local, "--ckpt-local-interval", 1)
    section, other = run.cfg(*flags).checkpoint, tmp_path / "other/checkpoints"
    folders = [tiers.tiers_of(section, store)[0].directory for store in (run.save, other)]
    assert folders[0] != folders[1] and {path.parent for path in folders} == {local}
    known = run.begin(step=None)
    run.saved(4, id="removed", save=folders[0])
    assert not tiers.has_fast_step(section, run.save, known.owns)
    run.saved(2, id=known.id, save=folders[0])
    assert tiers.has_fast_step(section, run.save, known.owns)
    run.saved(6, id=None, save=local)
    assert tiers.tiers_of(section, run.save)[0].directory == local, "an older version's place"
