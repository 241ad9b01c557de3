"""Submits a stage to Slurm and waits for it; a command that was killed finds its jobs again."""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from data.executors.cluster import SlurmExecutor
from data.storage import read_json, write_json
from megatron_ext.errors import ConfigError

POLL_S = 2.0
GONE = "Invalid job id"
KEPT = ("SLURM_CONF", "SLURM_TIME_FORMAT")


def run_on_slurm(executor: SlurmExecutor, logs: Path, show: Callable[[], None]) -> None:
    """Returns when no job of this stage is left, whatever became of its tasks."""
    earlier = (read_json(logs / "job.json") or {}).get("job")
    if earlier is not None:
        wait_for_job(earlier, show)
    if not executor.get_incomplete_ranks():
        return
    with sbatch_environment(), sbatch_errors():
        executor.run()
    write_json(logs / "job.json", {"job": executor.job_id})
    wait_for_job(executor.job_id, show)


def wait_for_job(job: str, show: Callable[[], None]) -> None:
    """Until squeue knows it no more; arrays of a long stage are a chain, so the last one counts."""
    while _is_queued(job):
        show()
        time.sleep(POLL_S)
    show()


def _is_queued(job: str) -> bool:
    command = ["squeue", "--noheader", "--jobs", str(job), "--format", "%T"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return GONE not in done.stderr  # a controller that does not answer now answers later
    return bool(done.stdout.strip())


@contextmanager
def sbatch_environment() -> Iterator[None]:
    """Without the variables of the job that this command runs in, which sbatch would take over."""
    inside = {
        name: value
        for name, value in os.environ.items()
        if name.startswith(("SLURM_", "SBATCH_"))
        and name not in KEPT
        and "SLURM_JOB_ID" in os.environ
    }
    for name in inside:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(inside)


@contextmanager
def sbatch_errors() -> Iterator[None]:
    """What sbatch writes to stderr becomes one line."""
    kept = os.dup(2)
    with tempfile.TemporaryFile() as said:
        os.dup2(said.fileno(), 2)
        try:
            yield
        except subprocess.CalledProcessError as error:
            said.seek(0)
            lines = said.read().decode(errors="replace").strip().splitlines()
            reason = lines[-1] if lines else f"exit code {error.returncode}"
            raise ConfigError(
                f"sbatch refused the job: {reason}", do="correct the --slurm-* flags"
            ) from None
        finally:
            os.dup2(kept, 2)
            os.close(kept)
