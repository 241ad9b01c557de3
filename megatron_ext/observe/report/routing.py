"""RUN/routing.jsonl, or else expert_load.json, for the page's expert maps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ext.observe import routing_file
from megatron_ext.observe.report.thin import every, packed, relative

MAX_CELLS = 1_000_000
"""Bytes of one kind of map, over all intervals."""


def _last_load(run: Path) -> list[dict[str, Any]]:
    """The one interval of a run without --log-routing-interval."""
    try:
        return [json.loads((run / "expert_load.json").read_text(encoding="utf-8"))]
    except (OSError, ValueError):
        return []


def _same_shape(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Only intervals as large as the last one: a resume may change the model's layers."""
    shape = np.shape(found[-1]["counts"])
    return [one for one in found if np.shape(one["counts"]) == shape]


def _maps(intervals: list[dict[str, Any]], rows: list[int]) -> str:
    return packed(np.stack([relative(np.asarray(one["counts"])[rows]) for one in intervals]))


def _domains(intervals: list[dict[str, Any]], rows: list[int]) -> dict[str, Any] | None:
    """Of the intervals with the last one's domains: maps and, if given, the mutual information."""
    with_domains = [one for one in intervals if one.get("domain_counts")]
    if not with_domains:
        return None
    last = with_domains[-1]
    cells = np.size(last["domain_counts"])
    same = [one for one in with_domains if one.get("domains") == last.get("domains")]
    shown = every(same, max(1, MAX_CELLS // cells))
    maps = [relative(np.asarray(one["domain_counts"])[:, rows]) for one in shown]
    names = last.get("domains") or [str(n) for n in range(len(last["domain_counts"]))]
    return {
        "names": names,
        "steps": [one["step"] for one in shown],
        "maps": packed(np.stack(maps)),
        "nmi_steps": [one["step"] for one in shown if one.get("nmi")],
        "nmi": [[one["nmi"][row] for row in rows] for one in shown if one.get("nmi")],
    }


def _coselection(intervals: list[dict[str, Any]], rows: list[int]) -> dict[str, Any] | None:
    """Which experts are chosen together in the last interval that says so, per layer: a pair's
    share of all pairs over the mean pair's.
    """
    found = [one for one in intervals if one.get("coselection")]
    if not found:
        return None
    table = np.asarray(found[-1]["coselection"], dtype=float)[rows]
    experts = table.shape[-1]
    table = table * (1 - np.eye(experts))
    mean = table.sum(axis=(1, 2), keepdims=True) / max(1, experts * (experts - 1))
    ratio = np.divide(table, mean, out=np.zeros_like(table), where=mean > 0)
    layers = every(range(len(rows)), max(1, MAX_CELLS // experts**2))
    return {
        "step": found[-1]["step"],
        "layers": [rows[index] + 1 for index in layers],
        "maps": packed(ratio[list(layers)]),
    }


def routing(run: Path) -> dict[str, Any] | None:
    """Maps of the MoE layers: load / even load of each expert, by interval; None without a file."""
    found = routing_file.read(run / routing_file.NAME)
    is_series = bool(found)
    found = _same_shape(found or _last_load(run) or [{"counts": []}])
    if not np.size(found[-1]["counts"]):
        return None
    is_moe = found[-1].get("is_moe") or [True] * len(found[-1]["counts"])
    rows = [row for row, is_one in enumerate(is_moe) if is_one]
    experts = len(found[-1]["counts"][0])
    shown = every(found, max(1, min(200, MAX_CELLS // max(1, len(rows) * experts))))
    return {
        "is_series": is_series,
        "layers": [row + 1 for row in rows],
        "experts": experts,
        "steps": [one["step"] for one in shown],
        "maps": _maps(shown, rows),
        "domains": _domains(found, rows),
        "coselection": _coselection(found, rows),
    }
