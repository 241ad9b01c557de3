"""One launch: attempts of the same run until it ends or is not worth another."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import Any

from launch import warm
from launch.outside import Outside
from launch.ranks import Failure, Ranks
from launch.reason import Reason, newest_checkpoint
from launch.restarts import Budget
from launch.words import Options
from megatron_ext import ulimits
from megatron_ext.checkpoint.identity import LAUNCH
from megatron_ext.checkpoint.starting import folders
from megatron_ext.errors import (
    EXIT_REASON,
    INTERNAL_BUG,
    HangError,
    Preempted,
    RendezvousError,
    ResourceError,
    report,
)
from megatron_ext.mesh import signals
from megatron_ext.mesh.attempt import ATTEMPT
from megatron_ext.mesh.signals import Asked, Means

RENDEZVOUS = 69
STORE_FD = "PRETRAIN_MOE_STORE_FD"
OF_RANKS = (
    *("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "ROLE_NAME", "MASTER_ADDR", "MASTER_PORT"),
    *("WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE", STORE_FD),
)
CRASHES = tuple(128 + number for number in (signal.SIGABRT, signal.SIGSEGV, signal.SIGBUS))


def say(text: str) -> None:
    """A line of the launcher's own."""
    sys.stderr.write(f"launch: {text}\n")
    sys.stderr.flush()


def interface(host: str) -> str:
    """The address of this machine that `host` is, so that only its network reaches the store; ""
    (all addresses) where it is none of them (a forwarded one), and for a name that means the
    loopback on this machine alone (Debian's 127.0.1.1).
    """
    try:
        address = socket.getaddrinfo(host, None, socket.AF_INET, socket.SOCK_STREAM)[0][4][0]
        with socket.socket() as probe:
            probe.bind((address, 0))
    except OSError:
        return ""
    is_meant = host in ("localhost", address)
    return address if is_meant or not address.startswith("127.") else ""


def open_socket(endpoint: tuple[str, int] | None) -> socket.socket:
    """The socket on which rank 0 will serve the store: any free port of the loopback, or the
    endpoint's port on its `interface`. Raises RendezvousError where that is in use.
    """
    listening = socket.socket()
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind(
            ("127.0.0.1", 0) if endpoint is None else (interface(endpoint[0]), endpoint[1])
        )
    except OSError as error:
        listening.close()
        raise RendezvousError(
            f"port {endpoint and endpoint[1]} of this machine: {error.strerror}",
            do="name another port with --rdzv-endpoint HOST:PORT",
        ) from error
    listening.listen(4096)
    listening.set_inheritable(True)
    return listening


def forget_ranks(environ: MutableMapping[str, str]) -> None:
    """Drop what torchrun or another launch has left in a shell. This process is no rank, and those
    that it starts get theirs from it; a store of torchrun's agent, say, is not there.
    """
    for name in list(environ):
        if name in OF_RANKS or name.startswith("TORCHELASTIC_"):
            del environ[name]


def rank_environment(options: Options, local_rank: int, attempt: int) -> dict[str, str]:
    """torchrun's variables for one rank but the address, and one thread where OMP_NUM_THREADS says
    nothing.
    """
    defaults = {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    return {
        **defaults,
        **os.environ,
        "RANK": str(options.node_rank * options.num_ranks + local_rank),
        "LOCAL_RANK": str(local_rank),
        "WORLD_SIZE": str(options.world_size),
        "LOCAL_WORLD_SIZE": str(options.num_ranks),
        ATTEMPT: os.environ.get(ATTEMPT, str(attempt)),
    }


class Launch:
    """A run from its first start to its exit code.

    Args:
        cfg: what `flags` mean.
        flags: of the program, the number of ranks among them.
        program: pretrain_moe.py.
    """

    def __init__(self, cfg: Any, options: Options, flags: list[str], program: Path) -> None:
        self._options, self._flags, self._program = options, flags, program
        self._device = cfg.parallel.device
        self._run, self._save = folders(cfg)
        self._has_saves = bool(cfg.checkpoint.save_interval)
        self._hang_limit_s = cfg.resilience.hang_limit_s
        self._ranks = Ranks(self._failed)
        self._reason: Reason | None = None
        self._is_warm = False
        self._asked, self._stopped_by = Asked(), 0
        self._seen_by: Outside | None = None
        self._is_owner = EXIT_REASON not in os.environ  # else a launcher above speaks for all

    def run(self) -> int:
        """All attempts; the exit code of the last."""
        for number in (*signals.ours(), signal.SIGALRM):
            signal.signal(number, self._on_signal)
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        os.environ.setdefault(LAUNCH, self._name())
        if not self._options.srun and not self._options.cold and warm.can_fork(self._device):
            self._is_warm = warm.load()
        budget = Budget(self._options.restarts)
        if budget.limit and not self._has_saves:
            say("--restarts without --save-interval: every restart begins at the first step")
        attempt = 0
        while True:
            code, step = self._attempt(attempt)
            refusal = budget.refuses(code, step, newest_checkpoint(self._save))
            if refusal is not None or self._asked.by:
                break
            attempt += 1
            say(f"restart {attempt} after code {code} at step {step}")
        if refusal:
            say(f"not started again: {refusal}")
        return code

    def _name(self) -> str:
        """One for all attempts and machines of this launch, no other launch that lives has it: only
        one has the endpoint.
        """
        if self._options.endpoint is not None:
            return "_".join(map(str, self._options.endpoint)).replace("/", "_")
        return f"{socket.gethostname()}_{os.getpid()}_{time.time_ns() // 1_000_000}"

    def _attempt(self, attempt: int) -> tuple[int, int | None]:
        """(exit code, step of the failure) of one start of all ranks."""
        name = os.environ.get(ATTEMPT, str(attempt))
        self._reason = Reason(self._run, name, os.environ[LAUNCH])
        if self._is_owner:
            self._reason.prepare()
        else:
            self._reason.path = Path(os.environ[EXIT_REASON])
        try:
            self._start_all(attempt)
        except (ResourceError, RendezvousError):
            self._ranks.kill()
            self._ranks.wait()
            raise
        first = self._ranks.wait(self._seen_by)
        if first is None:
            return 0, None
        reason = self._reason.read() or {}
        if self._is_owner:
            self._reason.publish()
        if self._stopped_by:
            return 128 + self._stopped_by, None
        return self._code(first, reason), reason.get("step")

    def _outside(self) -> Outside:
        """Who looks at the ranks of this machine while they run."""
        logs, limit_s = self._run / "logs", self._hang_limit_s
        return Outside(logs, limit_s, self._options.world_size, self._reason.path, self._ranks.pids)

    def _code(self, first: Failure, reason: Mapping[str, Any]) -> int:
        """A rank's own word counts, but not the errors of those that a killed rank left behind."""
        said = int(reason.get("code", first.code))
        is_consequence = said in (INTERNAL_BUG, RENDEZVOUS) and reason.get("pid") != first.pid
        return first.code if first.code > 128 and is_consequence else said

    def _start_all(self, attempt: int) -> None:
        """All ranks, or none: a signal that comes meanwhile goes to all of them afterwards."""
        before = signal.pthread_sigmask(signal.SIG_BLOCK, signals.SAVE_AND_LEAVE)
        try:
            if self._asked.by:
                raise self._not_started()
            self._start(attempt)
            self._seen_by = self._outside()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def _start(self, attempt: int) -> None:
        if self._options.srun:
            self._start_srun(attempt)
            return
        endpoint = self._options.endpoint
        listening = open_socket(endpoint) if self._options.node_rank == 0 else None
        if listening is not None and endpoint is None:
            endpoint = listening.getsockname()
        address = {"MASTER_ADDR": endpoint[0], "MASTER_PORT": str(endpoint[1])}
        for local_rank in range(self._options.num_ranks):
            environment = {**rank_environment(self._options, local_rank, attempt), **address}
            environment[EXIT_REASON] = str(self._reason.path)
            self._start_rank(environment, listening)
        if listening is not None:
            listening.close()

    def _start_rank(self, environment: dict[str, str], listening: socket.socket | None) -> None:
        rank, descriptors = int(environment["RANK"]), []
        if rank == 0:
            environment[STORE_FD] = str(listening.fileno())
            descriptors = [listening.fileno()]
        if self._is_warm:
            self._ranks.fork(rank, environment, self._flags)
            return
        command = [sys.executable, str(self._program), *self._flags]
        self._ranks.spawn(rank, command, environment, descriptors)

    def _start_srun(self, attempt: int) -> None:
        """This program on every node of the Slurm job, each for its own ranks."""
        options = self._options
        listing = ["scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]]
        names = subprocess.run(listing, capture_output=True, text=True, check=True).stdout.split()
        host, port = options.endpoint or (names[0], 29_500)
        endpoint = f"{host}:{port + attempt}"  # another port for each attempt
        own = [sys.executable, str(self._program.parent / "launch/local.py")]
        nodes = str(options.num_nodes)
        rendezvous = ["--nnodes", nodes, "--rdzv-endpoint", endpoint]
        cold = ["--cold"] if options.cold else []
        srun = ["srun", f"--nodes={nodes}", f"--ntasks={nodes}", "--kill-on-bad-exit=1"]
        words = [*srun, *own, *cold, *rendezvous, str(options.num_ranks), *self._options.flags]
        shared = {EXIT_REASON: str(self._reason.path.resolve()), ATTEMPT: str(attempt)}
        self._ranks.spawn(None, words, {**os.environ, **shared})

    def _failed(self, first: Failure) -> None:
        """Write down at once what a killed rank could not say, and say it to the user."""
        said = self._reason.read() or {}  # where the launcher itself ended ranks that hang
        is_ours = self._stopped_by or said.get("code") == HangError.code
        if first.rank is None or is_ours or 64 <= first.code < 80:
            return
        limit = ulimits.low_memory_limit() if first.code in CRASHES else ""
        if limit:
            error = ResourceError(f"{first}: {limit}, which may not suffice", do=ulimits.RAISE)
            report(error, first.rank)
            self._reason.write(error.code, first.rank, first.pid, error.what)
        else:
            self._reason.write(first.code, first.rank, first.pid, str(first))
        say(f"{first}; the other ranks were stopped")

    def _on_signal(self, number: int, frame: object) -> None:
        if number == signal.SIGALRM:
            self._too_late()
            return
        means = self._asked.hear(number, time.monotonic())
        text = signals.line(number, means, *self._doing())
        if text and self._is_owner:
            say(text)
        if means is Means.NOW:
            self._stop_now(number, text)
        elif means is Means.SAVE and self._ranks:
            # srun passes USR1 and USR2 on; SIGTERM would end its step at once
            self._ranks.send(signal.SIGUSR1 if self._options.srun else number)
        elif means is Means.SAVE:
            signal.alarm(int(signals.START_DEADLINE_S))

    def _stop_now(self, number: int, why: str) -> None:
        if not self._ranks:
            os._exit(128 + number)
        self._stopped_by = number
        self._reason.write(128 + number, None, os.getpid(), why)
        self._ranks.kill()

    def _doing(self) -> tuple[str, bool]:
        """(what the ranks do now, whether they have nothing to save yet)."""
        if self._seen_by is None:
            return "importing", True
        return ("training", False) if self._options.srun else self._seen_by.doing()

    def _too_late(self) -> None:
        """An alarm: the ranks had their time to leave, or the start its time to be left."""
        if self._ranks:
            self._ranks.kill()
        else:
            report(self._not_started(), 0)
            os._exit(Preempted.code)

    def _not_started(self) -> Preempted:
        return Preempted(f"{self._asked.by.name} came before the ranks started", do="start again")
