"""The thread that notices a hang and ends the run with code 78.

Ranks 0 to 5 each read the heartbeats of all ranks. When some rank's progress has stood still for
the limit, rank 0 acts; where rank 0 is itself the one that hangs (stopped, GIL held), rank 1 acts
1.2 s later, and so on: who creates RUN/logs/hang.json leads, there is one.

    1  the leader asks the ranks of its host for their stacks (`stacks`); ranks of other hosts see
       hang.json and write their own
    2  `diagnose` names the odd rank, RUN/logs/hang.txt gets the text and the clusters of stacks
    3  one FATAL 78 line, exit_reason.json, exit with 78; the others see hang.txt and leave, too
    4  a shell that outlives the leader by a second kills what is left on its host: SIGKILL reaches
       stopped processes. Launchers do the same over hosts

A watcher that was itself not running (a suspended job, a stopped machine) starts its clocks anew:
it does not blame others for its own sleep.
"""

from __future__ import annotations

import faulthandler
import io
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_ext.errors import HangError, note_exit_reason, report
from megatron_ext.resilience import heartbeat, stacks
from megatron_ext.resilience.diagnose import Verdict, diagnose
from megatron_ext.resilience.heartbeat import Heartbeat

NUM_WATCHERS = 6
"""Ranks that read all heartbeats; the others look for hang.json only."""
STAGGER_S = 1.2
OWN_SLEEP_S = 5.0
"""A gap between two looks that means that the watcher itself did not run."""
SHOT_S = 1.0
"""How long after the leader's exit what is left is killed."""


@dataclass(frozen=True)
class Limits:
    """When no news is bad news, in seconds."""

    normal: float
    slow: float  # in the phases of heartbeat.SLOW_PHASES and in the first step

    @property
    def poll(self) -> float:
        return min(1.0, self.normal / 10)

    @property
    def beats(self) -> float:
        """Without a beat for so long a rank is silent."""
        return min(self.normal, max(2.0, self.normal / 2))

    def of(self, beat: Heartbeat) -> float:
        return max(self.normal, self.slow) if beat.is_slow else self.normal


class Clocks:
    """For each rank, when this watcher last saw its counters change, on this watcher's clock."""

    def __init__(self) -> None:
        self.beats: dict[int, Heartbeat] = {}
        self._progress_at: dict[int, float] = {}
        self._beat_at: dict[int, float] = {}

    def look(self, found: Mapping[int, Heartbeat], now: float) -> None:
        """Take in what the files say now."""
        for rank, beat in found.items():
            old = self.beats.get(rank)
            if old is None or old.progress != beat.progress:
                self._progress_at[rank] = now
            if old is None or old.beats != beat.beats:
                self._beat_at[rank] = now
            self.beats[rank] = beat

    def restart(self) -> None:
        """Forget all ages: they are the watcher's own sleep."""
        self.beats.clear()

    def still(self, limits: Limits, now: float) -> bool:
        """True where a rank has made no progress for its limit. Every rank has the longest limit of
        all: who waits for a rank that loads may wait as long as loading may take.
        """
        active = {rank: beat for rank, beat in self.beats.items() if beat.phase != "end"}
        if not active:
            return False
        limit = max(limits.of(beat) for beat in active.values())
        return any(now - self._progress_at[rank] > limit for rank in active)

    def silent(self, limits: Limits, now: float) -> dict[int, str]:
        """Ranks that do not beat -> why, as far as this host can tell."""
        return {
            rank: why_silent(beat, socket.gethostname())
            for rank, beat in self.beats.items()
            if beat.phase != "end" and now - self._beat_at[rank] > limits.beats
        }


def is_alive(beat: Heartbeat, host: str) -> bool:
    """True where the process of the heartbeat still is (for ranks of this host)."""
    return beat.host == host and heartbeat.start_ticks(beat.pid) == beat.start_ticks


def why_silent(beat: Heartbeat, host: str) -> str:
    """Words for a rank that does not beat."""
    if beat.host != host:
        return f"no sign of life from host {beat.host}"
    if not is_alive(beat, host):
        return "the process is gone"
    if heartbeat.process_state(beat.pid) in ("T", "t"):
        return "the process is stopped (SIGSTOP)"
    return "alive, but its GIL is held (no Python thread runs)"


class Watcher:
    """The thread of one rank. `evaluate` is called with all heartbeats after each look (the
    straggler check), on rank 0.
    """

    def __init__(
        self,
        logs: Path,
        rank: int,
        world_size: int,
        token: int,
        limits: Limits | None,
        evaluate: Callable[[Mapping[int, Heartbeat]], None] | None = None,
    ) -> None:
        self._logs, self._rank, self._world_size, self._token = logs, rank, world_size, token
        self._limits, self._evaluate = limits, evaluate
        self._clocks = Clocks()
        self._first_still: float | None = None
        self._host = socket.gethostname()

    def run(self, stopped: threading.Event) -> None:
        """The thread's loop."""
        poll = self._limits.poll if self._limits else 1.0
        poll = max(poll, self._world_size / 1000)  # a file takes about 50 us to read
        last = time.monotonic()
        while not stopped.wait(poll):
            now = time.monotonic()
            if now - last > poll + OWN_SLEEP_S:
                self._clocks.restart()
                self._first_still = None
            self._look(now, stopped)
            last = time.monotonic()

    def _look(self, now: float, stopped: threading.Event) -> None:
        if self._limits and self._has_leader():
            self._follow()
        if self._rank >= NUM_WATCHERS and self._limits is None:
            return
        if self._rank < NUM_WATCHERS:
            self._clocks.look(self._read(), now)
            if self._evaluate is not None:
                self._evaluate(self._clocks.beats)
        if self._limits and self._is_hang(now) and not stopped.is_set():
            self._lead(now)

    def _read(self) -> dict[int, Heartbeat]:
        found = (heartbeat.read(self._logs, rank, self._token) for rank in range(self._world_size))
        return {beat.rank: beat for beat in found if beat is not None}

    def _is_hang(self, now: float) -> bool:
        """True when it is this rank's turn to act."""
        if not self._clocks.still(self._limits, now):
            self._first_still = None
            return False
        if self._first_still is None:
            self._first_still = now
        return now - self._first_still >= STAGGER_S * self._rank

    @property
    def _flag(self) -> Path:
        return self._logs / "hang.json"

    @property
    def _text(self) -> Path:
        return self._logs / "hang.txt"

    def _has_leader(self) -> bool:
        try:
            return json.loads(self._flag.read_text())["token"] == self._token
        except (OSError, ValueError, KeyError):
            return False

    def _follow(self) -> None:
        """Another rank leads: write the stack, say nothing more, leave when it has written."""
        sys.stderr = io.StringIO()  # connections break now: one FATAL line for all ranks is enough
        path = stacks.stack_path(self._logs, self._rank)
        deadline = time.monotonic() + stacks.WAIT_S + 2
        while time.monotonic() < deadline and not self._text.exists():
            time.sleep(0.02)
        if not path.exists() or not path.stat().st_size:
            self._write_own_stack()
        os._exit(HangError.code)

    def _write_own_stack(self) -> None:
        """Not by the signal, whose handler would walk this thread's frames while they change."""
        with stacks.stack_path(self._logs, self._rank).open("w") as file:
            faulthandler.dump_traceback(file, all_threads=True)

    def _lead(self, now: float) -> None:
        """Say what is wrong and end the run; returns only where another rank was first."""
        beats, silent = dict(self._clocks.beats), self._clocks.silent(self._limits, now)
        verdict = diagnose(beats, silent)
        if not self._claim(verdict):
            return
        try:
            self._collect_stacks(beats, silent)
            clusters = stacks.cluster(stacks.read_all(self._logs, sorted(beats)))
            self._speak(verdict, beats)
            _publish(self._text, f"{verdict.text}\n\n{stacks.format_clusters(clusters)}")
        except OSError as error:
            sys.stderr.write(f"no stacks: {error}\n")
        finally:
            self._shoot(beats)
            os._exit(HangError.code)

    def _speak(self, verdict: Verdict, beats: Mapping[int, Heartbeat]) -> None:
        """The FATAL line and exit_reason.json, both in the name of the odd rank."""
        odd = verdict.ranks[0]
        seconds = f"no progress for {self._limits.normal:g} s (--hang-limit-s)"
        error = HangError(
            f"{seconds}: {verdict.text}; rank {odd} is on host {beats[odd].host}",
            do="look at the stacks in hang.txt, then start again with --load (without that node"
            " where a process was stopped or gone)",
            path=self._text,
        )
        error.step = max(beat.step for beat in beats.values())
        note_exit_reason(error, odd)
        report(error, odd)

    def _claim(self, verdict: Verdict) -> bool:
        """Create hang.json; False where another rank has. A full disk does not stop the leader."""
        temporary = self._flag.with_suffix(f".{self._rank}.tmp")
        content = {"token": self._token, "leader": self._rank, "time": time.time()}
        try:
            temporary.write_text(json.dumps({**content, **asdict(verdict)}) + "\n")
            os.link(temporary, self._flag)
        except FileExistsError:
            return False
        except OSError as error:
            sys.stderr.write(f"no {self._flag}: {error}\n")
        finally:
            temporary.unlink(missing_ok=True)
        return True

    def _collect_stacks(self, beats: Mapping[int, Heartbeat], silent: Mapping[int, str]) -> None:
        """Stacks of the ranks of this host, and a word about those that cannot answer."""
        asked = []
        for rank, beat in beats.items():
            if rank == self._rank:
                self._write_own_stack()
                continue
            is_stopped = heartbeat.process_state(beat.pid) in ("T", "t")
            if is_alive(beat, self._host) and not is_stopped and stacks.ask(beat.pid):
                asked.append(rank)
            elif rank in silent:
                words = f"no stack of rank {rank} on {beat.host}: {silent[rank]}\n"
                stacks.stack_path(self._logs, rank).write_text(words)
        stacks.wait_for(self._logs, asked)

    def _shoot(self, beats: Mapping[int, Heartbeat]) -> None:
        """Let a shell kill, a second from now, what is left of this run on this host."""
        pids = [
            str(beat.pid)
            for rank, beat in beats.items()
            if rank != self._rank and is_alive(beat, self._host)
        ]
        if pids:
            subprocess.Popen(
                ["/bin/sh", "-c", f"sleep {SHOT_S}; kill -9 {' '.join(pids)}"],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )


def _publish(path: Path, text: str) -> None:
    """Write a file so that it is seen whole or not at all."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def forget(logs: Path) -> None:
    """Remove what an earlier run left here (rank 0, before the others look)."""
    for name in ("hang.json", "hang.txt"):
        (logs / name).unlink(missing_ok=True)
