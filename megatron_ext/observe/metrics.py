"""The record of one step or one evaluation, and metrics.jsonl: one JSON object a line, written by
rank 0.

Units are in the keys: *_s seconds, *_per_s rates, *_loss nats per token (aux losses: loss /
coefficient, 1 = even load).
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_ext.moe.stats import RoutingRecord
from megatron_ext.state_files import cut_lines, opener

BALANCE_LOSSES = (
    "global_load_balancing_loss",
    "load_balancing_loss",
    "seq_load_balancing_loss",
)


def routing_values(routing: RoutingRecord | None, ep: int = 1, replicas: int = 1) -> dict[str, Any]:
    """The routing part of a step's record; {} for a dense model.

    `load_balancing_loss` is the mean over MoE layers of the first balance loss in use;
    max_violation per layer is max load / mean load - 1. `ep` and `replicas`: expert-parallel ranks
    and copies of each expert.
    """
    if routing is None:
        return {}
    values: dict[str, Any] = {}
    used = [name for name in BALANCE_LOSSES if bool((routing.losses_L[name] != 0).any())]
    for name in used:
        values[name] = routing.mean_loss(name)
    values["load_balancing_loss"] = routing.mean_loss(used[0]) if used else 0.0
    values["z_loss"] = routing.mean_loss("z_loss")
    moe = routing.is_moe_L
    values["max_violation"] = routing.max_violation_L()[moe].mean().item() if moe.any() else 0.0
    values["num_dead_experts"] = int(routing.dead_experts_L().sum())
    values["num_dropped"] = int(routing.dropped_L.sum())
    dead_L = routing.dead_experts_L() / routing.num_experts
    values["dead_expert_share"] = routing.mean_of_layers(dead_L)
    values["load_entropy_share"] = routing.mean_of_layers(routing.load_entropy_share_L())
    values["router_entropy_share"] = routing.mean_of_layers(routing.router_entropy_share_L())
    values["router_logit_norm"] = routing.mean_of_layers(routing.logit_norm_L)
    values["router_logit_peak"] = routing.mean_of_layers(routing.logit_peak_L)
    values["busiest_ep_rank_tokens"] = routing.busiest_ep_rank_tokens(ep, replicas)
    balance_L = routing.losses_L[used[0] if used else "load_balancing_loss"]
    per_layer = {
        "max_violation": routing.max_violation_L(),
        "dead_expert_share": dead_L,
        "router_entropy_share": routing.router_entropy_share_L(),
        "load_balancing_loss": balance_L,
        "z_loss": routing.losses_L["z_loss"],
    }
    for name, values_L in per_layer.items():
        values[f"{name}_per_layer"] = _short(values_L)
    if routing.look is not None:
        values["router_logit_max"] = float(routing.look.logit_max_L.max())
        values["domain_nmi_per_layer"] = _short(routing.look.nmi_L())
        values["domain_nmi"] = routing.mean_of_layers(routing.look.nmi_L())
    return values


def _short(values_L) -> list[float]:
    """Floats with 5 digits: a line of 64 layers stays short."""
    return [float(f"{value:.5g}") for value in values_L.tolist()]


def routing_interval(
    routing: RoutingRecord, domains: Sequence[str], most_pairs: int = 100_000
) -> dict[str, Any]:
    """A line of RUN/routing.jsonl (observe/routing_file.py) from a step with a close look; no
    co-selection where that would be more than `most_pairs` numbers.
    """
    look = routing.look
    line: dict[str, Any] = {
        "counts": routing.counts_LE,
        "is_moe": routing.is_moe_L,
        "mean_probs": routing.probs_LE,
    }
    if look is not None:
        is_small = look.pairs_LEE.numel() <= most_pairs
        line |= {
            "coselection": look.pairs_LEE if is_small else None,
            "domains": list(domains),
            "domain_counts": look.domains_LDE.transpose(0, 1),
            "nmi": look.nmi_L(),
        }
    return line


class MetricsFile:
    """Appends records to metrics.jsonl; after a resume, records of steps that are run again are cut
    off first.
    """

    def __init__(self, path: Path, first_step: int) -> None:
        self.path = path
        cut_lines(path, lambda line: step_of(line) <= first_step)
        self._file = open(path, "a", buffering=1, encoding="utf-8", opener=opener)

    def write(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(record) + "\n")

    def close(self) -> None:
        self._file.close()


def step_of(line: bytes) -> float:
    """The step of a line; what is no record, as a line torn by a kill, counts as later than
    everything.
    """
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return math.inf
    return step if isinstance(step, (int, float)) else math.inf
