"""The launcher's look at its ranks from outside: whoever is stopped, somebody sees it.

The ranks watch each other (megatron_ext/resilience/watcher.py); they cannot when all are stopped,
when the one rank of a run holds its GIL, before they have a heartbeat, or when they should be gone.
Signs of life of a rank of this machine are:

    before its heartbeat     the process is not stopped (/proc/PID/stat)
    with it                  its beats go on
    after it (phase "end")   none: it only has to leave

A rank without one for --hang-limit-s ends the run with 78: at once where all ranks are silent, else
when its peers had their time to do it. A launcher that was itself not running (a suspended machine,
a paused container, Ctrl-Z) starts its clocks anew.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_ext.errors import exit_reason, report, write_exit_reason
from megatron_ext.resilience import hang, heartbeat
from megatron_ext.resilience.clocks import NUM_WATCHERS, OWN_SLEEP_S, STAGGER_S, Limits, why_silent
from megatron_ext.resilience.diagnose import Verdict, diagnose, name_ranks
from megatron_ext.resilience.heartbeat import Heartbeat

PEERS_S = STAGGER_S * NUM_WATCHERS
"""How long after the limit the ranks' own watchers are waited for."""
LEADER_S = 20.0
"""How long a rank that leads may take until its peers are gone."""


@dataclass(frozen=True)
class Sight:
    """What is seen of one rank: its heartbeat, once it has one, and the state of its process."""

    beat: Heartbeat | None
    state: str

    def sign(self, now: float) -> object:
        """Changes as long as the rank lives."""
        if self.beat is None:
            return "stopped" if self.state in heartbeat.STOPPED else now
        return "end" if self.beat.phase == "end" else self.beat.beats

    def why(self) -> str:
        """Words for a rank without a sign of life."""
        if self.beat is None:
            return "the process is stopped (SIGSTOP) before its first heartbeat"
        if self.beat.phase == "end" and self.state not in heartbeat.STOPPED:
            return "the process does not end"
        return why_silent(self.beat, socket.gethostname())


class Ages:
    """Since when each rank shows no sign of life; pure."""

    def __init__(self, poll_s: float) -> None:
        self._poll_s = poll_s
        self._last: float | None = None
        self._seen: dict[int, tuple[object, float]] = {}  # rank -> (last sign, when it was new)

    def look(self, sights: Mapping[int, Sight], now: float) -> None:
        """Take in what is seen now."""
        if self._last is not None and now - self._last > self._poll_s + OWN_SLEEP_S:
            self._seen.clear()
        self._last = now
        for rank, sight in sights.items():
            sign = sight.sign(now)
            if self._seen.get(rank, (None,))[0] != sign:
                self._seen[rank] = (sign, now)
        self._seen = {rank: self._seen[rank] for rank in sights}

    def silent(self, seconds: float, now: float) -> list[int]:
        """The ranks without a sign of life for longer than that."""
        return sorted(rank for rank, (_, at) in self._seen.items() if now - at > seconds)


class Outside:
    """Looks at the ranks of this machine.

    Args:
        logs: RUN/logs.
        hang_limit_s: --hang-limit-s; 0: nobody looks.
        world_size: ranks of all machines.
        reason: the file of exit_reason.json.
        pids: rank -> process id of those that live.
    """

    def __init__(
        self,
        logs: Path,
        hang_limit_s: float,
        world_size: int,
        reason: Path,
        pids: Callable[[], Mapping[int, int]],
    ) -> None:
        self._logs, self._world_size, self._reason = logs, world_size, reason
        self._limits = Limits(hang_limit_s, hang_limit_s)
        self._pids = pids
        self.poll_s = self._limits.poll if hang_limit_s > 0 else None
        self._ages = Ages(self.poll_s or 0)
        self._since: float | None = None

    def is_over(self, now: float) -> bool:
        """One look; True where the ranks have to be killed now: why is said and written."""
        if self.poll_s is None:
            return False
        sights = {rank: self._sight(rank, pid) for rank, pid in self._pids().items()}
        self._ages.look(sights, now)
        if not self._ages.silent(self._limits.normal, now):
            self._since = None
            return False
        self._since = now if self._since is None else self._since
        tokens = {sight.beat.token for sight in sights.values() if sight.beat}
        if any(hang.has_leader(self._logs, token) for token in tokens):
            return now - self._since > LEADER_S
        silent = self._ages.silent(self._limits.beats, now)
        if len(silent) < self._world_size and now - self._since < PEERS_S:
            return False
        why = {rank: sights[rank].why() for rank in silent}
        return self._end(why, max(tokens, default=None))

    def doing(self) -> tuple[str, bool]:
        """(what the first rank does now, whether there is nothing to save yet), for people."""
        for rank, pid in sorted(self._pids().items()):
            beat = self._sight(rank, pid).beat
            if beat is not None:
                return f"{beat.phase} of step {beat.step}", beat.phase in ("start", "load")
        return ("starting", True) if self.poll_s else ("training", False)

    def _sight(self, rank: int, pid: int) -> Sight:
        beat = heartbeat.read(self._logs, rank)
        is_own = beat is not None and (beat.pid, beat.start_ticks) == (
            pid,
            heartbeat.start_ticks(pid),
        )
        return Sight(beat if is_own else None, heartbeat.process_state(pid))

    def _end(self, why: Mapping[int, str], token: int | None) -> bool:
        """Say it; False where a rank was faster."""
        ranks = range(self._world_size) if token is not None else ()
        found = (heartbeat.read(self._logs, rank, token) for rank in ranks)
        beats = {beat.rank: beat for beat in found if beat is not None}
        verdict = self._verdict(beats, why)
        if token is not None and not hang.claim(self._logs, token, -1, verdict):
            return False
        error = hang.hang_error(self._logs, verdict, beats, self._limits.normal)
        try:
            hang.collect_stacks(self._logs, socket.gethostname(), beats, why)
            hang.publish(self._logs, verdict, beats)
        except OSError as refused:
            error.do = f"no stacks ({refused}); start again with --load"
        write_exit_reason(exit_reason(error, verdict.ranks[0]), self._reason)
        report(error, verdict.ranks[0])
        return True

    def _verdict(self, beats: Mapping[int, Heartbeat], why: Mapping[int, str]) -> Verdict:
        known = {rank: words for rank, words in why.items() if rank in beats}
        if known:
            return diagnose(beats, known)
        text = f"{name_ranks(why)}: {why[min(why)]}"
        return Verdict(tuple(sorted(why)), "silent", text)
