"""launch/slurm/train.sbatch with stand-ins for srun and scontrol: one node, two ranks."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from megatron_ext.planner.command import main as plan
from tests.launch.programs import ROOT, environment, fatal_lines, wait_for
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

    def submit(*flags, script=ROOT / "launch/slurm/train.sbatch"):
        words = [str(word) for word in ("bash", script, *flags, "--run-dir", tmp_path / "run")]
        pipe = subprocess.PIPE
        return subprocess.Popen(words, env=env, cwd=tmp_path, stdout=pipe, stderr=pipe, text=True)

    return submit


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of a job."""
    out, errors = process.communicate(timeout=150)
    return process.returncode, out, errors


def test_a_job_trains(job, tmp_path):
    code, out, errors = ended(job(*TINY, "--train-iters", "2"))
    assert code == 0, errors[-2000:]
    assert "2 ranks = pp 1 x dp 2" in out
    assert read_metrics(tmp_path / "run", "step") == [1, 2]


def test_a_wrong_flag_ends_before_the_ranks_start(job):
    code, _, errors = ended(job(*TINY, "--moe-router-topk", "9"))
    assert code == 64
    assert errors.splitlines() == fatal_lines(errors)


def test_the_planners_job_saves_at_its_warning_and_asks_for_a_requeue(job, tmp_path):
    where = ["--cluster", "this-machine", "--world-size", "2", "--sbatch", str(tmp_path / "job")]
    plan(["search", "--config", "quickstart", "--vocab-size", "512", *where])
    flags = [*TINY, "--data-path", "null", "--train-iters", "100000"]
    process = job(*flags, script=tmp_path / "job")
    wait_for(tmp_path / "run/metrics.jsonl", '"step": 2')
    process.send_signal(signal.SIGUSR1)  # Slurm's warning, to the script: --signal=B:USR1@120
    code, out, errors = ended(process)
    assert code == 75, errors[-2000:]
    assert "code 75, requeued" in out
    assert list((tmp_path / "run/checkpoints").glob("step_*"))
