"""Stages of equal time, and which layers to recompute: small exact optimisations.

`split_evenly` cuts a row of layer costs into contiguous virtual stages whose largest pipeline rank
is as small as possible, ranks weighted by their speed (Holmes: a slower cluster gets fewer layers).

`best_strategies` is Galvatron's recurrence (arXiv 2211.13878) over layers and units of memory::

    f[l, m] = min over strategies s of  f[l-1, m - memory(l, s)] + time(l, s)
"""

from __future__ import annotations

from collections.abc import Sequence

INFINITE = float("inf")
ROUNDS = 40


def split_evenly(
    costs: Sequence[float],
    pp: int,
    vpp: int = 1,
    head: float = 0.0,
    tail: float = 0.0,
    speeds: Sequence[float] | None = None,
) -> list[int] | None:
    """Layers of each of the pp*vpp virtual stages (stage s on rank s % pp); None: too few layers.

    Args:
        head, tail: cost of the embedding (first stage) and of the loss (last stage).
        speeds: of each pipeline rank, relative.
    """
    stages = pp * vpp
    if len(costs) < stages:
        return None
    speed = [(speeds[s % pp] if speeds else 1.0) for s in range(stages)]
    low, high = 0.0, 1.001 * (sum(costs) + head + tail) / min(speed)
    best = _fill(costs, stages, high, head, tail, speed)
    for _ in range(ROUNDS):
        middle = (low + high) / 2
        found = _fill(costs, stages, middle, head, tail, speed)
        low, high = (middle, high) if found is None else (low, middle)
        best = found or best
    return best


def _fill(costs, stages: int, limit: float, head: float, tail: float, speed) -> list[int] | None:
    """Counts so that no stage takes longer than `limit`, each at least one layer; from the back, so
    that early stages, which hold more micro-batches, stay small."""
    counts, place = [0] * stages, len(costs)
    for stage in reversed(range(stages)):
        room = limit * speed[stage] - (tail if stage == stages - 1 else 0.0)
        room -= head if stage == 0 else 0.0
        while place > stage and (counts[stage] == 0 or costs[place - 1] <= room):
            place -= 1
            room -= costs[place]
            counts[stage] += 1
            if room < -1e-12:
                return None
    return counts if place == 0 else None


def stages_text(counts: Sequence[int], mtp_layers: int = 0) -> str:
    """--pipeline-model-parallel-layout of the counts: ``Et*3|t*4|t*2L``."""
    words = ["t" if n == 1 else f"t*{n}" for n in counts]
    words[0] = "E" + words[0]
    words[-1] += "m" * mtp_layers + "L"
    return "|".join(words)


def best_strategies(
    times: Sequence[Sequence[float]], memories: Sequence[Sequence[int]], budget: int
) -> tuple[float, list[int]] | None:
    """(least time, strategy of each layer) under a memory budget; None: nothing fits.

    Args:
        times, memories: [layer][strategy]; memory in whole units.
    """
    best = [0.0] * (budget + 1)
    chosen: list[list[int]] = []
    for time, memory in zip(times, memories):
        now, pick = [INFINITE] * (budget + 1), [-1] * (budget + 1)
        for units in range(budget + 1):
            for strategy, need in enumerate(memory):
                if need <= units and best[units - need] + time[strategy] < now[units]:
                    now[units] = best[units - need] + time[strategy]
                    pick[units] = strategy
        best = now
        chosen.append(pick)
    if best[budget] == INFINITE:
        return None
    units, found = budget, []
    for layer in reversed(range(len(times))):
        strategy = chosen[layer][units]
        found.append(strategy)
        units -= memories[layer][strategy]
    return best[budget], found[::-1]
