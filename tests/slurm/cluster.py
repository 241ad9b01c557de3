"""A Slurm cluster of two nodes on this machine: munged, slurmctld, two slurmd, in one folder."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.launch.programs import ROOT, environment

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
CONFIG = """
ClusterName=pretrain-moe
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/linear
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
ReturnToService=2
KillWait=20
NodeName=n[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{first}-{last}] CPUs=2
PartitionName=all Nodes=n[1-2] Default=YES MaxTime=INFINITE State=UP
"""


def wait_until(
    what: Callable[[], object], why: str, timeout_s: float = 60, pause_s: float = 0.2
) -> object:
    """The first true value of `what()`, asked every `pause_s`."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        found = what()
        if found:
            return found
        time.sleep(pause_s)
    raise AssertionError(f"not in {timeout_s} s: {why}")


def install() -> str | None:
    """Why there is no Slurm here, None where there is one; as root it is installed if missing."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if os.getuid() != 0:
        return "slurmd wants root"
    if not missing:
        return None
    if shutil.which("apt-get") is None:
        return f"no {missing[0]}, and no apt-get to install slurm-wlm and munge"
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "check": False}
    env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    subprocess.run(["apt-get", "update"], env=env, **quiet)
    command = ["apt-get", "install", "-y", "slurm-wlm", "munge"]
    code = subprocess.run(command, env=env, **quiet).returncode
    return f"apt-get install slurm-wlm munge: exit code {code}" if code else None


def _free_ports(count: int) -> int:
    """The first of `count` neighbouring ports that nobody listens on."""
    for first in range(17_000 + os.getpid() % 1000 * 10, 31_000, 10):
        probes = [socket.socket() for _ in range(count)]
        try:
            for offset, probe in enumerate(probes):
                probe.bind(("127.0.0.1", first + offset))
        except OSError:
            continue
        finally:
            for probe in probes:
                probe.close()
        return first
    raise AssertionError("no free ports")


class Cluster:
    """The daemons; `stop` ends all of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._daemons: dict[str, subprocess.Popen] = {}
        self.port = _free_ports(10)
        host = socket.gethostname().split(".")[0]
        text = CONFIG.format(
            host=host, folder=folder, port=self.port, first=self.port + 1, last=self.port + 2
        )
        (folder / "slurm.conf").write_text(text)
        self.env = {**environment(), "SLURM_CONF": str(folder / "slurm.conf")}

    def start(self) -> None:
        """Start all daemons; returns when both nodes are idle."""
        munge = self.folder / "munge"
        munge.mkdir(mode=0o755)
        (munge / "key").write_bytes(os.urandom(128))
        (munge / "key").chmod(0o400)
        (self.folder / "state").mkdir()
        names = ("socket", "key-file", "log-file", "pid-file", "seed-file")
        files = [f"--{name}={munge / name.removesuffix('-file')}" for name in names]
        self._start("munged", "munged", "--foreground", "--force", *files)
        wait_until((munge / "socket").exists, "munged listens")
        self._start("slurmctld", "slurmctld", "-D", "-i")
        for node in ("n1", "n2"):
            self._start(node, "slurmd", "-D", "-N", node)
        wait_until(
            lambda: self.call("sinfo", "-h", "-t", "idle", "-o", "%D") == "2", "2 idle nodes"
        )

    def _start(self, name: str, *command: str) -> None:
        with (self.folder / f"{name}.out").open("wb") as log:
            self._daemons[name] = subprocess.Popen(
                command, env=self.env, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def stop(self) -> None:
        """Cancel all jobs and end all daemons."""
        self.call("scancel", "--user=root")
        self.call("scancel", "--user=root", "--full", "--signal=KILL")
        deadline = time.monotonic() + 30
        while self.call("squeue", "--noheader") and time.monotonic() < deadline:
            time.sleep(0.2)
        for name in reversed(self._daemons):
            self._daemons[name].send_signal(signal.SIGTERM)
        for daemon in self._daemons.values():
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def call(self, *command: object) -> str:
        """The output of a command of Slurm."""
        words = [str(word) for word in command]
        done = subprocess.run(
            words, env=self.env, capture_output=True, text=True, check=False, timeout=30
        )
        return done.stdout.strip()

    def submit(self, run: Path, *flags: object, options: tuple[str, ...] = ()) -> int:
        """`sbatch launch/slurm/train.sbatch` with one rank a node into `run`; the job's id."""
        env = {
            "RANKS_PER_NODE": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self.port + 3),
            "PYTHON": sys.executable,
        }
        command = ["sbatch", "--parsable", "--gpus-per-node=0", "--nodes=2", *options]
        log = ["--output", run.with_suffix(".log"), "launch/slurm/train.sbatch"]
        words = [str(word) for word in (*command, *log, *flags, "--run-dir", run)]
        done = subprocess.run(
            words, env={**self.env, **env}, cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return int(done.stdout)

    def job(self, number: int) -> dict[str, str]:
        """What `scontrol show job` says."""
        words = self.call("scontrol", "show", "job", "--oneliner", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def finish(self, number: int, timeout_s: float = 180) -> dict[str, str]:
        """The job once it has ended for good. Slurm lets a requeued job wait for two minutes; here
        a few seconds: nodes refuse a job that starts in the second in which it was ended.
        """
        hastened = {"0", None}

        def ended() -> dict[str, str] | None:
            job = self.job(number)
            restarts = job.get("Restarts")
            if job.get("JobState") == "PENDING" and restarts not in hastened:
                hastened.add(restarts)
                self.call("scontrol", "update", f"JobId={number}", "StartTime=now+4")
            running = ("PENDING", "RUNNING", "COMPLETING", "REQUEUED", "CONFIGURING", "SIGNALING")
            return None if not job or job["JobState"] in running else job

        return wait_until(ended, f"job {number} ends: {self.job(number)}", timeout_s)
