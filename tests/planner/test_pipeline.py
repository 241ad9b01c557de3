"""Schedules as data: order, bubble and memory against the published formulas."""

from __future__ import annotations

import pytest

from megatron_ext.pipeline import draw
from megatron_ext.pipeline.program import in_flight, one_f_one_b, program_of
from megatron_ext.pipeline.simulate import DeadlockError, simulate

SIZES = [(pp, vpp, m) for pp in (1, 2, 4, 8) for vpp in (1, 2, 4) for m in (8, 16) if m >= pp]


def timeline(pp: int, vpp: int, m: int):
    return simulate(program_of(pp, vpp, m), lambda r, a: (1 if a.kind == "F" else 2) / vpp)


def test_the_order_of_two_ranks():
    text = [" ".join(map(str, actions)) for actions in one_f_one_b(2, 3)]
    assert text == ["F0 F1 B0 F2 B1 B2", "F0 B0 F1 B1 F2 B2"]


@pytest.mark.parametrize(("pp", "vpp", "m"), SIZES)
def test_every_pass_runs_once_and_the_bubble_is_the_formula(pp, vpp, m):
    """Bubble over ideal time: (pp-1)/(vpp*m) (PTD-P, section 2.2)."""
    program = program_of(pp, vpp, m)
    for actions in program:
        assert len(set(actions)) == len(actions) == 2 * m * vpp
    assert timeline(pp, vpp, m).makespan / (3 * m) - 1 == pytest.approx((pp - 1) / (vpp * m))


def test_micro_batches_in_flight():
    """1F1B holds pp - rank; interleaving by 2 on 8 ranks 11.5 stages' worth on rank 0 (of 8)."""
    assert in_flight(program_of(4, 1, 8)) == [[4], [3], [2], [1]]
    assert sum(in_flight(program_of(8, 2, 16))[0]) / 2 == 11.5


def test_a_blocking_message_costs_its_sender():
    run = [
        simulate(one_f_one_b(2, 4), lambda r, a: 1.0, lambda a, b: 0.5, overlapped)
        for overlapped in (True, False)
    ]
    assert run[0].makespan < run[1].makespan
    assert run[0].sent == (0.0, 0.0) and run[1].sent == (2.0, 2.0)


def test_a_program_that_waits_for_itself_is_found():
    program = one_f_one_b(2, 2)
    program[1] = program[1][::-1]
    with pytest.raises(DeadlockError):
        simulate(program, lambda r, a: 1.0)


def test_pictures():
    line = timeline(4, 2, 8)
    assert len(draw.text(line).splitlines()) == 4
    picture = draw.svg(line, "a < b", [("optimizer", 1.0)])
    assert picture.count("<rect") == 4 * 2 * 8 * 2 + 4 and "a &lt; b" in picture
