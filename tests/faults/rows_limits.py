"""Rows in which the machine is at fault: full or slow disks, clocks that jump, few file handles, a
port in use, logs that cannot be written, no checkpoint where one was promised.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import resource
import socket
import sys
import time
from collections.abc import Callable
from typing import Any

from tests.faults import program, trial
from tests.faults.bench import COMMON_LAYOUT, Bench, judge
from tests.faults.cell import Wrong, run_cases
from tests.faults.outcome import Outcome
from tests.faults.program import Witness
from tests.faults.trial import Story

SHARD = r"/checkpoints/.*(\.safetensors|\.distcp|manifest\.json|state\.json)"
LOGS = r"/run/(metrics\.jsonl|routing\.jsonl|expert_load|tensorboard|logs/)"
CLONE_NEWNS, MS_PRIVATE = 0x20000, (1 << 18) | (1 << 14)
HOUR, TEN_YEARS = 3600.0, 10 * 365.25 * 86400.0


def failing(pattern: str, number: int, times: int, ranks: tuple[int, ...]) -> program.Prepare:
    """The first ``times`` files that match and are opened to be written fail with ``number``."""
    wanted = re.compile(pattern)

    def prepare(witness: Witness) -> None:
        left = [times if witness.rank in ranks else 0]

        def hook(event: str, args: tuple) -> None:
            if event != "open" or not left[0] or not isinstance(args[0], str | os.PathLike):
                return
            mode, flags = args[1], args[2]
            writes = any(c in mode for c in "wax+") if isinstance(mode, str) else flags & 3
            if writes and wanted.search(str(args[0])):
                left[0] -= 1
                raise OSError(number, os.strerror(number), str(args[0]))

        sys.addaudithook(hook)

    return prepare


def row_7(bench: Bench, count: int) -> list[Outcome]:
    """A disk that is full, failing, over quota or read-only while a checkpoint is written."""
    outcomes = []
    kinds = (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS)
    for number in range(count):
        kind, rank = kinds[number % len(kinds)], bench.random.randrange(trial.WORLD)
        times = (1, 10_000)[number % 2]
        prepare = failing(SHARD, kind, times, (rank,))
        outcomes.append(_disk(bench, f"{errno.errorcode[kind]} x{times} on rank {rank}", prepare))
    outcomes.append(_disk(bench, "RLIMIT_FSIZE 64 KiB on all ranks", _small_files))
    return outcomes


def _small_files(witness: Witness) -> None:
    """Files of the checkpoint cannot grow beyond 64 KiB from the second save on."""
    from megatron_ext.checkpoint.store import Checkpointer

    inner = Checkpointer.save

    def save(self: Any, state: Any, *args: Any, **settings: Any) -> Any:
        if state.progress.step >= 2 * trial.INTERVAL:
            hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
        return inner(self, state, *args, **settings)

    Checkpointer.save = save


def _disk(bench: Bench, case: str, prepare: program.Prepare) -> Outcome:
    told = trial.story(bench.plan(), prepare=prepare)

    def expect(story: Story) -> str:
        first = story.endings[0]
        if first.is_good:
            return ""
        codes = set(first.codes) - {-9}
        text = " ".join(story.fatals(0))
        if codes != {74}:
            return f"exit codes {first.codes} instead of 74: {text[:200]}"
        return "" if "path=" in text else f"no path in: {text[:200]}"

    return judge(7, case, told, bench.reference(), expect)


def row_11(bench: Bench, count: int) -> list[Outcome]:
    """--load of a folder without a checkpoint, next to another --save: refused with 65."""
    outcomes = []
    for name in ("empty", "missing", "unfinished")[:count]:
        other = bench.folder / f"no_checkpoint_{name}"
        if name != "missing":
            other.mkdir()
        if name == "unfinished":
            (other / ".writing_step_00000004_ab").mkdir()
            (other / "latest").write_text("step_00000004\n")
        told = Story(_loading(bench.plan(COMMON_LAYOUT), str(other)))
        told.endings.append(trial.attempt(told.plan, 0))
        outcomes.append(_refused(11, f"--load of a folder that is {name}", told, 65))
    return outcomes


def _loading(plan: trial.Plan, folder: str) -> trial.Plan:
    class Loading(trial.Plan):
        @property
        def argv(self) -> list[str]:
            words = super().argv
            words[words.index("--load") + 1] = folder
            return words

    return Loading(plan.out, plan.flags, plan.world)


def _refused(row: int, case: str, told: Story, code: int) -> Outcome:
    ending, fatals = told.endings[0], told.fatals(0)
    if ending.hung:
        return Outcome(row, case, "hung")
    if ending.is_good:
        return Outcome(row, case, "silent", "trained as if nothing were wrong")
    codes = set(ending.codes) - {-9}
    quality = bool(fatals) and " what=" in fatals[0] and " do=" in fatals[0]
    if codes != {code} or not quality or "Traceback" in told.logs(0):
        return Outcome(row, case, "failed", f"codes {ending.codes}: {fatals[:1]}")
    trial.clear(told.plan)
    return Outcome(row, case, "passed", figures={"messages": float(len(fatals))})


def row_17(bench: Bench, count: int) -> list[Outcome]:
    """Each fsync takes 0.2 s: saves are late, the run is the same and does not wait for each."""

    def slow(witness: Witness) -> None:
        inner = os.fsync

        def fsync(handle: int) -> None:
            time.sleep(0.2)
            inner(handle)

        os.fsync = fsync

    outcomes = []
    for _ in range(count):
        told = trial.story(bench.plan(), prepare=slow)
        blocked = [mark["blocked_s"] for mark in told.marks("saved")]
        found = judge(17, "fsync takes 0.2 s", told, bench.reference())
        found.figures["slow_disk_blocked_s"] = max(blocked, default=0.0)
        outcomes.append(found)
    return outcomes


def row_30(bench: Bench, count: int) -> list[Outcome]:
    """The wall clock jumps by an hour or ten years, on all ranks or on one, at some step."""
    outcomes = []
    for number in range(count):
        jump = (HOUR, -HOUR, TEN_YEARS, -TEN_YEARS)[number % 4]
        rank = None if number % 2 else bench.random.randrange(trial.WORLD)
        step = bench.random.randrange(0, trial.STEPS)
        told = trial.story(bench.plan(), prepare=_jumping(jump, rank, step))
        who = "all ranks" if rank is None else f"rank {rank}"
        case = f"clock {jump:+.0f} s on {who} after step {step}"
        outcomes.append(judge(30, case, told, bench.reference(), _once))
    return outcomes


def _once(told: Story) -> str:
    return "" if len(told.endings) == 1 else f"stopped: {told.fatals()[:1]}"


def _jumping(jump: float, rank: int | None, step: int) -> program.Prepare:
    def prepare(witness: Witness) -> None:
        if rank is not None and witness.rank != rank:
            return
        clock, clock_ns = time.time, time.time_ns

        def shifted() -> float:
            return clock() + (jump if witness.step >= step else 0.0)

        time.time = shifted
        time.time_ns = lambda: clock_ns() + int((shifted() - clock()) * 1e9)

    return prepare


def row_31(bench: Bench, count: int) -> list[Outcome]:
    """/dev/shm holds 1 MB, with and without checkpoints there: the run goes on, or 74 in a line."""
    if os.geteuid() != 0:
        return [Outcome(31, "/dev/shm of 1 MB", "skipped", "only root can mount one")]
    reference = bench.reference()
    memory = ("--ckpt-tiers", "memory,store")
    plans = [bench.plan(), bench.plan(COMMON_LAYOUT, *memory)][:count]
    cases = [(" ".join(plan.flags[-2:]), _small_memory(plan, reference)) for plan in plans]
    return run_cases(31, cases, limit_s=trial.LIMIT_S)


def _small_memory(plan: trial.Plan, reference: Story) -> Callable[[], None]:
    """A mount namespace of this child and its ranks, with a small /dev/shm."""

    def action() -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        private = libc.unshare(CLONE_NEWNS) or libc.mount(b"none", b"/", None, MS_PRIVATE, None)
        if private or libc.mount(b"tmpfs", b"/dev/shm", b"tmpfs", 0, b"size=1m"):
            raise Wrong("skipped", f"mount: {os.strerror(ctypes.get_errno())}")
        told = trial.story(plan, attempts=1)
        ending, fatals = told.endings[0], told.fatals(0)
        if ending.hung:
            raise Wrong("hung", "")
        if ending.is_good and (difference := trial.difference(told, reference)):
            raise Wrong("silent", difference)
        is_told = set(ending.codes) - {-9} == {74} and fatals and " path=" in fatals[0]
        if not ending.is_good and not is_told:
            raise Wrong("failed", f"codes {ending.codes}: {fatals[:1] or told.logs(0)[-200:]}")

    return action


def row_32(bench: Bench, count: int) -> list[Outcome]:
    """Few file handles: the run goes on, or ends with a line that says so."""
    outcomes = []
    for handles in (24, 40, 64, 96, 128)[:count]:

        def limit(witness: Witness, handles: int = handles) -> None:
            resource.setrlimit(resource.RLIMIT_NOFILE, (handles, handles))

        told = trial.story(bench.plan(), prepare=limit)
        outcomes.append(judge(32, f"ulimit -n {handles}", told, bench.reference(), _has_line))
    return outcomes


def _has_line(told: Story) -> str:
    if told.endings[0].is_good:
        return ""
    fatals = told.fatals(0)
    return "" if fatals and " what=" in fatals[0] else f"no FATAL line: {told.logs(0)[-300:]}"


def row_34(bench: Bench, count: int) -> list[Outcome]:
    """The rendezvous port is somebody else's: 69 in one line a rank, and not after minutes."""
    outcomes = []
    for _ in range(count):
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            port = str(taken.getsockname()[1])

            def use(witness: Witness, port: str = port) -> None:
                os.environ["MASTER_PORT"] = port

            told = Story(bench.plan())
            told.endings.append(trial.attempt(told.plan, 0, prepare=use, limit_s=90))
        outcomes.append(_refused(34, "port in use", told, 69))
    return outcomes


def row_37(bench: Bench, count: int) -> list[Outcome]:
    """Nothing can be logged: the run is the same."""
    outcomes = []
    for number in range(count):
        kind = (errno.ENOSPC, errno.EROFS, errno.EACCES)[number % 3]
        told = trial.story(bench.plan(), prepare=failing(LOGS, kind, 10_000, (0, 1, 2, 3)))
        outcomes.append(
            judge(37, f"logs: {errno.errorcode[kind]}", told, bench.reference(), _once, logs=False)
        )
    return outcomes
