"""Steps that take twice as long as before, and who waits for whom in them.

`straggler` compares how long ranks are busy. A rank that is stopped and continued all the time, or
whose processor is taken away, is stopped inside collectives as well and seems to wait there. What
it cannot hide is when it arrives: in each collective of several ranks

    waits[r] = arrival of the last - arrival of r        r waits for the last one

The rank that the others wait for, in the kept collectives of the slow steps, is named where that is
SHARE of the time and twice what any other rank costs; else the line says that all are slower.

A step is slow from TWICE times the median of the steps before on; PATIENCE slow steps in a row make
a line, and are what later steps are compared with. Arrivals are on one clock within a host, over
hosts on that of the wall.
"""

from __future__ import annotations

import statistics
from collections import defaultdict, deque
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_ext.resilience.diagnose import name_ranks
from megatron_ext.resilience.heartbeat import POINT_TO_POINT, Heartbeat
from megatron_ext.resilience.straggler import WARM_UP, Finding

PATIENCE = 10
TWICE = 2.0
SHARE = 0.2
KEPT = 64
"""Steps whose median is the usual time; there are PATIENCE at least."""


@dataclass(frozen=True)
class Slow:
    """Steps that are slow, with nobody to wait for."""

    step: int
    text: str

    def __str__(self) -> str:
        return f"slow {self.text}; no rank in particular is waited for"

    def record(self) -> dict[str, object]:
        """The line of metrics.jsonl."""
        return {"step": self.step, "slow_steps": str(self)}


class Pace:
    """Judges the seconds of each step; pure."""

    def __init__(self) -> None:
        self.usual: deque[float] = deque(maxlen=KEPT)
        self.slow: list[tuple[int, float]] = []

    def feed(self, step: int, seconds: float) -> str | None:
        """The next step; words about the last PATIENCE ones where all are slow, once."""
        if len(self.usual) < PATIENCE or seconds < TWICE * statistics.median(self.usual):
            self.usual.extend([s for _, s in self.slow] + [seconds])
            self.slow.clear()
            return None
        self.slow.append((step, seconds))
        if len(self.slow) < PATIENCE:
            return None
        now, before = statistics.median(s for _, s in self.slow), statistics.median(self.usual)
        text = (
            f"steps {self.slow[0][0]} to {step} take {now:.3f} s,"
            f" {now / before:.1f} times the {before:.3f} s of the steps before"
        )
        self.usual.clear()
        self.usual.extend(s for _, s in self.slow)
        self.slow.clear()
        return text


def waits(beats: Mapping[int, Heartbeat], first: int) -> dict[int, dict[int, float]]:
    """last rank -> {rank that waits for it: share of the kept time since step `first`}."""
    is_one_clock = len({beat.host for beat in beats.values()}) == 1
    arrivals: dict[tuple[str, int], dict[int, float]] = defaultdict(dict)
    for rank, beat in beats.items():
        shift = 0.0 if is_one_clock else beat.wall_s - beat.monotonic_s
        for call in beat.ring:
            if call.step >= first and call.op not in POINT_TO_POINT:
                arrivals[call.group_id, call.seq][rank] = call.t_enter + shift
    times = [at for found in arrivals.values() for at in found.values()]
    span = max(times, default=0.0) - min(times, default=0.0)
    found: dict[int, dict[int, float]] = defaultdict(lambda: defaultdict(float))
    for at_R in arrivals.values():
        last = max(at_R, key=at_R.get)
        for rank, at in at_R.items():
            if rank != last and span > 0:
                found[last][rank] += (at_R[last] - at) / span
    return found


def who(beats: Mapping[int, Heartbeat], first: int) -> tuple[int, list[int], float] | None:
    """(the rank that is waited for, who waits, share of the time), None where none stands out."""
    found = waits(beats, first)
    shares = {last: max(waiting.values()) for last, waiting in found.items()}
    top = max(shares, key=shares.get, default=None)
    if top is None or shares[top] < SHARE:
        return None
    if any(2 * share > shares[top] for last, share in shares.items() if last != top):
        return None
    waiting = [rank for rank, share in found[top].items() if share >= shares[top] / 2]
    return top, sorted(waiting), shares[top]


class Slowdowns:
    """Looks at the heartbeats of all `num_ranks` ranks."""

    def __init__(self, num_ranks: int) -> None:
        self._num_ranks, self._after, self._pace = num_ranks, -1, Pace()

    def look(self, beats: Mapping[int, Heartbeat]) -> list[Finding | Slow]:
        """Judge the steps that all ranks have finished since the last look."""
        if len(beats) < self._num_ranks:
            return []
        of_rank = [beat.steps_after(self._after) for beat in beats.values()]
        new = sorted(set.intersection(*(set(steps) for steps in of_rank)))
        skipped = WARM_UP if self._after < 0 else 0
        self._after = new[-1] if len(new) > skipped else self._after
        found = []
        for step in new[skipped:]:
            seconds = statistics.median(steps[step][0] for steps in of_rank)
            text = self._pace.feed(step, seconds)
            if text:
                found.append(self._finding(beats, step, seconds, text))
        return found

    def _finding(self, beats, step: int, seconds: float, text: str) -> Finding | Slow:
        guilty = who(beats, step - PATIENCE + 1)
        if guilty is None:
            return Slow(step, text)
        rank, waiting, share = guilty
        verb = "waits" if len(waiting) == 1 else "wait"
        why = f"{text}; {name_ranks(waiting)} {verb} for it"
        return Finding(step, rank, beats[rank].host, share * seconds, share, why)
