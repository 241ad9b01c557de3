"""launch/slurm/train.sbatch on a real Slurm: preempted, requeued, resumed bit for bit."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from megatron_ext.checkpoint.ledger import read_ledger
from tests.launch.programs import wait_for
from tests.launch.test_restarts import history, weights
from tests.ranks.tiny import TINY
from tests.slurm.cluster import wait_until

STEPS = (*TINY, "--train-iters", "12", "--save-interval", "3")
LARGE = """--hidden-size 256 --moe-ffn-hidden-size 768 --num-experts 16 --train-iters 4
--save-interval 2 --async-save""".split()
"""A state of 600 MB, so that its saves take a while."""

TOO_LONG = (*TINY, "--train-iters", "100000", "--log-interval", "1000")


def log(run: Path) -> str:
    """What the job printed."""
    return run.with_suffix(".log").read_text()


@pytest.fixture(scope="module")
def uninterrupted(cluster, tmp_path_factory):
    """Twelve steps on two nodes."""
    run = tmp_path_factory.mktemp("uninterrupted") / "run"
    job = cluster.finish(cluster.submit(run, *STEPS))
    assert (job["JobState"], job["ExitCode"]) == ("COMPLETED", "0:0"), log(run)
    return run


def test_two_nodes_train(uninterrupted):
    assert sorted(history(uninterrupted)) == list(range(1, 13))
    assert "2 ranks = pp 1 x dp 2" in log(uninterrupted)


def interrupted_after(cluster, run, step: int, *command: object) -> None:
    """Submit, wait for a step, run a Slurm command on the job, and let it finish."""
    number = cluster.submit(run, *STEPS)
    wait_for(run / "metrics.jsonl", f'"step": {step},')
    words = [str(word).replace("JOB", str(number)) for word in command]
    cluster.call(*words)
    job = cluster.finish(number)
    assert (job["JobState"], job["ExitCode"]) == ("COMPLETED", "0:0"), log(run)
    assert int(job["Restarts"]) >= 1


def test_a_preempted_job_saves_and_goes_on_bit_for_bit(cluster, uninterrupted, tmp_path):
    run = tmp_path / "run"
    interrupted_after(cluster, run, 4, "scancel", "--batch", "--signal=USR1", "JOB")
    assert "FATAL 75" in log(run) and "resumed at step" in log(run)
    assert history(run) == history(uninterrupted)
    assert weights(run) == weights(uninterrupted) != []


def test_a_job_requeued_by_force_goes_on_bit_for_bit(cluster, uninterrupted, tmp_path):
    run = tmp_path / "run"
    interrupted_after(cluster, run, 4, "scontrol", "requeue", "JOB")
    assert history(run) == history(uninterrupted)
    assert weights(run) == weights(uninterrupted) != []


def test_a_wrong_flag_reaches_the_exit_code_of_the_job(cluster, tmp_path):
    job = cluster.finish(cluster.submit(tmp_path / "run", *STEPS, "--moe-router-topk", "9"))
    assert (job["JobState"], job["ExitCode"]) == ("FAILED", "64:0")
    assert log(tmp_path / "run").count("FATAL 64") == 1


def test_a_node_that_goes_down_requeues_the_job(cluster, uninterrupted, tmp_path):
    run = tmp_path / "run"
    number = cluster.submit(run, *STEPS)
    wait_for(run / "metrics.jsonl", '"step": 4,')
    cluster.call("scontrol", "update", "NodeName=n2", "State=DOWN", "Reason=test")
    wait_until(lambda: cluster.job(number).get("Restarts") == "1", "the job is requeued")
    cluster.call("scontrol", "update", "NodeName=n2", "State=RESUME")
    job = cluster.finish(number)
    assert (job["JobState"], job["ExitCode"]) == ("COMPLETED", "0:0"), log(run)
    assert history(run) == history(uninterrupted)


def test_a_requeue_in_the_middle_of_a_save_loses_nothing(cluster, tmp_path):
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert cluster.finish(cluster.submit(whole, *TINY, *LARGE))["JobState"] == "COMPLETED"
    number = cluster.submit(run, *TINY, *LARGE)
    checkpoints = run / "checkpoints"
    wait_until(lambda: list(checkpoints.glob(".writing_*")), "a save begins", pause_s=0.002)
    before = time.time()
    cluster.call("scontrol", "requeue", number)
    job = cluster.finish(number)
    assert (job["JobState"], job["ExitCode"]) == ("COMPLETED", "0:0"), log(run)
    durable = [entry["time"] for entry in read_ledger(checkpoints) if entry["event"] == "durable"]
    assert before < durable[0], "the save was over before the requeue"
    assert history(run) == history(whole)
    assert weights(run, 4) == weights(whole, 4) != []


def test_a_time_limit_shorter_than_the_run_is_a_requeue(cluster, tmp_path):
    """Slurm warns up to a minute too early, so the shortest limit with time to work is two."""
    run = tmp_path / "run"
    number = cluster.submit(run, *TOO_LONG, options=("--time=2", "--signal=B:USR1@45"))
    wait_for(run.with_suffix(".log"), "train.sbatch: code 75, requeued", timeout_s=150)
    last = max(history(run))
    wait_until(lambda: cluster.job(number)["JobState"] == "PENDING", "the job waits again")
    cluster.call("scontrol", "update", f"JobId={number}", "StartTime=now+4")
    wait_for(run.with_suffix(".log"), f"resumed at step {last} ", timeout_s=150)
    wait_until(lambda: max(history(run)) > last, "the run goes on")
    cluster.call("scancel", number)
    assert "FATAL 75" in log(run)
    steps = sorted(history(run))  # read once: the last step may still be written
    assert steps == list(range(1, steps[-1] + 1))
