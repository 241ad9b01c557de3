"""When no news is bad news: pure, on the reader's own clock.

    beats      go on while a process lives and its GIL is free, whatever its main thread does
    progress   goes on while the main thread gets on

A rank whose beats have ceased for the normal limit hangs in every phase: nothing that takes long
stops them. One that beats may be in a phase in which nothing is recorded for long (SLOW_PHASES),
and then all ranks have the slow limit: they may wait for it.
"""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from megatron_ext.resilience import heartbeat
from megatron_ext.resilience.heartbeat import Heartbeat

NUM_WATCHERS = 6
"""Ranks that read all heartbeats; any other reads its own and the one before it: see `on_duty`."""
STAGGER_S = 1.2
"""How much later the next watcher acts where the one before it has not."""
OWN_SLEEP_S = 5.0
"""A gap between two looks that means that the watcher itself did not run."""


@dataclass(frozen=True)
class Limits:
    """When no news is bad news, in seconds."""

    normal: float
    slow: float  # in the phases of heartbeat.SLOW_PHASES and in the first step, while beats go on

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

    def keep(self, ranks: Collection[int]) -> None:
        """Forget all other ranks: they are not looked at any more."""
        self.beats = {rank: beat for rank, beat in self.beats.items() if rank in ranks}

    def restart(self) -> None:
        """Forget all ages: they are the watcher's own sleep."""
        self.beats.clear()

    def _active(self) -> dict[int, Heartbeat]:
        return {rank: beat for rank, beat in self.beats.items() if beat.phase != "end"}

    def still(self, limits: Limits, now: float) -> bool:
        """True where a rank has had no beat for the normal limit, or no progress for its limit.
        Every rank that beats has the longest limit of all: who waits for a rank that loads may
        wait as long as loading may take.
        """
        active = self._active()
        if not active:
            return False
        limit = max(limits.of(beat) for beat in active.values())
        return any(
            now - self._progress_at[rank] > limit or now - self._beat_at[rank] > limits.normal
            for rank in active
        )

    def without_beats(self, seconds: float, now: float) -> set[int]:
        """Ranks that have not beaten for so long."""
        return {rank for rank in self._active() if now - self._beat_at[rank] > seconds}

    def silent(self, limits: Limits, now: float) -> dict[int, str]:
        """Ranks that do not beat -> why, as far as this host can tell."""
        host = socket.gethostname()
        ranks = sorted(self.without_beats(limits.beats, now))
        return {rank: why_silent(self.beats[rank], host) for rank in ranks}


def watchers(hosts: Sequence[str]) -> list[int]:
    """The NUM_WATCHERS ranks that read all heartbeats, in the order in which they act: the first
    rank of each host, then the second. 3 hosts of 8: 0, 8, 16, 1, 9, 17.

    `hosts`: the host of each rank.
    """
    seen: Counter[str] = Counter()
    places = []
    for rank, host in enumerate(hosts):
        places.append((seen[host], rank))
        seen[host] += 1
    return [rank for _, rank in sorted(places)[:NUM_WATCHERS]]


def on_duty(rank: int, chosen: Sequence[int], silent: Collection[int], world_size: int) -> bool:
    """True where a rank reads all heartbeats: one of `chosen`, or the next after a silent one.

    So whichever ranks are stopped, chosen ones or not, somebody that runs sees it: unless all are
    stopped, one of them has a running rank behind it. (That all are stopped, the launcher sees.)
    """
    return rank in chosen or (rank - 1) % world_size in silent


def turn(rank: int, chosen: Sequence[int], silent: Collection[int]) -> int:
    """How many others may act before this rank: the chosen ones before it that beat."""
    before = chosen[: chosen.index(rank)] if rank in chosen else chosen
    return sum(other not in silent for other in before)


def is_alive(beat: Heartbeat, host: str) -> bool:
    """True where the process of the heartbeat still is (for ranks of this host)."""
    return beat.host == host and heartbeat.start_ticks(beat.pid) == beat.start_ticks


def why_silent(beat: Heartbeat, host: str) -> str:
    """Words for a rank that does not beat."""
    if beat.host != host:
        return f"no sign of life from host {beat.host}"
    if not is_alive(beat, host):
        return "the process is gone"
    if heartbeat.process_state(beat.pid) in heartbeat.STOPPED:
        return "the process is stopped (SIGSTOP)"
    return "alive, but its GIL is held (no Python thread runs)"
