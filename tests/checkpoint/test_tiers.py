"""Tiers: which step goes where, what may be deleted, and a resume from the newest of them."""

import shutil

from megatron_ext.checkpoint import folder, tiers
from megatron_ext.checkpoint.fingerprint import differences, names
from tests.checkpoint.small_run import checkpointer, small_run
from tests.ranks.harness import run_ranks


def test_a_step_goes_to_the_slowest_tier_that_is_due(tmp_path):
    fast = tiers.Tier("memory", tmp_path, 2, 2)
    store = tiers.Tier("store", tmp_path, 6, None)
    found = [tiers.due([fast, store], step) for step in (1, 2, 4, 6, 9)]
    assert found == [None, "memory", "memory", "store", None]


def test_what_may_be_deleted(tmp_path):
    tier = tiers.Tier("store", tmp_path, 1, 2, keep_every=100)
    steps = [50, 100, 150, 200, 250, 300, 350]
    assert tiers.to_prune(steps, 300, tier) == [50, 150]
    assert tiers.to_prune(steps, 300, tier, keep={50}) == [150]
    assert tiers.to_prune(steps, 300, tiers.Tier("store", tmp_path, 1, None)) == []


def test_changes_of_a_run_are_shown_unless_accepted():
    saved, mine = {"seed": 1, "lr": 0.1, "gone": 2}, {"seed": 2, "lr": 0.1, "new": 3}
    assert differences(saved, mine, ()) == {"seed": "1 -> 2"}
    assert differences(saved, mine, names("--seed, data-path")) == {}


def _run(store):
    """Steps 1-5: 2 in the store, the others in memory; the run dies; then a resume."""
    options = dict(ckpt_tiers="memory,store", save_interval=2, keep_last=1, async_save=True)
    with small_run("") as run:
        saver = checkpointer(store, store, **options)
        for _ in range(3):
            run.step()
            saver.save(run.state, saver.due(run.state.progress.step))
        saver._wait_for(2)
        saver._leases.release()
        marks = run.fingerprint()
    shm = tiers.memory_folder(store)
    held = folder.steps(shm), folder.steps(store)
    with small_run("") as run, checkpointer(store, store, **options) as again:
        assert again.load(run.state)
        same = run.fingerprint() == marks
        run.step()
        again.save(run.state)
        again.finish()
    return held, same, folder.steps(store), shm.exists()


def test_a_resume_takes_the_newest_of_memory_and_store(tmp_path):
    try:
        found = run_ranks(_run, 1, tmp_path / "ckpt")
    finally:
        shutil.rmtree(tiers.memory_folder(tmp_path / "ckpt"), ignore_errors=True)
    assert found == [(([3], [2]), True, [4], False)]
