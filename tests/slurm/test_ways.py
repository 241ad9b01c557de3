"""On a real Slurm: ranks that srun starts itself, chains of jobs, arrays."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.launch.programs import ROOT, wait_for
from tests.launch.test_restarts import history
from tests.ranks.tiny import TINY
from tests.slurm.cluster import wait_until
from tests.slurm.test_slurm import log

SHORT = (*TINY, "--train-iters", "3")
LONGER = (*TINY, "--train-iters", "8", "--save-interval", "3")


def by_srun(cluster, monkeypatch):
    """Jobs of this cluster start their ranks by srun from now on."""
    monkeypatch.setitem(cluster.env, "SRUN_RANKS", "1")


def test_srun_starts_the_ranks(cluster, monkeypatch, tmp_path):
    by_srun(cluster, monkeypatch)
    run = tmp_path / "run"
    job = cluster.finish(cluster.submit(run, *SHORT))
    assert (job["JobState"], job["ExitCode"]) == ("COMPLETED", "0:0"), log(run)
    assert sorted(history(run)) == [1, 2, 3]
    assert "2 ranks = pp 1 x dp 2" in log(run)


def test_srun_gives_the_code_of_a_wrong_flag(cluster, monkeypatch, tmp_path):
    by_srun(cluster, monkeypatch)
    job = cluster.finish(cluster.submit(tmp_path / "run", *SHORT, "--moe-router-topk", "9"))
    assert (job["JobState"], job["ExitCode"]) == ("FAILED", "64:0"), log(tmp_path / "run")


def chain(cluster, run, count: int, *flags: object) -> list[int]:
    """Numbers of the jobs that launch/slurm/chain.sh submits."""
    env = {"RANKS_PER_NODE": "1", "MASTER_ADDR": "127.0.0.1", "PYTHON": sys.executable}
    env |= {"MASTER_PORT": str(cluster.port + 3)}
    options = ["--gpus-per-node=0", "--nodes=2", "--output", run.with_suffix(".log")]
    words = ["bash", "launch/slurm/chain.sh", count, *options, "launch/slurm/train.sbatch"]
    done = subprocess.run(
        [str(word) for word in (*words, *flags, "--run-dir", run)],
        env={**cluster.env, **env},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [int(line.split()[1].rstrip(":")) for line in done.stdout.splitlines()]


def test_a_chain_goes_on_in_the_next_job_and_stops_when_the_run_is_finished(cluster, tmp_path):
    run = tmp_path / "run"
    first, second, third = chain(cluster, run, 3, *LONGER)
    wait_for(run / "metrics.jsonl", '"step": 4,')
    cluster.call("scancel", "--batch", "--signal=USR1", first)
    assert cluster.finish(first)["ExitCode"] == "75:0", log(run)
    assert cluster.finish(second)["ExitCode"] == "0:0", log(run)
    assert cluster.finish(third)["JobState"] == "CANCELLED"
    assert sorted(history(run)) == list(range(1, 9))
    assert "resumed at step" in log(run)


def test_an_error_that_would_come_again_ends_the_chain(cluster, tmp_path):
    run = tmp_path / "run"
    first, second = chain(cluster, run, 2, *SHORT, "--moe-router-topk", "9")
    assert cluster.finish(first)["ExitCode"] == "64:0"
    assert cluster.finish(second)["JobState"] == "CANCELLED"


def test_a_finished_array_cancels_its_rest(cluster, tmp_path):
    run = tmp_path / "run"
    options = ("--array=1-3%1", "--no-requeue")
    number = cluster.submit(run, *SHORT, options=options)
    wait_until(lambda: not cluster.call("squeue", "--noheader", "--job", number), "all end", 120)
    assert sorted(history(run)) == [1, 2, 3]
    assert log(run).count("the jobs behind this one are cancelled") == 1


@pytest.mark.parametrize("words", [[], ["ten", "x.sbatch"], ["0", "x.sbatch"], ["3"]])
def test_a_chain_without_a_number_of_jobs_is_one_line(words):
    command = ["bash", "launch/slurm/chain.sh", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 64 and len(done.stderr.splitlines()) == 1
