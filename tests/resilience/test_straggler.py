"""A rank that is 30 % slower is named within 20 steps; noise and neighbours raise no alarm."""

from __future__ import annotations

import json

import numpy as np
import pytest

from megatron_ext.mesh.forks import run_ranks
from megatron_ext.resilience.straggler import PATIENCE, Stragglers
from tests.resilience.ranks_that_hang import train_slowly

INTERVAL, SHARE = 4, 0.12
"""The defaults of the flags."""


def busy_times(rng, num_ranks, num_steps, *, bursts):
    """[rank][step] seconds of work: 1 s, noise of 5 % on each step, slow steps of all
    ranks together, and neighbours that take up to half of a rank's core for up to 6 steps.
    """
    busy_RS = rng.lognormal(0.0, 0.05, (num_ranks, num_steps))
    busy_RS *= rng.choice([1.0, 1.5], p=[0.95, 0.05], size=num_steps)
    for _ in range(bursts):
        rank, start = rng.integers(num_ranks), rng.integers(num_steps)
        busy_RS[rank, start : start + rng.integers(1, 7)] *= rng.uniform(1.1, 2.0)
    return busy_RS


def judge(busy_RS, stage_R):
    """[(last step of the window, rank)] of all findings; communication takes a fifth of a step."""
    stragglers, found = Stragglers(INTERVAL, SHARE, stage_R), []
    for at in range(0, busy_RS.shape[1] - INTERVAL + 1, INTERVAL):
        window = busy_RS[:, at : at + INTERVAL]
        seconds_S = window.max(axis=0) + 0.2
        found += [
            (at + INTERVAL, rank)
            for rank, _, _ in stragglers.feed(window.tolist(), seconds_S.tolist())
        ]
    return found


@pytest.mark.parametrize("num_ranks", [2, 4, 16])
def test_no_false_alarm_in_clean_steps(num_ranks):
    rng = np.random.default_rng(num_ranks)
    for _ in range(8):
        busy_RS = busy_times(rng, num_ranks, 1000, bursts=20)
        assert judge(busy_RS, [0] * num_ranks) == []


@pytest.mark.parametrize("seed", range(3))
def test_a_slow_rank_is_named_within_20_steps(seed):
    rng = np.random.default_rng(seed)
    for _ in range(100):
        num_ranks, start = int(rng.choice([2, 4, 8, 32])), int(rng.integers(20, 60))
        victim = int(rng.integers(num_ranks))
        busy_RS = busy_times(rng, num_ranks, 100, bursts=0)
        busy_RS[victim, start:] *= 1.3
        found = judge(busy_RS, [0] * num_ranks)
        assert [rank for _, rank in found] == [victim], found
        assert found[0][0] - start <= 20


def test_pipeline_stages_differ_by_nature():
    rng = np.random.default_rng(0)
    stage_R = [0, 0, 1, 1]
    busy_RS = busy_times(rng, 4, 400, bursts=5) * np.array([[1.0], [1.0], [1.6], [1.6]])
    assert judge(busy_RS, stage_R) == []
    busy_RS[1, 200:] *= 1.5  # slower than its peer, still faster than the other stage
    assert [rank for _, rank in judge(busy_RS, stage_R)] == [1]


def test_a_stage_of_one_rank_is_compared_with_its_past():
    rng = np.random.default_rng(0)
    busy_RS = busy_times(rng, 4, 400, bursts=0) * np.array([[1.0], [0.7], [1.2], [1.6]])
    assert judge(busy_RS, [0, 1, 2, 3]) == []
    busy_RS[2, 200:] *= 1.5
    ((step, rank),) = judge(busy_RS, [0, 1, 2, 3])
    assert rank == 2 and 200 < step <= 200 + INTERVAL * (PATIENCE + 1)


def test_a_slowed_rank_of_a_real_run(tmp_path, tiny_flags):
    """One of two ranks sleeps in each step: a line names it and the record is there."""
    run = tmp_path / "run"
    flags = [*tiny_flags, "--train-iters", "100", "--run-dir", str(run), "--hang-limit-s", "0"]
    run_ranks(train_slowly, 2, flags, 1, 3, 0.3)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = [line for line in lines if "straggler_rank" in line]
    assert [line["straggler_rank"] for line in found] == [1]
    assert found[0]["straggler_late_s"] > 0.15 and found[0]["straggler_host"]
    assert lines[-1]["step"] < 100, "the run was stopped when it was named"
