"""Which start of the same run this is, and what a rank owes to whoever started it.

A run is started again by launch/run.sh --restarts (PRETRAIN_MOE_ATTEMPT), by torchrun
--max-restarts (TORCHELASTIC_RESTART_COUNT) or by a requeue of Slurm (SLURM_RESTART_COUNT). Each
start meets under keys of its own in the store, so that no rank reads the address of a dead one
(gloo with torchrun: 0 of 11 restarts worked without it), and goes on from the run's own newest
checkpoint.
"""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Mapping

ATTEMPT = "PRETRAIN_MOE_ATTEMPT"
"""Environment variable: the start of a run by launch/run.sh, from 0."""

COUNTS = ("SLURM_RESTART_COUNT", ATTEMPT, "TORCHELASTIC_RESTART_COUNT")
STARTED_BY_PARENT = ("TORCHELASTIC_RUN_ID", "SLURM_STEP_ID")
PR_SET_PDEATHSIG = 1


def counts(environ: Mapping[str, str] = os.environ) -> list[int]:
    """The number of starts before this one, for each of `COUNTS`."""
    return [int(text) if (text := environ.get(name, "")).isdecimal() else 0 for name in COUNTS]


def store_prefix(environ: Mapping[str, str] = os.environ) -> str:
    """``attempt_N``, another one for each start; N joins what is not 0 of `counts` by dots."""
    requeues, *attempts = counts(environ)
    numbers = [requeues, *attempts] if requeues else [sum(attempts)]
    return "attempt_" + ".".join(map(str, numbers))


def is_restart(environ: Mapping[str, str] = os.environ) -> bool:
    """True where the same run was started before."""
    return any(counts(environ))


def has_launcher(environ: Mapping[str, str] = os.environ) -> bool:
    """True for the ranks of launch/run.sh, which speaks to the user for them."""
    return ATTEMPT in environ


def die_with_parent(environ: Mapping[str, str] = os.environ) -> None:
    """Ask the kernel to kill this rank when the torchrun or srun that started it dies.

    launch/run.sh does it for its ranks; a program started by hand may outlive its shell.
    """
    if any(name in environ for name in STARTED_BY_PARENT):
        parent = os.getppid()
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent or parent == 1:
            os.kill(os.getpid(), signal.SIGKILL)
