"""launch/run.sh: exit codes, one line for a mistake, nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.launch.programs import all_gone, children_of, fatal_lines, launch, launched, wait_for
from tests.ranks.tiny import TINY, read_metrics

FOREVER = ("--train-iters", "100000")


def test_two_ranks_train_and_resume(tmp_path):
    flags = [*TINY, "--train-iters", "3", "--run-dir", tmp_path]
    first = launch(2, *flags)
    assert (first.returncode, first.stderr) == (0, "")
    more = ["--load", tmp_path / "checkpoints", "--train-iters", "5"]
    second = launch(2, *flags, *more, "--override-opt-param-scheduler")
    assert (second.returncode, second.stderr) == (0, "")
    assert read_metrics(tmp_path, "step") == [1, 2, 3, 4, 5]
    assert f"resumed at step 3 from {tmp_path}/checkpoints" in second.stdout


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        (["--moe-router-topk", "9"], 64, "--moe-router-topk 9"),
        (["--num-expert", "8"], 64, "--num-experts"),
        (["--expert-model-parallel-size", "4"], 64, "--expert-model-parallel-size 4"),
        (["--no-mock-data", "--data-path", "/nowhere/code"], 65, "path=/nowhere/code.idx"),
        (["--load", "/nowhere/checkpoints"], 65, "/nowhere/checkpoints"),
    ],
)
def test_a_mistake_is_one_line_and_its_code(tmp_path, flags, code, words):
    done = launch(2, *TINY, "--run-dir", tmp_path / "run", *flags)
    assert done.returncode == code
    assert len(fatal_lines(done.stderr)) == 1
    assert done.stderr.splitlines() == fatal_lines(done.stderr)
    assert words in done.stderr


@pytest.mark.parametrize("words", [[], ["--train-iters", "3"], ["0"], ["two"]])
def test_the_number_of_ranks_comes_first(words):
    done = launch(*words) if words else launch("")
    assert done.returncode == 64
    assert fatal_lines(done.stderr) == done.stderr.splitlines() != []


def test_an_interpreter_without_the_packages_is_one_line(monkeypatch):
    empty = Path(sys.base_prefix) / "bin/python3"
    monkeypatch.setattr("tests.launch.programs.sys.executable", str(empty))
    found = subprocess.run([empty, "-c", "import megatron.core"], capture_output=True, check=False)
    if found.returncode == 0:
        pytest.skip("the base interpreter has megatron-core, too")
    done = launch(2, *TINY)
    assert done.returncode == 69
    assert fatal_lines(done.stderr) == done.stderr.splitlines() != []


def test_help_and_dry_run_start_no_rank():
    shown = launch(2, "--help")
    assert shown.returncode == 0 and shown.stdout.count("usage:") == 1
    sizes = ["--expert-model-parallel-size", "8", "--global-batch-size", "16"]
    dry = launch(8, *TINY, *sizes, "--dry-run")
    assert (dry.returncode, dry.stderr) == (0, "")
    assert "8 ranks = pp 1 x dp 8" in dry.stdout


def test_a_killed_rank_ends_all_within_fifteen_seconds(tmp_path):
    with launched(2, *TINY, *FOREVER, "--run-dir", tmp_path) as process:
        wait_for(tmp_path / "metrics.jsonl", '"step": 5')
        ranks = children_of(process.pid)
        assert len(ranks) == 2
        begin = time.monotonic()
        os.kill(ranks[-1], signal.SIGKILL)
        _, errors = process.communicate(timeout=15)
        assert time.monotonic() - begin < 15
        assert process.returncode == 128 + signal.SIGKILL
        assert "was killed by SIGKILL" in errors
        assert "Traceback" not in errors
    assert all_gone(str(tmp_path), 1)


def test_a_killed_launcher_takes_its_ranks_with_it(tmp_path):
    with launched(2, *TINY, *FOREVER, "--run-dir", tmp_path) as process:
        wait_for(tmp_path / "metrics.jsonl", '"step": 2')
        process.kill()
        assert all_gone(str(tmp_path), 5)
