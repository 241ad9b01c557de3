"""Signals to one program: heard while the main thread is inside C, and before there is a state."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from megatron_ext.errors import EXIT_REASON, Preempted
from megatron_ext.mesh import signals
from megatron_ext.mesh.attempt import ATTEMPT
from megatron_ext.train.stop import StopRequest
from tests.launch.programs import ROOT, environment, fatal_lines, wait_for
from tests.ranks.tiny import TINY, read_metrics

SETTINGS = SimpleNamespace(
    exit_duration_in_mins=None, exit_signal_handler=False, exit_signal="SIGTERM"
)


def in_child(action, *sent, begin=lambda stop: None, environ=()):
    """(exit code, seconds, stderr) of a fork that runs `begin(stop)`, then `action(stop)`, and is
    sent signals when it has begun; a number among `sent` is a pause in seconds.
    """
    (ready, is_ready), (read, write) = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        os.dup2(write, 2)
        sys.stderr = os.fdopen(2, "w", closefd=False)
        os.environ.pop(ATTEMPT, None)
        os.environ.update(environ)
        with StopRequest(SETTINGS) as stop:
            begin(stop)
            os.write(is_ready, b"x")
            action(stop)
        os._exit(0)
    os.close(write)
    os.read(ready, 1)
    start = time.monotonic()
    for one in sent:
        time.sleep(one) if isinstance(one, float) else os.kill(pid, one)
    _, status = os.waitpid(pid, 0)
    with os.fdopen(read) as errors:
        return os.waitstatus_to_exitcode(status), time.monotonic() - start, errors.read()


def trains(stop):
    """It is in its seventh step."""
    stop.trains(lambda: "step 7")


def in_c(stop):
    """No byte code runs on the main thread for a minute."""
    libc = ctypes.CDLL(None)
    for _ in range(60):  # a signal ends a sleep of C early
        libc.sleep(1)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_a_start_that_takes_long_is_left(name, tmp_path, monkeypatch):
    """By force at the deadline: code 75, one line at once, the FATAL line, exit_reason.json."""
    monkeypatch.setattr(signals, "START_DEADLINE_S", 0.4)
    path = tmp_path / "exit_reason.json"
    sent, environ = signal.Signals[name], {EXIT_REASON: str(path), "RANK": "0"}
    code, seconds, errors = in_child(
        in_c, sent, begin=lambda stop: stop.starts("building the model"), environ=environ
    )
    assert code == 75 and 0.4 <= seconds < 10
    first, fatal = errors.splitlines()
    assert first.startswith(f"{name}: nothing to save yet (building the model), leaving")
    expected = f"stopped by {name} before the first step, while building the model"
    assert fatal.startswith(f"FATAL 75 rank=0 step=0 what={expected}")
    reason = json.loads(path.read_text())
    assert (reason["code"], reason["step"]) == (75, 0) and reason["what"].startswith(expected)


def test_training_has_no_deadline(monkeypatch):
    monkeypatch.setattr(signals, "START_DEADLINE_S", 0.1)

    def train(stop):
        time.sleep(0.7)
        assert stop() == (True, False)

    code, _, errors = in_child(train, signal.SIGTERM, 0.1, signal.SIGTERM, begin=trains)
    assert code == 0, errors
    assert errors.splitlines()[0].startswith("SIGTERM: saving after this step (now step 7)")


def test_a_second_press_stops_now_also_inside_c(monkeypatch):
    monkeypatch.setattr(signals, "SAME_PRESS_S", 0.2)

    def train(stop):
        in_c(stop)

    code, seconds, errors = in_child(
        train, signal.SIGINT, 0.05, signal.SIGINT, 0.4, signal.SIGINT, begin=trains
    )
    assert code == 130 and seconds < 10
    first, last = errors.splitlines()
    assert "Ctrl-C again to stop now" in first and "stopped now, in step 7" in last


def test_the_ranks_of_a_launcher_leave_the_talking_to_it():
    def train(stop):
        time.sleep(0.3)

    assert in_child(train, signal.SIGINT, begin=trains, environ={ATTEMPT: "0"})[2] == ""


@pytest.mark.parametrize("leave", [lambda stop: None, lambda stop: stop.preempted("x", 1)])
def test_a_repeat_while_the_program_ends_changes_nothing(leave):
    """Both where this rank was asked and where another was."""

    def end(stop):
        error = leave(stop)
        if error is None:
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop()[0]
        stop.__exit__(None, error, None)
        for number in signals.SAVE_AND_LEAVE:
            os.kill(os.getpid(), number)
        os._exit(Preempted.code)

    assert in_child(end)[0] == 75


def test_sigterm_again_and_again_to_one_program(tmp_path):
    """Every 50 ms until it is gone: saved, 75. It imports by itself, so its end takes a while."""
    command = [sys.executable, "pretrain_moe.py", *TINY, "--train-iters", "100000"]
    process = subprocess.Popen(
        [*command, "--run-dir", str(tmp_path)],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        wait_for(tmp_path / "metrics.jsonl", '"step": 2')
        while process.poll() is None:
            process.terminate()
            time.sleep(0.05)
        errors = process.stderr.read()
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 75, errors
    step = read_metrics(tmp_path, "step")[-1]
    assert (tmp_path / "checkpoints/latest").read_text().strip() == f"step_{step:08d}"
    (line,) = fatal_lines(errors)
    assert line.startswith(f"FATAL 75 rank=0 step={step} what=stopped by SIGTERM after step")
