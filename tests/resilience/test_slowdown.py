"""Steps that take twice as long: a line within ten of them, and who is waited for."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_ext.resilience import heartbeat
from megatron_ext.resilience.heartbeat import OPS, PHASES, HeartbeatFile, heartbeat_path, read
from megatron_ext.resilience.slowdown import PATIENCE, Pace, Slow, Slowdowns
from megatron_ext.resilience.straggler import Finding
from tests.resilience.test_straggler import busy_times


def lines(seconds_S) -> list[tuple[int, str]]:
    pace = Pace()
    return [(n, text) for n, s in enumerate(seconds_S, 1) if (text := pace.feed(n, float(s)))]


@pytest.mark.parametrize("num_ranks", [2, 4, 16])
def test_no_false_alarm_in_clean_steps(num_ranks):
    rng = np.random.default_rng(num_ranks)
    for _ in range(8):
        busy_RS = busy_times(rng, num_ranks, 1000, bursts=20)
        assert lines(busy_RS.max(axis=0) + 0.2) == []


def test_ten_steps_of_twice_the_time_draw_one_line():
    rng = np.random.default_rng(0)
    for _ in range(100):
        seconds_S = rng.lognormal(0.0, 0.05, 200)
        start = int(rng.integers(PATIENCE, 100))
        seconds_S[start:] *= 2.5
        ((step, text),) = lines(seconds_S)
        assert step == start + PATIENCE and f"steps {start + 1} to {step} take 2." in text
        assert lines(seconds_S[: start + PATIENCE - 1]) == []


def test_slow_steps_that_are_few_count_as_usual():
    assert lines([1.0] * 40 + ([3.0] * 9 + [1.0] * 31) * 5) == []
    assert lines([9.0] * 5 + [1.0] * 50) == []


class Ranks:
    """Heartbeats of ranks that meet in `calls` collectives a step."""

    def __init__(self, folder, size, monkeypatch, calls=5):
        self.folder, self.size, self.calls, self.now, self.seq = folder, size, calls, 50.0, 0
        monkeypatch.setattr(heartbeat.time, "monotonic", lambda: self.at)
        self.at = self.now
        self.files = [HeartbeatFile(heartbeat_path(folder, r), r, size, 1) for r in range(size)]
        self.groups = [file.add_group("DP", "1", f"0:{size}:1") for file in self.files]

    def step(self, step, work_R):
        """Each rank works work_R[rank] / calls before each collective; all leave with the last."""
        start = self.now
        for file in self.files:
            file.enter(PHASES.index("forward"), step, 1)
        for _ in range(self.calls):
            self.seq += 1
            entries = []
            for rank, file in enumerate(self.files):
                self.at = self.now + work_R[rank] / self.calls
                number = self.groups[rank]
                op = OPS.index("all_reduce")
                entries.append(file.enter_collective(number, op, -1, self.seq, 8))
            self.at = self.now = self.now + max(work_R) / self.calls
            for file, entry in zip(self.files, entries):
                file.exit_collective(entry)
        for file in self.files:
            # a stopped rank seems to be blocked as long as the others
            file.step_done(step, self.now - start, 0.5 * (self.now - start))

    def beats(self):
        return {rank: read(self.folder, rank, 1) for rank in range(self.size)}


def findings(ranks, work_of, num_steps, rng):
    found, slowdowns = [], Slowdowns(ranks.size)
    for step in range(1, num_steps + 1):
        ranks.step(step, work_of(step) * rng.lognormal(0.0, 0.05, ranks.size))
        if step % 3 == 0:  # the watcher looks once a second
            found += slowdowns.look(ranks.beats())
    return found


@pytest.mark.parametrize(("size", "victim"), [(2, 0), (4, 2), (8, 7)])
def test_who_waits_for_whom(tmp_path, monkeypatch, size, victim):
    """0.12 s, then 0.61 s: of 300 ms it runs for 50."""
    slow = np.full(size, 0.12)
    slow[victim] = 0.61
    rng = np.random.default_rng(size)
    ranks = Ranks(tmp_path, size, monkeypatch)
    found = findings(ranks, lambda step: slow if step > 40 else np.full(size, 0.12), 65, rng)
    (finding,) = found
    assert isinstance(finding, Finding) and finding.rank == victim and finding.step == 50
    assert finding.late_s == pytest.approx(0.49, abs=0.12) and 0.6 < finding.share < 0.9
    others = [rank for rank in range(size) if rank != victim]
    assert "steps 41 to 50 take 0.6" in str(finding) and str(finding).startswith("straggler rank=")
    assert f"{', '.join(map(str, others))} wait" in str(finding)


def test_where_all_are_slower_nobody_is_blamed(tmp_path, monkeypatch):
    rng = np.random.default_rng(1)
    ranks = Ranks(tmp_path, 4, monkeypatch)
    (found,) = findings(ranks, lambda step: np.full(4, 0.1 if step <= 30 else 0.3), 60, rng)
    assert isinstance(found, Slow) and "no rank in particular is waited for" in str(found)
    assert found.step == 40 and set(found.record()) == {"step", "slow_steps"}
