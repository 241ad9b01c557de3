"""A folder that a run lives in, or that holds one: what a second start does to it."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
from pathlib import Path

from tests.launch.programs import ROOT, children_of, fatal_lines, launch, launched, run, wait_for
from tests.ranks.tiny import TINY, read_metrics


def _hashes(folder: Path) -> dict[str, str]:
    """Of every file that no living run changes."""
    names = ("config.yaml", "run.json", "lease.json")
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}


def test_a_refused_start_leaves_the_living_run_as_it_was(tmp_path):
    """With the same folders, and with another --save: 73. The run that lives is restarted after a
    kill as before, and its 75 stays 75.
    """
    where, flags = ["--run-dir", tmp_path / "run"], [*TINY, "--train-iters", 100_000]
    with launched("--restarts", 1, 2, *flags, *where) as process:
        metrics = tmp_path / "run/metrics.jsonl"
        wait_for(metrics, '"step": 3')
        before = _hashes(tmp_path / "run")
        for other in ([], ["--save", tmp_path / "second"], ["--seed", 5]):
            done = launch(1, *flags, *where, *other)
            (line,) = fatal_lines(done.stderr)
            assert done.returncode == (64 if "--seed" in other else 73), line
        assert _hashes(tmp_path / "run") == before
        assert not list(tmp_path.glob("run/**/exit_reason*"))
        os.kill(children_of(process.pid)[1], signal.SIGKILL)
        metrics.unlink()
        wait_for(metrics, '"step": 2')
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=90)
    assert process.returncode == 75 and "restart 1 after code 137" in errors
    assert json.loads((tmp_path / "run/exit_reason.json").read_text())["code"] == 75
    again = launch(2, *flags, *where, "--exit-interval", 1)
    assert again.returncode == 0 and "resumed at step" in again.stdout


DIES_ONCE = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
from launch.local import main
from megatron_ext.device import start
start("cpu")
from megatron_ext.train import loop

take_step = loop._take_step

def dies(run, *rest):
    if run.state.progress.step == 3 and os.environ["PRETRAIN_MOE_ATTEMPT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    return take_step(run, *rest)

loop._take_step = dies
sys.exit(main(sys.argv[1:]))
"""


def test_a_rollback_is_not_undone_by_a_restart(tmp_path):
    """Back to step 2 of 6 and killed before the first new save: the restart goes on from step 2,
    not from the abandoned step 6.
    """
    flags = [*TINY, "--train-iters", "6", "--save-interval", "2", "--run-dir", tmp_path / "run"]
    assert launch(1, *flags).returncode == 0
    first, save = read_metrics(tmp_path / "run"), tmp_path / "run/checkpoints"
    program = tmp_path / "dies.py"
    program.write_text(DIES_ONCE)
    back = ["--load", save, "--ckpt-step", "2", "--skip-samples", "16-30"]
    done = run([sys.executable, program, "--restarts", "2", 1, *flags, *back])
    assert done.returncode == 0 and "restart 1 after code 137 at step 4" in done.stderr
    assert "later steps were set aside: [6, 4]" in done.stderr
    assert done.stdout.count("resumed at step 2") == 2
    second = read_metrics(tmp_path / "run")
    assert len(second) == 6 and second[:2] == first[:2] and second[2] != first[2]
    kept = sorted(path.name[:17] for path in save.glob("step_*.old-*"))
    assert kept == ["step_00000004.old", "step_00000006.old"]


def test_the_same_command_again_goes_on_and_another_model_is_refused(tmp_path):
    flags = [*TINY, "--train-iters", "4", "--save-interval", "2", "--run-dir", tmp_path]
    assert launch(1, *flags, "--exit-interval", "2").returncode == 0
    other = launch(1, *flags, "--num-experts", "16")
    (line,) = fatal_lines(other.stderr)
    assert other.returncode == 64 and "--num-experts 8 -> 16" in line and "--overwrite-run" in line
    done = launch(1, *flags)
    assert done.returncode == 0 and "resumed at step 2" in done.stdout
    assert len(read_metrics(tmp_path)) == 4
    before = (tmp_path / "metrics.jsonl").read_bytes()
    done = launch(1, *flags)
    assert done.returncode == 0 and "the run is complete at step 4" in done.stdout
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
