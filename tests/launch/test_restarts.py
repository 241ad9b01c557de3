"""--restarts: a run that loses a rank goes on, bit for bit; one that makes no progress stops."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import pytest

from launch.restarts import Budget, is_recoverable
from tests.launch.programs import (
    ROOT,
    all_gone,
    children_of,
    launch,
    launched,
    run,
    wait_for,
)
from tests.ranks.harness import free_port
from tests.ranks.tiny import TINY

STEPS = ("--train-iters", "12", "--save-interval", "3")


def history(run_dir: Path) -> dict[int, str]:
    """Step -> its loss and gradient norm as they were written; of a step done twice the last."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {
        line["step"]: f"{line['lm_loss']!r} {line['grad_norm']!r}"
        for line in lines
        if "lm_loss" in line
    }


def weights(run_dir: Path, step: int = 12) -> list[str]:
    """Name and bytes of each shard of a checkpoint."""
    folder = run_dir / f"checkpoints/step_{step:08d}"
    return sorted(f"{path.name} {path.read_bytes().hex()}" for path in folder.glob("*.safetensors"))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """A run of 12 steps on two ranks."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    assert launch(2, *TINY, *STEPS, "--run-dir", folder).returncode == 0
    return folder


@pytest.mark.parametrize("how", [[], ["--cold"]])
def test_a_killed_rank_is_replaced_and_nothing_is_lost(tmp_path, uninterrupted, how):
    flags = [*TINY, *STEPS, "--run-dir", tmp_path]
    with launched("--restarts", 2, *how, 2, *flags) as process:
        wait_for(tmp_path / "metrics.jsonl", '"step": 4')
        os.kill(children_of(process.pid)[1], signal.SIGKILL)
        output, errors = process.communicate(timeout=90)
    assert process.returncode == 0, errors
    assert "Traceback" not in errors and "launch: restart 1 after code 137" in errors
    assert "resumed at step" in output
    assert history(tmp_path) == history(uninterrupted)
    assert weights(tmp_path) == weights(uninterrupted) != []
    assert all_gone(str(tmp_path), 10)


def test_torchrun_restarts_on_gloo(tmp_path, uninterrupted):
    """A fresh prefix in the store for each restart: without it the ranks never meet again."""
    flags = [*TINY, *STEPS, "--run-dir", tmp_path]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    where = ["--max-restarts", "2", "--master-port", free_port()]
    program = tmp_path / "dies_once.py"
    program.write_text(DIES_ONCE)
    done = run([*torchrun, *where, program, *flags], timeout_s=120)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "resumed at step 3" in done.stdout
    assert history(tmp_path) == history(uninterrupted)


DIES_ONCE = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import pretrain_moe
from megatron_ext.device import start
start("cpu")
from megatron_ext.train import loop

take_step = loop._take_step

def dies(run, *rest):
    if run.state.progress.step == 4 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        if os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
    return take_step(run, *rest)

loop._take_step = dies
pretrain_moe.main()
"""


def test_a_run_that_fails_three_times_at_one_step_stops(tmp_path):
    """Its step 3 divides by zero, whoever starts it."""
    program = tmp_path / "poisoned.py"
    program.write_text(POISONED)
    words = ["--restarts", "9", "2", *TINY, "--save-interval", "1", "--run-dir", tmp_path / "run"]
    done = run([sys.executable, program, *words])
    assert done.returncode == 70
    assert done.stderr.count("ZeroDivisionError: division by zero do=") == 6  # two ranks, thrice
    assert "not started again: it failed 3 times at step 3" in done.stderr
    assert "--skip-samples" in done.stderr
    reason = json.loads((tmp_path / "run/exit_reason.json").read_text())
    assert (reason["code"], reason["step"]) == (70, 3)


POISONED = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from launch.local import main
from megatron_ext.device import start
start("cpu")
from megatron_ext.train import loop

take_step = loop._take_step
loop._take_step = lambda run, *rest: 1 / (run.state.progress.step - 2) and take_step(run, *rest)
sys.exit(main(sys.argv[1:]))
"""


def test_progress_renews_the_budget():
    budget = Budget(limit=2)
    assert [budget.refuses(137, step, step - 1) for step in (5, 9, 13, 17)] == [None] * 4
    assert budget.refuses(137, 18, 16) is None
    assert "no new checkpoint after 2 restarts" in budget.refuses(137, 20, 16)


def test_three_failures_at_one_step_are_poison():
    budget = Budget(limit=9)
    assert [budget.refuses(70, 7, 5), budget.refuses(139, 7, 6)] == [None, None]
    assert "3 times at step 7" in budget.refuses(70, 7, 6)


@pytest.mark.parametrize("code", [0, 64, 65, 73, 74, 75, 76, 130])
def test_what_another_start_does_not_cure(code):
    assert not is_recoverable(code)
    assert Budget(limit=3).refuses(code, 4, 3) == ""


@pytest.mark.parametrize("code", [1, 69, 70, 77, 78, 134, 137, 139])
def test_what_it_may_cure(code):
    assert is_recoverable(code)
    assert Budget(limit=3).refuses(code, 4, 3) is None
    assert Budget(limit=0).refuses(code, 4, 3) == ""
