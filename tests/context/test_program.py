"""Programs are causal attention, once: proven without ranks; so are their balance and traffic."""

from dataclasses import replace

import pytest

from megatron_ext.context.plan import backward_steps, forward_steps
from megatron_ext.context.program import Compute, Move, Step, check, traffic, work
from megatron_ext.context.strategies import all_gather, build, hierarchical, ring, ulysses


@pytest.mark.parametrize("reach", [None, 0, 1, 3])
@pytest.mark.parametrize("cp", [1, 2, 3, 4, 6, 8])
@pytest.mark.parametrize("strategy", [ring, all_gather, ulysses])
def test_every_pair_once(strategy, cp, reach):
    check(strategy(cp, reach))


@pytest.mark.parametrize("reach", [None, 2])
@pytest.mark.parametrize("sizes", [(2, 2), (2, 4), (4, 2), (3, 2), (1, 4), (4, 1)])
def test_every_pair_once_on_two_levels(sizes, reach):
    check(hierarchical(*sizes, reach))


@pytest.mark.parametrize("cp", [2, 3, 4, 8])
def test_all_ranks_work_equally_in_every_step(cp):
    area = 2 * cp * (2 * cp) / 2
    for program in (ring(cp), all_gather(cp), ulysses(cp)):
        steps = work(program)
        assert all(len(set(row)) == 1 for row in steps), program.name
        assert sum(map(sum, steps)) == pytest.approx(area)


def test_a_ring_keeps_neighbours_busy_and_nobody_else():
    for step in (*forward_steps(ring(4)), *backward_steps(ring(4))):
        assert all(move.target == (move.source + 1) % 4 for move in step.moves)


def test_only_what_is_looked_at_travels():
    """The last chunk is seen by itself alone; a gather sends early chunks to more ranks."""
    sent = {move.chunk for step in ring(4).steps for move in step.moves}
    assert sent == set(range(7))
    to = {chunk: 0 for chunk in range(8)}
    for move in all_gather(4).steps[0].moves:
        to[move.chunk] += 1
    assert to == {0: 3, 1: 3, 2: 3, 3: 3, 4: 3, 5: 2, 6: 1, 7: 0}


def test_a_window_makes_the_gather_an_exchange_with_neighbours():
    whole, near = all_gather(8), all_gather(8, reach=1)
    count = {p: sum(traffic(p.steps).values()) for p in (whole, near)}
    assert count[whole] == 84 and count[near] == 14  # 15 borders, one of them within rank 7


def test_pieces_that_move():
    """Per rank: kv forward; kv, dkv backward (ring); heads there, results back (a2a)."""
    assert traffic(ring(2).steps) == {("kv", 0): 1, ("kv", 1): 2}
    back = traffic(backward_steps(ring(2)))
    assert back == {("kv", 0): 1, ("kv", 1): 2, ("dkv", 0): 2, ("dkv", 1): 1}
    forward = traffic(forward_steps(ulysses(2)))
    assert forward == {(what, rank): 2 for what in ("q", "kv", "final") for rank in (0, 1)}
    back = traffic(backward_steps(ulysses(2)))
    assert back == {(what, rank): 2 for what in ("dout", "dq", "dkv") for rank in (0, 1)}


def _without_first_block(steps):
    first = replace(steps[0], computes=steps[0].computes[1:])
    return (first, *steps[1:])


WRONG = {
    "less than once": _without_first_block,
    "more or less than once": lambda steps: (*steps, Step((), steps[0].computes[:1])),
    "lacks": lambda steps: (replace(steps[0], moves=()), *steps[1:]),
    "sends what it has not": lambda steps: (Step((Move("kv", 3, 0, 1, 0),)), *steps),
    "arrives twice": lambda steps: (*steps, Step((Move("kv", 1, 0, 1, 0),))),
    "is not causal": lambda steps: (*steps, Step((), (Compute(0, (0,), (3,), 0, False),))),
}


@pytest.mark.parametrize(("said", "break_it"), WRONG.items(), ids=WRONG)
def test_a_wrong_program_is_refused(said, break_it):
    program = ring(2)
    with pytest.raises(AssertionError, match=said):
        check(replace(program, steps=break_it(program.steps)))


def test_large_groups_are_planned_quickly():
    assert build("p2p", 64) is build("p2p", 64)
    assert len(build("p2p", 64).steps) == 64
