"""SIGTERM, SIGUSR1, SIGUSR2 and Ctrl-C, to the launcher and to its ranks."""

from __future__ import annotations

import json
import os
import signal
import time

import pytest

from tests.launch.programs import all_gone, children_of, fatal_lines, launched, wait_for
from tests.ranks.tiny import TINY, read_metrics

FOREVER = ("--train-iters", "100000")


def the_launcher(pid: int) -> list[int]:
    return [pid]


def one_rank(pid: int) -> list[int]:
    return children_of(pid)[-1:]


def all_ranks(pid: int) -> list[int]:
    return children_of(pid)


@pytest.mark.parametrize(
    ("name", "targets", "count"),
    [("SIGTERM", the_launcher, 3), ("SIGUSR1", one_rank, 1), ("SIGUSR2", all_ranks, 2)],
)
def test_a_signal_saves_and_ends_with_75(tmp_path, name, targets, count):
    """Once or again, to anyone: the step is finished, saved, and every rank leaves."""
    with launched(2, *TINY, *FOREVER, "--run-dir", tmp_path) as process:
        wait_for(tmp_path / "metrics.jsonl", '"step": 2')
        pids = targets(process.pid)
        for pid in pids * count:
            os.kill(pid, signal.Signals[name])
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    (line,) = fatal_lines(errors)
    step = read_metrics(tmp_path, "step")[-1]
    assert line.startswith(f"FATAL 75 rank=0 step={step} what=stopped by ")
    assert (tmp_path / "checkpoints/latest").read_text().strip() == f"step_{step:08d}"
    reason = json.loads((tmp_path / "exit_reason.json").read_text())
    assert (reason["code"], reason["step"]) == (75, step)
    assert all_gone(str(tmp_path), 10)


def test_a_signal_in_an_evaluation_ends_it(tmp_path):
    """The first evaluation would take hours; the step before it is what is saved."""
    evaluation = ["--eval-interval", "2", "--eval-iters", "100000"]
    with launched(2, *TINY, *FOREVER, *evaluation, "--run-dir", tmp_path) as process:
        wait_for(tmp_path / "metrics.jsonl", '"step": 2')
        process.send_signal(signal.SIGUSR1)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    assert read_metrics(tmp_path, "step") == [1, 2]
    assert (tmp_path / "checkpoints/latest").read_text().strip() == "step_00000002"


def test_a_signal_while_the_ranks_start_is_not_lost(tmp_path):
    with launched(2, *TINY, *FOREVER, "--run-dir", tmp_path) as process:
        wait_for(tmp_path / "config.yaml", "moe")
        process.terminate()
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    assert len(fatal_lines(errors)) == 1


def test_the_second_ctrl_c_kills(tmp_path):
    """The ranks are stopped, so that they cannot save and leave after the first."""
    with launched(2, *TINY, *FOREVER, "--run-dir", tmp_path) as process:
        wait_for(tmp_path / "metrics.jsonl", '"step": 2')
        for rank in children_of(process.pid):
            os.kill(rank, signal.SIGSTOP)
        process.send_signal(signal.SIGINT)
        time.sleep(1)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=30)
    assert process.returncode == 130
    assert all_gone(str(tmp_path), 10)
