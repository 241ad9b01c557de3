"""Where the time of a step goes, on every rank: seconds a step, mean and worst over ranks.

Spans (observe.spans) of a step -> own seconds of each kind -> summed over the steps of a
--log-interval -> one all_gather of 13 numbers a rank -> keys of the step's record, and
RUN/ranks.json with every rank's own numbers.

    time_K_s       mean over ranks, seconds a step, mean over the steps of the interval
    time_K_max_s   of the rank with the most
    K = data, forward, backward, all_to_all, pipeline_wait, collectives, optimizer, save

The kinds are disjoint: forward and backward are without the all-to-all, the waiting for other
stages and the other collectives inside them (recomputed forwards belong to backward). `save` is
what saving blocked since the record before, so it is not part of step_time_s. What is left of
step_time_s is the schedule's own work and Python.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from megatron_ext.observe.kinds import KINDS
from megatron_ext.observe.spans import Span, own_seconds
from megatron_ext.state_files import replace_text

NAME = "ranks.json"
MEMORY = ("weights", "gradients", "optimizer", "peak")
COLUMNS = (*KINDS, "step", *(f"memory_{part}" for part in MEMORY))


def saved_seconds(between: list[Span]) -> float:
    """Seconds that saving blocked between two steps: whole spans, whatever is inside them."""
    return sum(one.end - one.start for one in between if one.kind == "save" and one.parent < 0)


class TimeSplit:
    """Sums of this rank over the steps since the last `take`."""

    def __init__(self) -> None:
        self._total = dict.fromkeys((*KINDS, "step"), 0.0)
        self._num_steps = 0

    def add(self, spans: list[Span], saved_s: float, seconds: float) -> None:
        """One step: its spans, what saving blocked before it, and how long it took."""
        for kind, own in own_seconds(spans).items():
            self._total[kind] += own
        self._total["save"] += saved_s
        self._total["step"] += seconds
        self._num_steps += 1

    def take(self) -> tuple[int, list[float]]:
        """(steps, seconds a step of each kind and of the whole), and start anew."""
        count = self._num_steps
        values = [value / max(1, count) for value in self._total.values()]
        self.__init__()
        return count, values


def gathered(values: list[float], device: torch.device) -> list[list[float]]:
    """Every rank's numbers, [R][n], on all ranks. One all_gather of n float64 a rank."""
    mine = torch.tensor(values, dtype=torch.float64, device=device)
    world = torch.distributed.get_world_size()
    table = torch.empty(world * len(values), dtype=torch.float64, device=device)
    torch.distributed.all_gather_into_tensor(table, mine)
    return table.view(world, -1).tolist()


def record_of(table: list[list[float]]) -> dict[str, float]:
    """The keys of the step's record from the table [R][COLUMNS]."""
    columns = dict(zip(COLUMNS, zip(*table)))
    record = {}
    for kind in KINDS:
        record[f"time_{kind}_s"] = sum(columns[kind]) / len(table)
        record[f"time_{kind}_max_s"] = max(columns[kind])
    for part in MEMORY:
        record[f"memory_{part}_max_bytes"] = int(max(columns[f"memory_{part}"]))
    return record


def write_ranks(root: Path, step: int, num_steps: int, table: list[list[float]]) -> None:
    """RUN/ranks.json: each rank's numbers of the last interval, whole or not at all (rank 0)."""
    rows = [[float(f"{value:.6g}") for value in row] for row in table]
    text = json.dumps({"step": step, "num_steps": num_steps, "columns": COLUMNS, "ranks": rows})
    replace_text(root / NAME, text)


def line_of(record: dict[str, float]) -> str:
    """The split as one console line (--timing-log-level 1), in ms: mean (worst rank)."""
    parts = [
        f" {kind.replace('_', '-')}: {record[f'time_{kind}_s'] * 1000:.1f}"
        f" ({record[f'time_{kind}_max_s'] * 1000:.1f})"
        for kind in KINDS
    ]
    return " time split, ms a step, mean (worst rank) |" + " |".join(parts)
