"""Asynchronous saves: what they hold, when they are done, and what their failures do to a run."""

import json
import os
import signal
import threading
import time

import pytest

from megatron_ext.checkpoint import folder as layout
from megatron_ext.checkpoint import saving, staging
from megatron_ext.errors import DiskError
from megatron_ext.mesh.agree import FailedElsewhere
from tests.checkpoint.small_run import DIST, EP2, checkpointer, small_run
from tests.ranks.harness import run_ranks, start_ranks


def _train_on_while_saving(flags, folder):
    """The writer is held back until two more steps have changed every tensor in place; the copy
    is held back until the first of them waits for it.
    """
    may_write, waits = threading.Event(), threading.Event()
    write, copy = saving.writer.write_image, staging.Image.copy
    saving.writer.write_image = lambda image, path: (may_write.wait(60), write(image, path))[1]
    staging.Image.copy = lambda image, done: (waits.wait(60), copy(image, done))
    with small_run(flags) as run:
        with checkpointer(folder, async_save=True) as saver:
            run.steps(2)
            saver.save(run.state)
            marks = run.fingerprint()
            assert saver.poll() == [] and not saver._saves[0].image.copied.is_set()
            run.state.before_update = lambda: (waits.set(), saver.before_update())
            losses = run.steps(2)
            assert saver.poll() == [] and layout.steps(folder) == []
            may_write.set()
            finished = saver.poll(blocking=True)
    with small_run(flags) as run:
        with checkpointer(None, folder) as loader:
            assert loader.load(run.state)
        assert run.fingerprint() == marks
        return finished, losses == run.steps(2)


@pytest.mark.parametrize(
    ("world_size", "flags"), [(1, ""), (2, f"{DIST} --bf16"), (2, f"{EP2} --bf16")]
)
def test_holds_the_state_of_its_own_step(world_size, flags, tmp_path):
    results = run_ranks(_train_on_while_saving, world_size, flags, tmp_path / "ckpt")
    assert results == [([2], True)] * world_size


def _poll_every_step(folder):
    with small_run("") as run, checkpointer(folder, async_save=True) as saver:
        finished = []
        for _ in range(4):
            run.step()
            finished += saver.poll()
            saver.save(run.state)  # waits for the one before
        finished += saver.poll(blocking=True)
        return finished[-1], layout.steps(folder), layout.latest_step(folder)


def test_saves_in_a_row_and_their_ledger(tmp_path):
    results = run_ranks(_poll_every_step, 2, tmp_path / "ckpt")
    assert results == [(4, [4, 3, 2, 1], 4)] * 2
    lines = [
        json.loads(line) for line in (tmp_path / "ckpt" / "ledger.jsonl").read_text().splitlines()
    ]
    events = [(line["step"], line["event"]) for line in lines]
    for step in (1, 2, 3, 4):
        mine = [event for number, event in events if number == step]
        assert mine == ["requested", "staged", "durable", "verified"]
    durable = [line for line in lines if line["event"] == "durable"]
    written = sum(f.stat().st_size for f in (tmp_path / "ckpt/step_00000004").glob("*.safetensors"))
    assert 0 < durable[-1]["bytes"] == written
    assert all(line["seconds"] > 0 for line in durable)


def _fail_on_rank(rank, error, count):
    """The writer of one rank fails `count` times."""
    write, left = saving.writer.write_image, [count]

    def broken(image, path):
        if int(os.environ["RANK"]) == rank and left[0] > 0:
            left[0] -= 1
            image.drop()
            raise error
        return write(image, path)

    saving.writer.write_image = broken


def _failing_writer(folder):
    _fail_on_rank(1, RuntimeError("the writer broke"), count=2)
    with small_run("") as run, checkpointer(folder, async_save=True) as saver:
        found = []
        for _ in range(4):
            run.step()
            saver.save(run.state)
            found.append((saver.poll(blocking=True), layout.latest_step(folder)))
        return found, saver.failures.last is None


def test_a_failed_save_does_not_stop_training(tmp_path):
    """Two failures on rank 1 only: all ranks learn of them, nothing is left behind, the next saves
    succeed.
    """
    results = run_ranks(_failing_writer, 2, tmp_path / "ckpt")
    assert results == [([([], None), ([], None), ([3], 3), ([4], 4)], True)] * 2
    assert not list((tmp_path / "ckpt").glob(".writing*"))
    ledger = (tmp_path / "ckpt" / "ledger.jsonl").read_text()
    assert ledger.count('"failed"') == 2 and "the writer broke" in ledger


def _refused(folder):
    layout.free_bytes = lambda path: 0
    with small_run("") as run, checkpointer(folder) as saver:
        run.step()
        saver.save(run.state)
        saver.failures.last = None  # the run's own end would raise it


def test_a_save_that_is_refused_has_its_end_in_the_ledger(tmp_path):
    run_ranks(_refused, 1, tmp_path / "ckpt")
    lines = (tmp_path / "ckpt" / "ledger.jsonl").read_text().splitlines()
    events = {line["event"]: line for line in map(json.loads, lines)}
    assert list(events) == ["requested", "failed"]
    assert "no space for the checkpoint" in events["failed"]["error"]


def _full_disk(folder, asynchronous):
    _fail_on_rank(1, OSError(28, "No space left on device"), count=99)
    codes = []
    with small_run("") as run:
        try:
            with checkpointer(folder, async_save=asynchronous) as saver:
                for _ in range(5):
                    run.step()
                    saver.save(run.state)
                    saver.poll(blocking=True)
                    codes.append(run.state.progress.step)
        except (DiskError, FailedElsewhere) as error:
            return codes, error.code, str(error)
    return None


def test_a_full_disk_ends_the_run_after_three_saves(tmp_path):
    for asynchronous, wanted in ((False, [1, 2]), (True, [1, 2])):
        results = run_ranks(_full_disk, 2, tmp_path / str(asynchronous), asynchronous)
        for steps, code, text in results:
            assert (steps, code) == (wanted, 74)
            assert "No space left on device" in text and "have" in text and "need" in text
        assert layout.steps(tmp_path / str(asynchronous)) == []


def _killed_while_writing(folder, go):
    with small_run("") as run:
        with checkpointer(folder, async_save=True) as saver:
            run.steps(2)
            saver.save(run.state)
            saver.poll(blocking=True)
            saving.writer.write_image = lambda image, path: time.sleep(60)
            run.steps(1)
            saver.save(run.state)
            go.put(1)
            time.sleep(60)


def _resume(folder):
    with small_run("") as run, checkpointer(folder, folder) as saver:
        assert saver.load(run.state)
        run.step()
        saver.save(run.state)
        return run.state.progress.step


def test_kill_in_the_middle_of_a_save_leaves_the_one_before(tmp_path):
    """kill -9 of both ranks: step 3 never appears, its folder is swept, the lease is taken over."""
    import multiprocessing

    folder = tmp_path / "ckpt"
    go = multiprocessing.get_context("fork").Queue()
    processes, _ = start_ranks(_killed_while_writing, 2, folder, go)
    for _ in processes:
        go.get(timeout=60)
    assert len(list(folder.glob(".writing_step_00000003_*"))) == 1
    for process in processes:
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    assert not list(folder.glob("step_00000003"))
    assert layout.steps(folder) == [2] and (folder / "lease.json").exists()
    assert run_ranks(_resume, 2, folder) == [3, 3]
    assert layout.steps(folder) == [3, 2] and not list(folder.glob(".writing*"))
    assert not (folder / "lease.json").exists()
