"""datatrove's executors as this program runs them.

What is ours: a `Fatal` of a task is written down where the command finds it, the log goes to files
only, a local worker that dies is an error and not a wait without end (datatrove's pool waits), and
workers end with the command.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from copy import deepcopy
from multiprocessing import get_context
from pathlib import Path

from datatrove.executor.local import LocalPipelineExecutor
from datatrove.executor.ray import RayPipelineExecutor
from datatrove.executor.slurm import SlurmPipelineExecutor
from datatrove.utils.stats import PipelineStats

from data.executors.flags import Asked
from data.executors.stages import Stage
from data.storage import disk_errors, write_json
from data.workers import end_with_parent
from megatron_ext.errors import Fatal, ResourceError

ROOT = Path(__file__).resolve().parents[2]
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)


def failure_path(logs: Path, rank: int) -> Path:
    """Where a task says why it ended."""
    return logs / "failures" / f"{rank:05d}.json"


class WritesFailures:
    """Mixed into an executor: why a task failed lies beside its log."""

    def _run_for_rank(self, rank: int, local_rank: int = 0) -> PipelineStats:
        logs = Path(self.logging_dir.path)
        failure = failure_path(logs, rank)
        failure.unlink(missing_ok=True)
        try:
            with _disk_faults(logs):
                return super()._run_for_rank(rank, local_rank)
        except Fatal as error:
            failure.parent.mkdir(exist_ok=True)
            facts = {"kind": type(error).__name__, "what": error.what}
            write_json(failure, {**facts, "do": error.do, "path": error.path})
            raise


@contextlib.contextmanager
def _disk_faults(folder: Path):
    """A full disk under datatrove's own files is a `DiskError`, too."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK:
            raise
        with disk_errors(folder):
            raise


class LocalExecutor(WritesFailures, LocalPipelineExecutor):
    """Tasks on processes of this machine."""

    shown: Callable[[], None] = staticmethod(lambda: None)

    def run(self) -> None:
        """All tasks that are not completed; raises what the first failing one raised."""
        ranks = self.get_incomplete_ranks()
        if not ranks:
            return
        self.save_executor_as_json()
        if self.workers == 1 or len(ranks) == 1:
            for rank in ranks:
                run_quietly(deepcopy(self), rank)
            return
        workers = min(self.workers, len(ranks))
        pool = ProcessPoolExecutor(workers, get_context("spawn"), end_with_parent, (os.getpid(),))
        try:
            for task in as_completed([pool.submit(run_quietly, self, rank) for rank in ranks]):
                task.result()
        except BrokenProcessPool:
            raise ResourceError(
                "a worker process died (killed, or out of memory)",
                do="run the same command again (finished shards are kept), with fewer --workers "
                "or a lower --max-document-bytes if memory is short",
                path=self.logging_dir.path,
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def run_quietly(executor: LocalExecutor, rank: int) -> None:
    """One task; datatrove's messages go to its log file and not to the terminal."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        executor._run_for_rank(rank)


class RayExecutor(WritesFailures, RayPipelineExecutor):
    """Tasks on a Ray cluster (the one of RAY_ADDRESS, else one on this machine)."""

    def run(self) -> None:
        """All tasks that are not completed."""
        import ray

        ray.init(ignore_reinit_error=True, log_to_driver=False)
        super().run()


class SlurmExecutor(WritesFailures, SlurmPipelineExecutor):
    """Tasks as one job array."""

    def get_sbatch_args(self, max_array: int = 1) -> dict:
        """datatrove's, without what the cluster shall choose."""
        given = super().get_sbatch_args(max_array)
        unset = {"mem-per-cpu": self.mem_per_cpu_gb, "partition": self.partition}
        return {key: value for key, value in given.items() if unset.get(key, True)}

    def launch_merge_stats(self) -> None:
        """No job for datatrove's own statistics: the report has ours."""


def make_executor(asked: Asked, stage: Stage, logs: Path):
    """The executor of one stage; its completions and logs lie in ``logs``."""
    shared = {"pipeline": stage.pipeline, "tasks": stage.tasks, "logging_dir": str(logs)}
    if asked.executor == "local":
        return LocalExecutor(workers=asked.workers, **shared)
    shared |= {"workers": asked.workers, "tasks_per_job": asked.tasks_per_job}
    if asked.executor == "ray":
        return RayExecutor(**shared)
    programs = Path(sys.executable).parent
    return SlurmExecutor(
        **shared,
        time=asked.slurm_time,
        partition=asked.slurm_partition,
        cpus_per_task=asked.slurm_cpus_per_task,
        mem_per_cpu_gb=asked.slurm_mem_per_cpu_gb,
        job_name=f"prepare-{stage.name}",
        qos=None,
        env_command=f"cd '{ROOT}' && export PATH='{programs}':\"$PATH\" PYTHONPATH='{ROOT}'",
        sbatch_args=dict(asked.slurm_args),
    )
