"""The record of one step or one evaluation, and metrics.jsonl: one JSON object a line, written by
rank 0.

Units are in the keys: *_s seconds, *_per_s rates, *_loss nats per token (aux losses: loss /
coefficient, 1 = even load).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_ext.moe.stats import RoutingRecord

BALANCE_LOSSES = (
    "global_load_balancing_loss",
    "load_balancing_loss",
    "seq_load_balancing_loss",
)


def routing_values(routing: RoutingRecord | None) -> dict[str, Any]:
    """The routing part of a step's record; {} for a dense model.

    `load_balancing_loss` is the mean over MoE layers of the first balance loss in use;
    max_violation per layer is max load / mean load - 1.
    """
    if routing is None:
        return {}
    values: dict[str, Any] = {}
    used = [name for name in BALANCE_LOSSES if float(routing.losses_L[name].abs().sum()) > 0]
    for name in used:
        values[name] = routing.mean_loss(name)
    values["load_balancing_loss"] = routing.mean_loss(used[0]) if used else 0.0
    values["z_loss"] = routing.mean_loss("z_loss")
    moe = routing.is_moe_L
    values["max_violation"] = routing.max_violation_L()[moe].mean().item() if moe.any() else 0.0
    values["max_violation_per_layer"] = [round(v, 4) for v in routing.max_violation_L().tolist()]
    values["num_dead_experts"] = int(routing.dead_experts_L().sum())
    values["num_dropped"] = int(routing.dropped_L.sum())
    return values


class MetricsFile:
    """Appends records to metrics.jsonl; after a resume, records of steps that are run again are cut
    off first.
    """

    def __init__(self, path: Path, first_step: int) -> None:
        self.path = path
        if path.exists():
            kept = [line for line in path.read_text().splitlines() if _step_of(line) <= first_step]
            path.write_text("".join(line + "\n" for line in kept))
        self._file = path.open("a", buffering=1)

    def write(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(record) + "\n")

    def close(self) -> None:
        self._file.close()


def _step_of(line: str) -> float:
    """The step of a line; a line torn by a kill counts as later than everything."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")
