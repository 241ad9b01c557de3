"""launch/slurm/train.sbatch with stand-ins for srun and scontrol: one node, two ranks."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.launch.programs import ROOT, environment, fatal_lines
from tests.ranks.harness import free_port
from tests.ranks.tiny import TINY, read_metrics


@pytest.fixture
def job(tmp_path):
    """Runs the script as the first node of a job of one node."""
    commands = tmp_path / "bin"
    commands.mkdir()
    srun = 'while [[ $1 == --* ]]; do shift; done; exec "$@"'
    scripts = {"srun": srun, "scontrol": "echo localhost"}
    for name, body in scripts.items():
        (commands / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (commands / name).chmod(0o755)
    slurm = {
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_JOB_NODELIST": "localhost",
        "SLURM_JOB_ID": "7",
        "SLURM_SUBMIT_DIR": str(ROOT),
        "RANKS_PER_NODE": "2",
        "MASTER_PORT": str(free_port()),
    }
    own = environment()
    env = {**own, **slurm, "PATH": f"{commands}:{own['PATH']}", "PYTHON": sys.executable}

    def submit(*flags):
        script, run_dir = ROOT / "launch/slurm/train.sbatch", tmp_path / "run"
        words = [str(word) for word in ("bash", script, *flags, "--run-dir", run_dir)]
        return subprocess.run(
            words, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=150, check=False
        )

    return submit


def test_a_job_trains(job, tmp_path):
    done = job(*TINY, "--train-iters", "2")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "2 ranks = pp 1 x dp 2" in done.stdout
    assert read_metrics(tmp_path / "run", "step") == [1, 2]


def test_a_wrong_flag_ends_before_the_ranks_start(job):
    done = job(*TINY, "--moe-router-topk", "9")
    assert done.returncode == 64
    assert done.stderr.splitlines() == fatal_lines(done.stderr)
