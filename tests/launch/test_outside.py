"""The launcher sees ranks without a sign of life, also all at once; it blames none for a sleep."""

from __future__ import annotations

import json
import os
import random
import signal
import time

import pytest

from launch.outside import PEERS_S, Ages, Outside, Sight
from megatron_ext.resilience.heartbeat import PHASES, HeartbeatFile, heartbeat_path
from tests.launch.programs import all_gone, children_of, fatal_lines, launched, wait_for
from tests.ranks.tiny import TINY

LIMIT_S = 40.0


@pytest.fixture(autouse=True)
def no_stacks(monkeypatch):
    """The ranks of a `Machine` are this process."""
    monkeypatch.setattr("megatron_ext.resilience.stacks.ask", lambda pid: False)


class Machine:
    """Ranks of this process's number, with an `Outside` that looks at them every second."""

    def __init__(self, folder, size, with_files=None):
        self.now, self.files = 0.0, {}
        for rank in range(size) if with_files is None else with_files:
            self.files[rank] = HeartbeatFile(heartbeat_path(folder, rank), rank, size, token=5)
            self.files[rank].enter(PHASES.index("save"), 9, 1)
        self.pids = {rank: os.getpid() for rank in range(size)}
        self.reason = folder / "reason.json"
        self.outside = Outside(folder, LIMIT_S, size, self.reason, lambda: self.pids)

    def seconds_until_over(self, silent, limit=300, gaps=()):
        start = self.now
        while self.now - start < limit:
            self.now += 30 if int(self.now - start) in gaps else 1
            for rank, file in self.files.items():
                if rank not in silent:
                    file.beat()
            if self.outside.is_over(self.now):
                return self.now - start
        return None


def test_ranks_that_beat_are_left_alone_whatever_they_do(tmp_path):
    machine = Machine(tmp_path, 4)
    assert machine.seconds_until_over(silent=(), limit=1000) is None
    assert not machine.reason.exists()


@pytest.mark.parametrize("silent", [(0, 1, 2, 3), (0, 1), (3,)])
def test_silent_ranks_end_the_run(tmp_path, silent):
    """All: at the limit; some: when the others, whose watchers may do it, had their time."""
    machine = Machine(tmp_path, 4)
    machine.seconds_until_over(silent=(), limit=10)
    at = machine.seconds_until_over(silent)
    patience = 0 if len(silent) == 4 else PEERS_S
    assert LIMIT_S + patience < at <= LIMIT_S + patience + 3
    reason = json.loads(machine.reason.read_text())
    assert (reason["code"], reason["rank"], reason["step"]) == (78, silent[0], 9)
    assert "in save of step 9" in reason["what"]
    verdict = json.loads((tmp_path / "hang.json").read_text())
    assert tuple(verdict["ranks"]) == silent and verdict["leader"] == -1


def test_a_rank_that_leads_is_given_its_time(tmp_path):
    machine = Machine(tmp_path, 4)
    (tmp_path / "hang.json").write_text('{"token": 5}')
    at = machine.seconds_until_over(silent=(1,))
    assert LIMIT_S + 20 < at < LIMIT_S + 25 and not machine.reason.exists()


def test_another_launch_is_not_looked_at(tmp_path):
    """Files of dead processes of an earlier launch; the ranks of this one import still."""
    machine = Machine(tmp_path, 2)
    machine.pids = {0: os.getppid(), 1: os.getppid()}
    assert machine.seconds_until_over(silent=(0, 1)) is None


def test_ranks_that_should_be_gone(tmp_path):
    machine = Machine(tmp_path, 2)
    for file in machine.files.values():
        file.close()
    assert LIMIT_S < machine.seconds_until_over(silent=(0, 1)) < LIMIT_S + 3
    assert "does not end" in json.loads(machine.reason.read_text())["what"]


def test_a_machine_that_slept_blames_nobody(tmp_path):
    """All ranks and the launcher stand still together, often: no alarm in 100 sleeps."""
    machine, draw = Machine(tmp_path, 4), random.Random(1)
    for _ in range(100):
        machine.seconds_until_over(silent=(), limit=draw.randrange(1, 5))
        gap = draw.choice([7, 60, 3600, 86_400])
        machine.now += gap
        assert not machine.outside.is_over(machine.now)


def test_stopped_before_the_first_heartbeat():
    """While it imports, builds and indexes, only the state of a process is known."""
    ages = Ages(1.0)
    for now in range(100):
        ages.look({0: Sight(None, "R"), 1: Sight(None, "T"), 2: Sight(None, "S")}, now)
    assert ages.silent(40, 99) == [1]
    assert "before its first heartbeat" in Sight(None, "T").why()


def test_no_limit_no_look(tmp_path):
    assert Outside(tmp_path, 0, 1, tmp_path / "reason", dict).poll_s is None


def test_all_ranks_of_a_run_stopped_at_once(tmp_path):
    flags = ["--train-iters", "100000", "--run-dir", tmp_path, "--hang-limit-s", "3"]
    with launched(2, *TINY, *flags) as process:
        wait_for(tmp_path / "metrics.jsonl", '"step": 2')
        for pid in children_of(process.pid):
            os.kill(pid, signal.SIGSTOP)
        start = time.monotonic()
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 78, errors
    assert time.monotonic() - start < 30
    (line,) = fatal_lines(errors)
    assert "ranks 0, 1: the process is stopped (SIGSTOP), in " in line
    assert json.loads((tmp_path / "exit_reason.json").read_text())["code"] == 78
    assert all_gone(str(tmp_path), 10)
