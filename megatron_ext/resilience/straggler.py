"""A rank that is slower than its peers, found from who waits for whom (the idea of C4, HPCA 2025).

Ranks meet in collectives, so their steps take equally long; what differs is how much of a step a
rank is blocked there. A rank that never waits is the one that the others wait for:

    busy = step time - time blocked in collectives                  on each rank's own clock
    late = (busy - median busy of the peers) / step time            share of the step it costs

    rank 0  busy 1.0 s  blocked 0.3 s  |  late 0
    rank 1  busy 1.0 s  blocked 0.3 s  |  late 0
    rank 2  busy 1.3 s  blocked 0.0 s  |  late 0.3 / 1.3 = 23 %

Peers are the other ranks of the same pipeline stage: they have the same work. A stage of one rank
is compared with its own first steps instead, relative to how the others changed. Every `interval`
steps the last PATIENCE * `interval` are judged, 16 by default: a rank is a straggler where the
median of its lateness is over the set share and it was late, by PART of the share at least, in
MOST of these steps. So a neighbour that takes a core for some steps is none, and +30 % is found
19 steps after it began at the latest.

No clock is shared, no collective is made: steps are read from the heartbeat files. Hot experts are
work, too: where the load is uneven, the busiest rank is late and is named, rightly or not.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_ext.resilience.heartbeat import Heartbeat

PATIENCE = 4
MOST = 0.85
PART = 2 / 3
WARM_UP = 2
"""First steps of a process that are not judged: they compile and allocate."""


@dataclass(frozen=True)
class Finding:
    """A rank that has been late for PATIENCE intervals."""

    step: int
    rank: int
    host: str
    late_s: float  # per step, median of the judged steps
    share: float  # of the step time
    why: str = ""

    def __str__(self) -> str:
        return (
            f"straggler rank={self.rank} host={self.host} step={self.step}"
            f" late_s={self.late_s:.4f} share_of_step={self.share:.1%}"
        ) + (f": {self.why}" if self.why else "")

    def record(self) -> dict[str, object]:
        """The line of metrics.jsonl."""
        return {
            "step": self.step,
            "straggler_rank": self.rank,
            "straggler_host": self.host,
            "straggler_late_s": self.late_s,
            "straggler_share": self.share,
        }


def references(
    busy_R: Sequence[float], stage_R: Sequence[int], baseline_R: Sequence[float] | None
) -> list[float]:
    """What each rank's busy time of a step should be: the median of its peers, or for a rank
    without peers its baseline times the median change of all others; its own time where nothing is
    known.
    """
    should = []
    for rank, busy in enumerate(busy_R):
        others = [other for other in range(len(busy_R)) if other != rank]
        peers = [busy_R[other] for other in others if stage_R[other] == stage_R[rank]]
        if peers:
            should.append(statistics.median(peers))
        elif others and baseline_R:
            changes = [busy_R[other] / max(baseline_R[other], 1e-9) for other in others]
            should.append(baseline_R[rank] * statistics.median(changes))
        else:
            should.append(busy)
    return should


class Stragglers:
    """Judges interval after interval; `feed` wants the steps in order."""

    def __init__(self, interval: int, share: float, stage_R: Sequence[int]) -> None:
        self._interval, self._share, self._stage_R = interval, share, list(stage_R)
        self._last: deque[tuple[list[float], float]] = deque(maxlen=PATIENCE * interval)
        self._known: set[int] = set()
        self._baseline_R: list[float] | None = None
        self._after = -1  # the last step that was judged
        self._num_judged = 0

    def feed(self, busy_RS: Sequence[Sequence[float]], seconds_S: Sequence[float]) -> list[tuple]:
        """`interval` steps: busy seconds of each rank and step, seconds of each step -> (rank, late
        seconds, share) of each rank that has just become a straggler.
        """
        if self._baseline_R is None:
            self._baseline_R = [statistics.median(busy_S) for busy_S in busy_RS]
        for busy_R, seconds in zip(zip(*busy_RS), seconds_S):
            should_R = references(busy_R, self._stage_R, self._baseline_R)
            late_R = [busy - should for busy, should in zip(busy_R, should_R)]
            self._last.append((late_R, max(seconds, 1e-9)))
        if len(self._last) < PATIENCE * self._interval:
            return []
        return [found for rank in range(len(self._stage_R)) if (found := self._judge(rank))]

    def _judge(self, rank: int) -> tuple[int, float, float] | None:
        """A new straggler, from the kept steps."""
        shares = [late_R[rank] / seconds for late_R, seconds in self._last]
        share = statistics.median(shares)
        num_late = sum(one > PART * self._share for one in shares)
        if share <= self._share / 2:
            self._known.discard(rank)
        if share <= self._share or num_late < MOST * len(shares) or rank in self._known:
            return None
        self._known.add(rank)
        return rank, statistics.median(late_R[rank] for late_R, _ in self._last), share

    def look(self, beats: Mapping[int, Heartbeat]) -> list[Finding]:
        """Judge every interval that all ranks have finished since the last look."""
        if len(beats) < max(2, len(self._stage_R)):
            return []
        ranks = range(len(self._stage_R))
        num_steps = min(beats[rank].num_steps for rank in ranks)
        if num_steps - self._num_judged < self._interval + WARM_UP:
            return []
        of_rank = [beats[rank].steps_after(self._after) for rank in ranks]
        new = sorted(set.intersection(*(set(steps) for steps in of_rank)))
        if self._after < 0:
            new = new[WARM_UP:]
        findings = []
        for at in range(0, len(new) - self._interval + 1, self._interval):
            window = new[at : at + self._interval]
            self._after = window[-1]
            self._num_judged += self._interval
            busy_RS = [[steps[s][0] - steps[s][1] for s in window] for steps in of_rank]
            seconds_S = [statistics.median(steps[s][0] for steps in of_rank) for s in window]
            findings += [
                Finding(int(window[-1]), rank, beats[rank].host, late, share)
                for rank, late, share in self.feed(busy_RS, seconds_S)
            ]
        return findings
