"""The odd rank of recorded situations, and when a watcher believes in a hang."""

from __future__ import annotations

import dataclasses

import pytest

from megatron_ext.resilience.clocks import Clocks, Limits, why_silent
from megatron_ext.resilience.diagnose import diagnose, name_ranks
from megatron_ext.resilience.heartbeat import OPS, PHASES, HeartbeatFile, heartbeat_path, read
from megatron_ext.resilience.stacks import cluster, main_stack

ALL = "0:4:1"


def rank_file(folder, rank, calls, phase="forward", waits=True, groups=(("DP", "1", ALL),)):
    """A rank that made `calls` [(group index, op, seq, bytes, peer)] and waits in the last one."""
    file = HeartbeatFile(heartbeat_path(folder, rank), rank, 4, token=1)
    file.enter(PHASES.index(phase), 9, 1)
    file.step_done(8, 1.0, 0.1)
    numbers = [file.add_group(*group) for group in groups]
    for group, op, seq, size, peer in calls:
        entry = file.enter_collective(numbers[group], OPS.index(op), peer, seq, size)
        if not waits or (group, op, seq, size, peer) != calls[-1]:
            file.exit_collective(entry)
    return read(folder, rank, 1)


def all_reduce(seq, size=8, group=0):
    return (group, "all_reduce", seq, size, -1)


def test_a_rank_outside_of_the_collective(tmp_path):
    beats = {r: rank_file(tmp_path, r, [all_reduce(1), all_reduce(2)]) for r in (0, 1, 3)}
    beats[2] = rank_file(tmp_path, 2, [all_reduce(1)], "data", waits=False)
    verdict = diagnose(beats, {})
    assert verdict.ranks == (2,) and verdict.kind == "busy"
    assert verdict.collective == "all_reduce #2 of group DP (8 B)"
    assert verdict.text == (
        "rank 2 is stuck in data of step 9, micro-batch 1; it misses all_reduce #2 of group DP"
        " (8 B), in which ranks 0, 1, 3 wait"
    )


def test_a_silent_rank_is_the_one_whatever_the_others_do(tmp_path):
    beats = {r: rank_file(tmp_path, r, [all_reduce(1)]) for r in (0, 1, 3)}
    beats[2] = rank_file(tmp_path, 2, [], "backward", waits=False)
    verdict = diagnose(beats, {2: "the process is stopped (SIGSTOP)"})
    assert verdict.ranks == (2,) and "stopped" in verdict.text and "#1" in verdict.collective


def test_a_skipped_collective_with_another_group_next(tmp_path):
    groups = (("DP", "1", ALL), ("EP", "2", ALL))
    usual, odd = [all_reduce(1), all_reduce(2)], [all_reduce(1), all_reduce(1, 16, group=1)]
    beats = {r: rank_file(tmp_path, r, usual, groups=groups) for r in (0, 2, 3)}
    beats[1] = rank_file(tmp_path, 1, odd, groups=groups)
    verdict = diagnose(beats, {})
    assert verdict.ranks == (1,) and verdict.kind == "missed"
    assert verdict.collective == "all_reduce #2 of group DP (8 B)"


def test_a_skipped_collective_in_the_same_group(tmp_path):
    """Everybody is in #2, but one rank's #2 is another operation."""
    beats = {r: rank_file(tmp_path, r, [all_reduce(1), all_reduce(2)]) for r in (0, 1, 2)}
    beats[3] = rank_file(tmp_path, 3, [all_reduce(1), (0, "all_gather", 2, 64, -1)])
    verdict = diagnose(beats, {})
    assert verdict.ranks == (3,) and verdict.kind == "different"
    assert "all_gather #2 of group DP (64 B)" in verdict.text
    assert "the others did all_reduce #2" in verdict.text


def test_a_stage_that_does_not_send(tmp_path):
    receive = (0, "recv", 4, 128, 1)
    beats = {r: rank_file(tmp_path, r, [receive]) for r in (0, 2, 3)}
    beats[1] = rank_file(tmp_path, 1, [], "forward", waits=False)
    verdict = diagnose(beats, {})
    assert verdict.ranks == (1,) and verdict.collective.startswith("recv #4 with rank 1")


def test_hosts_that_only_enqueue(tmp_path):
    """NCCL: nobody blocks in a call, the one behind in its numbers is the odd one."""
    ahead, behind = [all_reduce(1), all_reduce(2), all_reduce(3)], [all_reduce(1)]
    beats = {r: rank_file(tmp_path, r, ahead, waits=False) for r in (0, 1, 3)}
    beats[2] = rank_file(tmp_path, 2, behind, waits=False)
    assert diagnose(beats, {}).ranks == (2,)


def test_everybody_stuck_alike(tmp_path):
    beats = {r: rank_file(tmp_path, r, [], "data", waits=False) for r in range(4)}
    verdict = diagnose(beats, {})
    assert verdict.ranks == (0, 1, 2, 3) and verdict.text.startswith(
        "all 4 ranks are stuck in data"
    )


def test_names():
    assert name_ranks([3]) == "rank 3" and name_ranks(range(20)) == "20 ranks (0 to 19)"


LIMITS = Limits(normal=10.0, slow=100.0)


def alive(beat, at):
    """The same rank `at` seconds later: it beats and does nothing else."""
    return dataclasses.replace(beat, beats=beat.beats + int(at * 4))


@pytest.mark.parametrize(("phase", "hang_after"), [("forward", 10), ("save", 100), ("load", 100)])
def test_a_limit_for_each_phase(tmp_path, phase, hang_after):
    beats = {r: rank_file(tmp_path, r, [], phase, waits=False) for r in range(4)}
    clocks = Clocks()
    for now in range(0, hang_after + 1, 1):
        clocks.look({r: alive(beat, now) for r, beat in beats.items()}, now)
        assert not clocks.still(LIMITS, now)
    assert clocks.still(LIMITS, hang_after + 1) and clocks.silent(LIMITS, hang_after + 1) == {}


def test_who_waits_for_a_slow_phase_is_patient(tmp_path):
    beats = {r: rank_file(tmp_path, r, [all_reduce(1)]) for r in range(3)}
    beats[3] = rank_file(tmp_path, 3, [], "load", waits=False)
    clocks = Clocks()
    for now in range(102):
        clocks.look({r: alive(beat, now) for r, beat in beats.items()}, now)
        assert clocks.still(LIMITS, now) == (now > 100)


@pytest.mark.parametrize("victims_phase", PHASES[:-1])
@pytest.mark.parametrize("others_phase", PHASES[:-1])
def test_no_beats_are_a_hang_in_every_phase(tmp_path, victims_phase, others_phase):
    """The rank that is stopped, and the others in a phase that may be slow, as in a save."""
    beats = {r: rank_file(tmp_path, r, [], others_phase, waits=False) for r in (0, 1, 3)}
    beats[2] = rank_file(tmp_path, 2, [], victims_phase, waits=False)
    clocks = Clocks()
    for now in range(11):
        clocks.look({r: alive(b, now) if r != 2 else b for r, b in beats.items()}, now)
        assert not clocks.still(LIMITS, now)
    clocks.look({r: alive(b, 11) if r != 2 else b for r, b in beats.items()}, 11)
    assert clocks.still(LIMITS, 11)
    verdict = diagnose(clocks.beats, clocks.silent(LIMITS, 11))
    assert verdict.ranks == (2,) and f"in {victims_phase} of step 9" in verdict.text


def test_ranks_that_left_and_first_steps(tmp_path):
    left = {0: rank_file(tmp_path, 0, [], "end", waits=False)}
    clocks = Clocks()
    clocks.look(left, 0)
    assert not clocks.still(LIMITS, 1e6) and clocks.silent(LIMITS, 1e6) == {}
    first = dataclasses.replace(rank_file(tmp_path, 1, [], "forward", waits=False), num_steps=0)
    for now in range(91):
        clocks.look({1: alive(first, now)}, now)
        assert not clocks.still(LIMITS, now)


def test_a_watcher_that_slept_blames_nobody(tmp_path):
    beats = {r: rank_file(tmp_path, r, [], waits=False) for r in range(4)}
    clocks = Clocks()
    clocks.look(beats, 0)
    clocks.restart()
    clocks.look(beats, 1000)
    assert not clocks.still(LIMITS, 1009) and clocks.silent(LIMITS, 1004) == {}
    assert set(clocks.silent(LIMITS, 1006)) == set(beats)


def test_words_for_silence(tmp_path):
    beat = rank_file(tmp_path, 0, [], waits=False)
    assert "GIL" in why_silent(beat, beat.host)
    assert "host" in why_silent(beat, "elsewhere")
    assert why_silent(dataclasses.replace(beat, start_ticks=1), beat.host) == "the process is gone"


DUMP = """Thread 0x00007f01 (most recent call first):
  File "threading.py", line 1 in wait

Current thread 0x0000{} (most recent call first):
  File "{}.py", line 2 in step
  File "program.py", line 3 in <module>
"""


def test_equal_stacks_are_one_cluster():
    texts = {r: DUMP.format(r, "wait") for r in range(5)}
    texts[3] = DUMP.format(9, "loader")
    assert "loader.py" in main_stack(texts[3]) and "threading.py" not in main_stack(texts[3])
    found = cluster(texts)
    assert [ranks for ranks, _ in found] == [[3], [0, 1, 2, 4]]
    assert cluster({0: "no stack of rank 0: stopped"})[0] == ([0], "no stack of rank 0: stopped")
