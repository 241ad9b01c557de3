"""Start the ranks of pretrain_moe.py on this machine and let them end together.

    python launch/local.py 4 --config configs/quickstart.yaml --train-iters 20

1. `pretrain_moe.py --dry-run` checks the flags once, without torch: a mistake is one FATAL line
   and exit code 64.
2. Each rank gets torchrun's environment variables and a process group of its own.
3. When one rank fails the others are stopped. The exit code is that of the rank that failed first
   (128 + n for signal n), so the codes of megatron_ext/errors.py reach the caller.

SIGTERM and Ctrl-C reach the ranks as SIGTERM (with --exit-signal-handler they save and stop),
SIGUSR1 and SIGUSR2 as themselves; a second Ctrl-C kills. Where this process is killed, the kernel
kills the ranks.

torchrun does the same over many machines; its own traceback after a failed rank is why this file
exists.
"""

from __future__ import annotations

import ctypes
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

PROGRAM = Path(__file__).resolve().parent.parent / "pretrain_moe.py"
WITHOUT_RANKS = ("--help", "-h", "--print-config", "--dry-run")
FATAL_CODES = range(64, 80)
USAGE = 64
GRACE_S = 10
"""How long the others may go on after a rank ended with a FATAL code: they end by themselves."""
PORTS = range(20_000, 32_000)
"""Below Linux's ephemeral ports: no outgoing connection takes one before rank 0 listens on it."""
PR_SET_PDEATHSIG = 1
FORWARDED = {
    signal.SIGINT: signal.SIGTERM,
    signal.SIGTERM: signal.SIGTERM,
    signal.SIGHUP: signal.SIGTERM,
    signal.SIGUSR1: signal.SIGUSR1,
    signal.SIGUSR2: signal.SIGUSR2,
}


def free_port() -> int:
    """A TCP port of the loopback that nobody listens on."""
    for port in random.sample(PORTS, 100):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise OSError(f"no free port in {PORTS.start}..{PORTS.stop - 1}")


def rank_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    """torchrun's variables for one rank, and one thread where OMP_NUM_THREADS says nothing."""
    defaults = {
        "OMP_NUM_THREADS": "1",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        "PRETRAIN_MOE_START": time.strftime("%Y%m%d-%H%M%S"),
    }
    return {
        **defaults,
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def check(flags: list[str]) -> int:
    """The exit code of a dry run with these flags; its FATAL lines go to stderr."""
    command = [sys.executable, str(PROGRAM), *flags, "--dry-run"]
    return subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode


class Ranks:
    """The processes of one launch."""

    def __init__(self, world_size: int, flags: list[str]) -> None:
        self._flags, self._world_size = flags, world_size
        self._libc = ctypes.CDLL(None)
        self._parent = os.getpid()
        self._num_interrupts = 0
        self.rank_of: dict[int, int] = {}
        """Process id -> rank, of those that are alive."""

    def start(self) -> None:
        """Start all ranks; signals are theirs from here on."""
        for number in (*FORWARDED, signal.SIGALRM):
            signal.signal(number, self._on_signal)
        port = free_port()
        for rank in range(self._world_size):
            process = subprocess.Popen(
                [sys.executable, str(PROGRAM), *self._flags],
                env=rank_environment(rank, self._world_size, port),
                stdin=subprocess.DEVNULL,
                preexec_fn=self._in_child,
            )
            process.returncode = 0  # waited for below with waitpid; Popen must not do it again
            self.rank_of[process.pid] = rank

    def _in_child(self) -> None:
        """A process group of its own (Ctrl-C comes from us, once), and no life without us."""
        os.setpgid(0, 0)
        self._libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != self._parent:
            os._exit(1)

    def wait(self) -> int:
        """Wait for all ranks; the exit code of the first that failed, else 0."""
        first_code = 0
        while self.rank_of:
            pid, status = os.waitpid(-1, 0)
            rank = self.rank_of.pop(pid, None)
            if rank is None or status == 0:
                continue
            code = os.waitstatus_to_exitcode(status)
            code = 128 - code if code < 0 else code
            if first_code == 0:
                first_code = code
                self._first_failure(rank, pid, code)
        signal.alarm(0)
        return first_code

    def _first_failure(self, rank: int, pid: int, code: int) -> None:
        if code in FATAL_CODES:
            signal.alarm(GRACE_S)
            return
        self._send(signal.SIGKILL)
        if self._num_interrupts == 0:
            _say(f"rank {rank} (process {pid}) {_ending(code)}; the other ranks were stopped")

    def _on_signal(self, number: int, frame: object) -> None:
        if number == signal.SIGALRM:
            self._send(signal.SIGKILL)
            return
        if number in (signal.SIGINT, signal.SIGTERM):
            self._num_interrupts += 1
        forwarded = FORWARDED[signal.Signals(number)]
        self._send(signal.SIGKILL if self._num_interrupts > 1 else forwarded)

    def _send(self, number: int) -> None:
        for pid in list(self.rank_of):
            try:
                os.killpg(pid, number)
            except ProcessLookupError:
                continue  # it has just ended; waitpid tells how


def _ending(code: int) -> str:
    if code <= 128:
        return f"ended with exit code {code}"
    hint = ", often a lack of memory" if code == 128 + signal.SIGKILL else ""
    return f"was killed by {signal.Signals(code - 128).name}{hint}"


def _say(text: str) -> None:
    sys.stderr.write(f"launch: {text}\n")
    sys.stderr.flush()


def main(argv: list[str]) -> int:
    """`N flags...` -> the exit code of the run."""
    if not argv or not argv[0].isdigit() or int(argv[0]) < 1:
        given = f"the first word is {argv[0]!r}" if argv else "no word given"
        sys.stderr.write(
            f"FATAL {USAGE} rank=0 what=the number of ranks is missing: {given}"
            " do=bash launch/run.sh 4 --config configs/quickstart.yaml\n"
        )
        return USAGE
    world_size, flags = int(argv[0]), argv[1:]
    if any(flag.partition("=")[0] in WITHOUT_RANKS for flag in flags):
        environment = {**os.environ, "WORLD_SIZE": str(world_size)}
        return subprocess.run(
            [sys.executable, str(PROGRAM), *flags], env=environment, check=False
        ).returncode
    flags = [*flags, "--world-size", str(world_size)]  # RUN/config.yaml may name another number
    code = check(flags)
    if code:
        return code
    ranks = Ranks(world_size, flags)
    ranks.start()
    return ranks.wait()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
