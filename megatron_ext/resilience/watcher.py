"""The thread of each rank that notices a hang and ends the run with code 78.

Six ranks, spread over the hosts, read the heartbeats of all ranks (`clocks.watchers`); any other
reads the one of the rank before it, and takes part when that one falls silent. When some rank has
stood still for its limit, the first watcher that beats acts; where it does not, the next 1.2 s
later, and so on: who creates RUN/logs/hang.json leads, there is one. launch/outside.py does the
same from outside the ranks, for the case that all are stopped.

    1  the leader asks the ranks of its host for their stacks (`stacks`); ranks of other hosts see
       hang.json and write their own
    2  `diagnose` names the odd rank, `links` those that no longer hear each other, and hang.txt
       gets the text and the clusters of stacks
    3  one FATAL 78 line, exit_reason.json, exit with 78; the others see hang.txt and leave, too
    4  a shell that outlives the leader by a second kills what is left on its host: SIGKILL reaches
       stopped processes. Launchers do the same over hosts

A watcher that was itself not running (a suspended job, a stopped machine) starts its clocks anew:
it does not blame others for its own sleep.
"""

from __future__ import annotations

import faulthandler
import io
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from megatron_ext.errors import HangError, note_exit_reason, report
from megatron_ext.resilience import clocks, hang, heartbeat, links, stacks
from megatron_ext.resilience.clocks import Clocks, Limits, is_alive
from megatron_ext.resilience.diagnose import diagnose
from megatron_ext.resilience.heartbeat import Heartbeat

SHOT_S = 1.0
"""How long after the leader's exit what is left is killed."""


class Watcher:
    """The thread of one rank. `hosts`: that of each rank; `evaluate` is called with all heartbeats
    after each look (the straggler check), on rank 0.
    """

    def __init__(
        self,
        logs: Path,
        rank: int,
        hosts: Sequence[str],
        token: int,
        limits: Limits | None,
        evaluate: Callable[[Mapping[int, Heartbeat]], None] | None = None,
    ) -> None:
        self._logs, self._rank, self._world_size, self._token = logs, rank, len(hosts), token
        self._limits, self._evaluate = limits, evaluate
        self._chosen = clocks.watchers(hosts)
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
            if now - last > poll + clocks.OWN_SLEEP_S:
                self._clocks.restart()
                self._first_still = None
            self._look(now, stopped)
            last = time.monotonic()

    def _look(self, now: float, stopped: threading.Event) -> None:
        if self._limits and hang.has_leader(self._logs, self._token):
            self._follow()
        if self._evaluate is None and self._limits is None:
            return
        ranks = self._looked_at(now)
        self._clocks.keep(ranks)
        self._clocks.look(self._read(ranks), now)
        if self._evaluate is not None:
            self._evaluate(self._clocks.beats)
        is_whole = len(ranks) == self._world_size
        if self._limits and is_whole and self._is_hang(now) and not stopped.is_set():
            self._lead(now)

    def _looked_at(self, now: float) -> Collection[int]:
        """All ranks where this one is on duty, else itself and the one before it."""
        # earlier than silence counts, so that other silent ranks are known when the limit is over
        early = self._clocks.without_beats(self._limits.beats / 2, now) if self._limits else ()
        if clocks.on_duty(self._rank, self._chosen, early, self._world_size):
            return range(self._world_size)
        return {self._rank, (self._rank - 1) % self._world_size}

    def _read(self, ranks: Iterable[int]) -> dict[int, Heartbeat]:
        found = (heartbeat.read(self._logs, rank, self._token) for rank in ranks)
        return {beat.rank: beat for beat in found if beat is not None}

    def _is_hang(self, now: float) -> bool:
        """True when it is this rank's turn to act."""
        if not self._clocks.still(self._limits, now):
            self._first_still = None
            return False
        if self._first_still is None:
            self._first_still = now
        silent = self._clocks.silent(self._limits, now)
        others = clocks.turn(self._rank, self._chosen, silent)
        return now - self._first_still >= clocks.STAGGER_S * others

    def _follow(self) -> None:
        """Another rank leads: write the stack, say nothing more, leave when it has written."""
        sys.stderr = io.StringIO()  # connections break now: one FATAL line for all ranks is enough
        path, text = stacks.stack_path(self._logs, self._rank), hang.text_path(self._logs)
        with suppress(OSError):
            links.write_own(self._logs, self._rank, self._token)
        deadline = time.monotonic() + stacks.WAIT_S + links.WAIT_S + 2
        while time.monotonic() < deadline and not text.exists():
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
        if not hang.claim(self._logs, self._token, self._rank, verdict):
            return
        try:
            self._write_own_stack()
            links.write_own(self._logs, self._rank, self._token)
            others = {rank: beat for rank, beat in beats.items() if rank != self._rank}
            hang.collect_stacks(self._logs, self._host, others, silent)
            found = links.read_all(self._logs, set(beats) - set(silent), self._token)
            verdict = links.name_cut(verdict, found, beats)
            hang.rewrite(self._logs, verdict)
            error = hang.hang_error(self._logs, verdict, beats, self._limits.normal)
            note_exit_reason(error, verdict.ranks[0])
            report(error, verdict.ranks[0])
            hang.publish(self._logs, verdict, beats)
        except OSError as error:
            sys.stderr.write(f"no stacks: {error}\n")
        finally:
            self._shoot(beats)
            os._exit(HangError.code)

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
