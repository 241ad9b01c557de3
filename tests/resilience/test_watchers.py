"""Whichever ranks are stopped, one that runs notices: made-up heartbeats, a made-up clock."""

from __future__ import annotations

import random
import threading

import pytest

from megatron_ext.resilience.clocks import Limits, on_duty, turn, watchers
from megatron_ext.resilience.heartbeat import PHASES, HeartbeatFile, heartbeat_path
from megatron_ext.resilience.watcher import Watcher

LIMITS = Limits(normal=40.0, slow=4000.0)
TOKEN = 1


def test_watchers_are_spread_over_hosts():
    assert watchers([f"node{rank // 8}" for rank in range(24)]) == [0, 8, 16, 1, 9, 17]
    assert watchers([f"node{rank // 8}" for rank in range(800)]) == [0, 8, 16, 24, 32, 40]
    assert watchers(["a", "a", "a", "b"]) == [0, 3, 1, 2]
    assert watchers(["here"] * 9) == [0, 1, 2, 3, 4, 5] and watchers(["here"]) == [0]


@pytest.mark.parametrize("size", [2, 7, 8, 24])
def test_some_running_rank_is_on_duty(size):
    draw, chosen = random.Random(size), watchers([f"node{rank // 8}" for rank in range(size)])
    for _ in range(300):
        silent = set(draw.sample(range(size), draw.randrange(size)))
        running = [rank for rank in range(size) if rank not in silent]
        awake = [rank for rank in running if on_duty(rank, chosen, silent, size)]
        assert awake
        assert min(turn(rank, chosen, silent) for rank in awake) == 0
    assert turn(0, [0, 8, 1], set()) == 0 and turn(8, [0, 8, 1], {0}) == 0
    assert turn(1, [0, 8, 1], {0}) == 1 and turn(5, [0, 8, 1], {8}) == 2


class Run:
    """Heartbeats of `size` ranks of which `silent` are stopped, and the watchers of the others."""

    def __init__(self, logs, size, silent, phase, monkeypatch):
        self.now, self.silent, self.phase = 0.0, silent, PHASES.index(phase)
        self.led: list[tuple[int, float]] = []
        self.files = [HeartbeatFile(heartbeat_path(logs, r), r, size, TOKEN) for r in range(size)]
        for file in self.files:
            file.step_done(8, 1.0, 0.1)
        run = self

        def lead(self, now):
            run.led.append((self._rank, now))

        monkeypatch.setattr(Watcher, "_lead", lead)
        hosts = ["here"] * size if size < 16 else [f"node{rank // 8}" for rank in range(size)]
        self.watchers = [Watcher(logs, rank, hosts, TOKEN, LIMITS) for rank in range(size)]

    def go_on(self, until_s, is_stopped):
        """Time passes; ranks that run beat and look."""
        stopped = threading.Event()
        while self.now < until_s and not self.led:
            self.now += LIMITS.poll
            running = [r for r in range(len(self.files)) if not (is_stopped and r in self.silent)]
            for rank in running:
                self.files[rank].beat()
                if not is_stopped:
                    self.files[rank].enter(self.phase, 10, 1)
            for rank in running:
                self.watchers[rank]._look(self.now, stopped)


@pytest.mark.parametrize("phase", ["forward", "save"])
@pytest.mark.parametrize(
    ("size", "silent", "leader"),
    [
        (9, range(6), 6),  # all six that watch on one host of old
        (16, range(8), 8),  # a whole host
        (16, {0, 8, 1, 9, 2, 10}, 3),  # all chosen ones
        (8, {7}, 0),
        (8, {0}, 1),
        (9, set(range(9)) - {4}, 4),
    ],
)
def test_stopped_ranks_are_noticed(tmp_path, monkeypatch, size, silent, leader, phase):
    """By the normal limit and a few turns, also while the others save."""
    run = Run(tmp_path, size, set(silent), phase, monkeypatch)
    run.go_on(5, is_stopped=False)
    run.go_on(120, is_stopped=True)
    ((rank, at),) = run.led[:1]
    assert rank == leader
    assert 40 < at - 5 <= 40 + 8, at
