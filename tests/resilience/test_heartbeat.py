"""What is written into the mapped file is what other processes read; recording changes nothing."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch._C._distributed_c10d import ProcessGroup, Work

from megatron_ext.mesh.calls import METHODS
from megatron_ext.mesh.forks import run_ranks
from megatron_ext.resilience.collectives import Recorder, recording
from megatron_ext.resilience.heartbeat import (
    NUM_ENTRIES,
    NUM_GROUPS,
    NUM_STEPS,
    PHASES,
    HeartbeatFile,
    heartbeat_path,
    parse,
    read,
)
from megatron_ext.resilience.members import expand, shorten


@pytest.fixture
def file(tmp_path):
    return HeartbeatFile(heartbeat_path(tmp_path, 3), 3, 8, token=7)


def test_who_and_where(file, tmp_path):
    file.enter(PHASES.index("forward"), 12, 2)
    beat = read(tmp_path, 3, token=7)
    assert (beat.rank, beat.world_size, beat.pid) == (3, 8, os.getpid())
    assert (beat.step, beat.micro_batch, beat.phase) == (12, 2, "forward")
    assert beat.is_slow and beat.waiting is None and beat.ring == ()
    assert read(tmp_path, 3, token=8) is None and read(tmp_path, 4, token=7) is None
    before = beat
    file.beat()
    after = read(tmp_path, 3, token=7)
    assert (after.beats, after.progress) == (before.beats + 1, before.progress)


def test_rings_keep_the_last(file, tmp_path):
    file.enter(PHASES.index("backward"), 1, 1)
    group = file.add_group("DATA_PARALLEL_GROUP", "5", "0:8:1")
    for seq in range(1, NUM_ENTRIES + 11):
        entry = file.enter_collective(group, 0, -1, seq, 4 * seq)
        if seq < NUM_ENTRIES + 10:
            file.exit_collective(entry)
    for step in range(1, NUM_STEPS + 6):
        file.step_done(step, 0.5, 0.125)
    file.wait(entry)
    beat = read(tmp_path, 3, token=7)
    assert [c.seq for c in beat.ring] == list(range(11, NUM_ENTRIES + 11))
    assert beat.waiting == beat.ring[-1] and beat.waiting.t_exit == 0
    assert beat.ring[0].t_exit >= beat.ring[0].t_enter > 0
    assert beat.waiting.members == tuple(range(8)) and beat.waiting.phase == "backward"
    assert str(beat.waiting) == "all_reduce #522 of group DATA_PARALLEL_GROUP (2088 B)"
    assert sorted(beat.steps_after(0)) == list(range(6, NUM_STEPS + 6))
    assert beat.steps_after(NUM_STEPS + 4) == {NUM_STEPS + 5: (0.5, 0.125)}
    assert not beat.is_slow


def test_more_groups_than_places(file, tmp_path):
    places = [file.add_group(f"GROUP {n}", str(n), "") for n in range(NUM_GROUPS + 3)]
    assert places[-1] == NUM_GROUPS - 1 and max(places) == NUM_GROUPS - 1


@pytest.mark.parametrize("data", [b"", b"HBEAT01\n", bytes(50_000)])
def test_other_files_are_no_heartbeat(data):
    assert parse(data) is None


@pytest.mark.parametrize("ranks", [[0], [0, 1, 2], [1, 5, 9, 13], [3, 1], [0, 1, 4, 5]])
def test_members_as_text(ranks):
    assert expand(shorten(ranks)) == tuple(ranks)


def test_too_many_members_are_not_listed():
    assert expand(shorten([n * n for n in range(100)])) == () == expand("nonsense")


def _collectives(folder: str) -> list[list[tuple]]:
    """Every kind of call on this rank, first bare and then recorded: results and the ring."""
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    pair = torch.distributed.new_group([0, 1], group_desc="PAIR")

    def calls() -> list[float]:
        one, two = torch.full((2,), rank + 1.0), torch.zeros(4)
        torch.distributed.all_reduce(one)
        torch.distributed.all_gather_into_tensor(two, one, group=pair)
        work = torch.distributed.all_reduce(one, async_op=True)
        work.wait()
        torch.distributed.broadcast(two, src=1, group=pair)
        torch.distributed.barrier()
        other = torch.zeros(2)
        if rank == 0:
            torch.distributed.send(one, 1)
            torch.distributed.recv(other, 1)
        else:
            torch.distributed.recv(other, 0)
            torch.distributed.send(one, 0)
        return [*one.tolist(), *two.tolist(), *other.tolist()]

    bare = calls()
    stock = {name: getattr(ProcessGroup, name) for name in METHODS if hasattr(ProcessGroup, name)}
    stock_wait = Work.wait
    file = HeartbeatFile(heartbeat_path(Path(folder), rank), rank, 2, token=1)
    recorder = Recorder(file)
    with recording(recorder):
        recorded = calls()
    assert all(getattr(ProcessGroup, name) is method for name, method in stock.items())
    assert Work.wait is stock_wait and recorder.blocked_s > 0
    calls()  # not recorded any more
    torch.distributed.destroy_process_group()
    ring = read(Path(folder), rank, 1).ring
    seen = [(c.op, c.group, c.seq, c.num_bytes, c.peer, c.members, c.t_exit > 0) for c in ring]
    return [bare, recorded, seen]


def test_recording_two_ranks(tmp_path):
    (bare, recorded, seen), (bare1, recorded1, seen1) = run_ranks(_collectives, 2, str(tmp_path))
    assert bare == recorded and bare1 == recorded1
    both = (0, 1)
    assert (
        seen[:5]
        == seen1[:5]
        == [
            ("all_reduce", "default_pg", 1, 8, -1, both, True),
            ("all_gather", "PAIR", 1, 16, -1, both, True),
            ("all_reduce", "default_pg", 2, 8, -1, both, True),
            ("broadcast", "PAIR", 2, 16, -1, both, True),
            ("barrier", "default_pg", 3, 0, -1, both, True),
        ]
    )
    assert [(c[0], c[4]) for c in seen[5:]] == [("send", 1), ("recv", 1)]
    assert [(c[0], c[4]) for c in seen1[5:]] == [("recv", 0), ("send", 0)]
