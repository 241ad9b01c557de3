"""The small optimisations against brute force."""

from __future__ import annotations

import itertools
import random

import pytest

from megatron_ext.config.stages import Split, split_layers
from megatron_ext.planner.choose import best_strategies, split_evenly, stages_text


@pytest.mark.parametrize("seed", range(20))
def test_galvatrons_recurrence_is_the_optimum(seed):
    dice = random.Random(seed)
    layers, strategies, budget = dice.randint(1, 5), dice.randint(1, 4), dice.randint(0, 30)
    times = [[dice.random() for _ in range(strategies)] for _ in range(layers)]
    memory = [[dice.randint(1, 9) for _ in range(strategies)] for _ in range(layers)]
    every = itertools.product(range(strategies), repeat=layers)
    costs = [
        sum(times[i][s] for i, s in enumerate(pick))
        for pick in every
        if sum(memory[i][s] for i, s in enumerate(pick)) <= budget
    ]
    found = best_strategies(times, memory, budget)
    assert (found is None) == (not costs)
    if found:
        assert found[0] == pytest.approx(min(costs))
        assert sum(times[i][s] for i, s in enumerate(found[1])) == pytest.approx(found[0])


@pytest.mark.parametrize("seed", range(20))
def test_stages_are_cut_as_evenly_as_possible(seed):
    dice = random.Random(seed)
    costs = [dice.uniform(0.5, 2) for _ in range(dice.randint(4, 9))]
    pp, head, tail = dice.randint(1, 4), dice.random(), dice.random()
    speeds = [dice.uniform(0.5, 1) for _ in range(pp)]

    def largest(cuts) -> float:
        edges = [0, *cuts, len(costs)]
        loads = [sum(costs[a:b]) for a, b in itertools.pairwise(edges)]
        loads[0] += head
        loads[-1] += tail
        return max(load / speed for load, speed in zip(loads, speeds))

    best = min(largest(cuts) for cuts in itertools.combinations(range(1, len(costs)), pp - 1))
    counts = split_evenly(costs, pp, 1, head, tail, speeds)
    assert sum(counts) == len(costs) and min(counts) >= 1
    assert largest(list(itertools.accumulate(counts))[:-1]) == pytest.approx(best, rel=1e-6)


def test_the_text_is_a_layout_that_the_program_reads():
    text = stages_text([2, 1, 3, 1], mtp_layers=1)
    table = split_layers(Split(7, pp=2, vpp=2, layout=text, mtp_layers=1))
    assert [len(chunk.layers) for rank in table for chunk in rank] == [2, 3, 1, 1]
    assert split_evenly([1.0] * 3, 4) is None
