"""SIGTERM, SIGUSR1, SIGUSR2 and Ctrl-C, to the launcher and to its ranks."""

from __future__ import annotations

import json
import os
import re
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


def test_sigterm_until_the_launcher_is_gone(tmp_path):
    """Every 50 ms: the code is decided when the state is saved, whatever comes while it ends."""
    with launched(2, *TINY, *FOREVER, "--run-dir", tmp_path) as process:
        wait_for(tmp_path / "metrics.jsonl", '"step": 2')
        while process.poll() is None:
            process.terminate()
            time.sleep(0.05)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    assert "launch: SIGTERM: saving after this step (now " in errors


def test_ctrl_c_is_answered_at_once_and_called_by_its_name(tmp_path):
    """A key that is held down for half a second is one press."""
    with launched(2, *TINY, *FOREVER, "--run-dir", tmp_path) as process:
        wait_for(tmp_path / "metrics.jsonl", '"step": 2')
        for pid in children_of(process.pid):
            os.kill(pid, signal.SIGSTOP)
        process.send_signal(signal.SIGINT)
        assert re.match(
            r"launch: SIGINT: saving after this step \(now .* of step \d+\), then leaving with 75;"
            " Ctrl-C again to stop now",
            process.stderr.readline(),
        )
        for _ in range(10):
            process.send_signal(signal.SIGINT)
            time.sleep(0.05)
        for pid in children_of(process.pid):
            os.kill(pid, signal.SIGCONT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    assert "what=stopped by SIGINT after step" in fatal_lines(errors)[0]
    assert "SIGINT" in json.loads((tmp_path / "exit_reason.json").read_text())["what"]


def test_ctrl_c_while_the_launcher_imports(tmp_path):
    with launched(2, *TINY, *FOREVER, "--run-dir", tmp_path) as process:
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    assert "SIGINT" in errors.splitlines()[0]
    assert "what=SIGINT came before the ranks started" in fatal_lines(errors)[0]
    assert "Traceback" not in errors


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
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "launch: SIGINT again: stopped now, in " in errors and not fatal_lines(errors)
    assert json.loads((tmp_path / "exit_reason.json").read_text())["code"] == 130
    assert all_gone(str(tmp_path), 10)
