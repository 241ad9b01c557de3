"""A rank that hangs is named within 10 s of the limit, with everybody's stack; nobody is left."""

from __future__ import annotations

import json
import os
import re
import time

import pytest

from megatron_ext.mesh.forks import start_ranks
from megatron_ext.resilience.heartbeat import parse
from tests.resilience.ranks_that_hang import HANG_AT, train_and_hang

LIMIT_S = 5.0
NUM_RANKS = 4


def run_until_gone(fault, victim, run, flags):
    """(exit codes, seconds from the fault to the report) of a run that hangs."""
    argv = [*flags, "--train-iters", "200", "--run-dir", str(run)]
    argv += ["--hang-limit-s", str(LIMIT_S), "--hang-slow-limit-s", "60"]
    processes, _ = start_ranks(train_and_hang, NUM_RANKS, fault, victim, argv)
    deadline = time.monotonic() + 90
    try:
        for process in processes:
            process.join(max(0.1, deadline - time.monotonic()))
        return [process.exitcode for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.join()


def heartbeats(run):
    return [parse((run / f"logs/rank_{r}.heartbeat").read_bytes()) for r in range(NUM_RANKS)]


@pytest.mark.parametrize(
    ("fault", "victim", "kind", "words"),
    [
        ("stop", 0, "silent", "stopped (SIGSTOP)"),  # rank 0, that would have led
        ("gil", 2, "silent", "GIL is held"),
        ("loader", 3, "busy", "stuck in data"),
        ("skip", 2, "missed", "rank 2 waits in all_reduce"),
    ],
)
def test_a_hang_is_named(fault, victim, kind, words, tmp_path, tiny_flags, capfd, monkeypatch):
    monkeypatch.delenv("PRETRAIN_MOE_EXIT_REASON", raising=False)
    run = tmp_path / "run"
    codes = run_until_gone(fault, victim, run, tiny_flags)
    verdict = json.loads((run / "logs/hang.json").read_text())
    assert verdict["ranks"] == [victim] and verdict["kind"] == kind, verdict
    assert words in verdict["text"]
    beats = heartbeats(run)
    waiting = [beat for beat in beats if beat.rank != victim and beat.waiting]
    assert waiting and re.search(r"it misses all_\w+ #\d+ of group \S+", verdict["text"])
    assert verdict["collective"] in {str(beat.waiting) for beat in waiting}

    left = {beat.rank: code for beat, code in zip(beats, codes)}
    assert left.pop(victim) == (-9 if kind == "silent" else 78), codes
    assert set(left.values()) == {78}, codes
    assert not [beat.pid for beat in beats if os.path.exists(f"/proc/{beat.pid}")]

    last_progress = max(step for beat in beats for step in beat.steps_after(0))
    assert last_progress in (HANG_AT - 1, HANG_AT)
    texts = {r: (run / f"logs/rank_{r}.stack").read_text() for r in range(NUM_RANKS)}
    assert all("train_and_hang" in t for r, t in texts.items() if r != victim), texts
    expected = f"no stack of rank {victim}" if fault == "stop" else "ranks_that_hang.py"
    assert expected in texts[victim]
    if fault != "skip":  # which waits in the same line as the others, for another group
        assert f"1 rank(s): {victim}\n" in (run / "logs/hang.txt").read_text()

    fatal = [line for line in capfd.readouterr().err.splitlines() if line.startswith("FATAL")]
    assert len(fatal) == 1 and fatal[0].startswith(f"FATAL 78 rank={victim} step={HANG_AT} "), fatal
    reason = json.loads((run / "exit_reason.json").read_text())
    assert (reason["code"], reason["rank"]) == (78, victim) and reason["what"] in fatal[0]
    detected = verdict["time"] - fault_time(run)
    assert detected <= LIMIT_S + 10, detected


def fault_time(run) -> float:
    """When the fault happened: the last record of metrics.jsonl was written before it."""
    return (run / "metrics.jsonl").stat().st_mtime
