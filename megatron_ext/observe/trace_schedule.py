"""--trace-schedule N ...: what every rank did in step N, as one picture of all ranks.

each rank's spans -> RUN/traces/schedule_step_N_rank_R.json (its own clock and its offset to rank 0)
-> rank 0 reads all of them -> RUN/traces/schedule_step_N.json, for ui.perfetto.dev and the report:
a process per rank with the row "rank R" (forward, backward, waits, data, optimizer, save) and rows
"collectives" (each from its call until it was waited for; another row where they overlap).

Clocks: ranks of one machine share its monotonic clock, so only machines differ. Before a traced
step all ranks meet in ROUNDS barriers and note when they left; what rank R shows later than rank 0,
as the median over rounds and the mean over the ranks of its machine, is its machine's offset. Its
error is the difference of two barrier exits, some 0.1 ms.
"""

from __future__ import annotations

import json
import os
import statistics
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_ext.observe.spans import Span
from megatron_ext.state_files import replace_text

ROUNDS = 9
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
Whole = tuple[str, str, float, float, dict]
"""(kind, name, start, end, args) of a collective from its call until it was waited for."""


def machine_id() -> int:
    """The same on all ranks that share a monotonic clock: a number of this boot of this machine."""
    return zlib.crc32(BOOT_ID.read_bytes()) if BOOT_ID.exists() else os.getpid()


def offsets(exits_RK: Sequence[Sequence[float]], machines_R: Sequence[int]) -> list[float]:
    """Seconds to take from each rank's clock to get rank 0's, from the moments at which every rank
    left each of K barriers.
    """
    late = [
        statistics.median(mine - first for mine, first in zip(exits, exits_RK[0]))
        for exits in exits_RK
    ]
    mean = {
        machine: statistics.fmean(one for one, at in zip(late, machines_R) if at == machine)
        for machine in set(machines_R)
    }
    return [mean[machine] - mean[machines_R[0]] for machine in machines_R]


def exchange(now: Callable[[], float], machine: int, device: torch.device) -> float:
    """This rank's offset: ROUNDS all-reduces of one number, then one all_gather. Collective."""
    exits, one = [], torch.zeros(1, device=device)
    for _ in range(ROUNDS):
        torch.distributed.all_reduce(one)
        one.item()  # on CUDA the host goes on before the collective is over
        exits.append(now())
    mine = torch.tensor([float(machine), *exits], dtype=torch.float64, device=device)
    table = torch.empty(torch.distributed.get_world_size() * len(mine), dtype=torch.float64)
    table = table.to(device)
    torch.distributed.all_gather_into_tensor(table, mine)
    rows = table.view(-1, len(mine)).tolist()
    found = offsets([row[1:] for row in rows], [int(row[0]) for row in rows])
    return found[torch.distributed.get_rank()]


def rank_path(traces: Path, step: int, rank: int) -> Path:
    """One rank's part."""
    return traces / f"schedule_step_{step}_rank_{rank}.json"


def merged_path(traces: Path, step: int) -> Path:
    """The picture of all ranks."""
    return traces / f"schedule_step_{step}.json"


def write_rank(
    traces: Path, step: int, rank: int, offset: float, spans: Sequence[Span], whole: list[Whole]
) -> None:
    """This rank's part: times in seconds of rank 0's clock."""
    rows = [(one.kind, one.name, one.start - offset, one.end - offset, one.args) for one in spans]
    calls = [
        (kind, name, start - offset, end - offset, more) for kind, name, start, end, more in whole
    ]
    part = {"step": step, "rank": rank, "offset_s": offset, "spans": rows, "collectives": calls}
    traces.mkdir(parents=True, exist_ok=True)
    replace_text(rank_path(traces, step, rank), json.dumps(part))


def lanes(calls: Iterable[Sequence[Any]]) -> list[tuple[int, Sequence[Any]]]:
    """(row, call): the first row in which it overlaps no earlier one."""
    free: list[float] = []
    found = []
    for call in sorted(calls, key=lambda one: one[2]):
        row = next((index for index, until in enumerate(free) if until <= call[2]), len(free))
        free[row : row + 1] = [call[3]]
        found.append((row, call))
    return found


def _event(one: Sequence[Any], rank: int, thread: int, start: float) -> dict[str, Any]:
    kind, name, begin, end, more = one
    return {
        "name": name,
        "cat": kind,
        "ph": "X",
        "pid": rank,
        "tid": thread,
        "ts": round((begin - start) * 1e6, 1),
        "dur": round((end - begin) * 1e6, 1),
        "args": more,
    }


def _names(rank: int, num_lanes: int) -> list[dict[str, Any]]:
    rows = [
        f"rank {rank}",
        *("collectives" if n == 0 else f"collectives {n + 1}" for n in range(num_lanes)),
    ]
    named = [("process_name", 0, {"name": f"rank {rank}"})]
    named += [("thread_name", number, {"name": name}) for number, name in enumerate(rows)]
    named += [("thread_sort_index", number, {"sort_index": number}) for number in range(len(rows))]
    return [
        {"name": name, "ph": "M", "pid": rank, "tid": thread, "args": value}
        for name, thread, value in named
    ]


def chrome(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Chrome's trace format from the ranks' parts; time 0 is the first thing that a rank did."""
    start = min((one[2] for part in parts for one in part["spans"]), default=0.0)
    events: list[dict[str, Any]] = []
    for part in parts:
        rank, placed = part["rank"], lanes(part["collectives"])
        events += _names(rank, 1 + max((row for row, _ in placed), default=-1))
        events += [_event(one, rank, 0, start) for one in part["spans"]]
        events += [_event(one, rank, 1 + row, start) for row, one in placed]
    about = {"step": parts[0]["step"] if parts else None, "ranks": len(parts)}
    return {"displayTimeUnit": "ms", "otherData": about, "traceEvents": events}


def merge(traces: Path, step: int, world_size: int) -> list[int]:
    """Make one file of the ranks' parts and remove them; the ranks whose part is not there, as on
    hosts without a shared file system (rank 0).
    """
    paths = {rank: rank_path(traces, step, rank) for rank in range(world_size)}
    there = {rank: path for rank, path in paths.items() if path.exists()}
    parts = [json.loads(path.read_text()) for path in there.values()]
    replace_text(merged_path(traces, step), json.dumps(chrome(parts)))
    for path in there.values():
        path.unlink()
    return [rank for rank in paths if rank not in there]
