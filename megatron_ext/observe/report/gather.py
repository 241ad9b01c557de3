"""A run directory as one dict of what the page draws."""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path
from typing import Any

from megatron_ext.errors import DataError
from megatron_ext.observe.kinds import KINDS
from megatron_ext.observe.report.events import events
from megatron_ext.observe.report.flags import flags
from megatron_ext.observe.report.routing import routing
from megatron_ext.observe.report.thin import every, extremes, rounded
from megatron_ext.observe.summary import read_records, sample_lines

CURVES = (
    "lm_loss",
    "mtp_loss",
    "learning_rate",
    "grad_norm",
    "load_balancing_loss",
    "z_loss",
    "max_violation",
    "num_dead_experts",
    "num_dropped",
    "tokens_per_s",
    "step_time_s",
    "global_batch_size",
)
OF_EVALUATION = ("val_loss", "bits_per_byte")
MAX_SAMPLE = 4000
"""Characters of RUN/sample.txt."""
MAX_TRACE = 12_000
"""Things of a trace that are drawn; the shortest are left out first."""


def _curve(records: list[dict[str, Any]], key: str) -> list[list[float | None]]:
    points = [(record["step"], float(record[key])) for record in records if _is_number(record, key)]
    return [[step, rounded(value)] for step, value in extremes(points)]


def _is_number(record: dict[str, Any], key: str) -> bool:
    value = record.get(key)
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def curves(records: list[dict[str, Any]]) -> dict[str, list[list[float | None]]]:
    """Key -> [[step, value], ...] of what the records have; evaluations as split/key."""
    steps = [record for record in records if "lm_loss" in record]
    found = {key: _curve(steps, key) for key in CURVES}
    for split in ("validation", "test"):
        evaluations = [record for record in records if record.get("split") == split]
        for key in OF_EVALUATION:
            found[f"{split}/{key}"] = _curve(evaluations, key)
        for domain in dict.fromkeys(name for one in evaluations for name in _domains(one)):
            points = [
                {"step": one["step"], "loss": _domains(one).get(domain)} for one in evaluations
            ]
            found[f"{split}/domain/{domain}"] = _curve(points, "loss")
    return {key: points for key, points in found.items() if points}


def _domains(record: dict[str, Any]) -> dict[str, float]:
    """Domain of the blend -> validation loss."""
    return record.get("val_loss_per_domain") or {}


def violations(steps: list[dict[str, Any]]) -> dict[str, Any] | None:
    """MaxVio of each layer over time: at most 240 steps."""
    known = [one for one in steps if one.get("max_violation_per_layer")]
    if not known:
        return None
    num_layers = len(known[-1]["max_violation_per_layer"])
    shown = every([o for o in known if len(o["max_violation_per_layer"]) == num_layers], 240)
    rows = [
        [rounded(float(one["max_violation_per_layer"][at])) for one in shown]
        for at in range(num_layers)
    ]
    return {"steps": [one["step"] for one in shown], "rows": rows}


def time_split(steps: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Seconds a step of each kind by interval, mean and worst rank, and `other`: what is left of
    the interval's mean step time.
    """
    rows: list[dict[str, Any]] = []
    pending: list[float] = []
    for record in steps:
        pending.append(record.get("step_time_s", 0.0))
        if "time_forward_s" not in record:
            continue
        mean = {kind: record.get(f"time_{kind}_s", 0.0) for kind in KINDS}
        worst = {kind: record.get(f"time_{kind}_max_s", 0.0) for kind in KINDS}
        inside = sum(mean.values()) - mean["save"]
        mean["other"] = max(0.0, statistics.fmean(pending) - inside)
        rows.append({"step": record["step"], "mean": mean, "worst": worst})
        pending.clear()
    if not rows:
        return None
    shown = every(rows, 150)
    kinds = [*KINDS, "other"]
    return {
        "kinds": kinds,
        "steps": [row["step"] for row in shown],
        "mean": [[rounded(row["mean"][kind]) for row in shown] for kind in kinds],
        "worst": [[rounded(row["worst"].get(kind, 0.0)) for row in shown] for kind in kinds],
    }


def ranks(run: Path) -> dict[str, Any] | None:
    """RUN/ranks.json: the last interval's numbers of each rank; at most 128 ranks are drawn."""
    try:
        found = json.loads((run / "ranks.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    numbered = every(list(enumerate(found["ranks"])), 128)
    return {
        "step": found["step"],
        "columns": found["columns"],
        "num_ranks": len(found["ranks"]),
        "numbers": [number for number, _ in numbered],
        "rows": [row for _, row in numbered],
    }


def trace(run: Path) -> dict[str, Any] | None:
    """The newest schedule trace: rank, row, kind, start ms, length ms, micro-batch, chunk, name."""
    found = {
        int(match[1]): path
        for path in run.glob("traces/schedule_step_*.json")
        if (match := re.fullmatch(r"schedule_step_(\d+)\.json", path.name))
    }
    if not found:
        return None
    step = max(found)
    try:
        whole = json.loads(found[step].read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    spans = [one for one in whole["traceEvents"] if one.get("ph") == "X"]
    kept = sorted(spans, key=lambda one: -one["dur"])[:MAX_TRACE]
    rows = [
        [
            one["pid"],
            one["tid"],
            one["cat"],
            round(one["ts"] / 1000, 3),
            round(one["dur"] / 1000, 3),
            one["args"].get("micro_batch"),
            one["args"].get("chunk"),
            one["name"],
        ]
        for one in sorted(kept, key=lambda one: one["ts"])
    ]
    return {"step": step, "spans": rows, "left_out": len(spans) - len(kept)}


def gather(run: Path) -> dict[str, Any]:
    """Everything of one run. Raises DataError (65) where it is no run or has no metrics."""
    if not run.is_dir():
        raise DataError("no such run", do="name a run directory, such as runs/quickstart", path=run)
    records = read_records(run / "metrics.jsonl")
    records = [record for record in records if isinstance(record, dict) and "step" in record]
    steps = [record for record in records if "lm_loss" in record]
    if not records:
        raise DataError(
            "metrics.jsonl has no record", do="train at least one step", path=run / "metrics.jsonl"
        )
    last = steps[-1] if steps else {}
    values = {flag["flag"]: flag["value"] for flag in flags(run)}
    return {
        "name": run.name or str(run),
        "path": str(run.resolve()),
        "num_steps": last.get("step", 0),
        "consumed_tokens": last.get("consumed_tokens"),
        "world_size": values.get("world_size"),
        "median_tokens_per_s": _median(steps, "tokens_per_s"),
        "median_tflop_per_s_per_rank": _median(steps, "model_tflop_per_s_per_rank"),
        "curves": curves(records),
        "violations": violations(steps),
        "unigram": unigram(run),
        "sample": "\n".join(sample_lines(run / "sample.txt"))[:MAX_SAMPLE] or None,
        "routing": routing(run),
        "time": time_split(steps),
        "ranks": ranks(run),
        "trace": trace(run),
        "flags": flags(run),
        "events": events(run, records),
    }


def unigram(run: Path) -> dict[str, float] | None:
    """The baseline that data.unigram left in RUN/data, for the loss curves."""
    try:
        found = json.loads((run / "data/unigram.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    keys = ("nats_per_token", "bits_per_byte")
    numbers = {key: rounded(float(found[key])) for key in keys if _is_number(found, key)}
    return numbers or None


def _median(steps: list[dict[str, Any]], key: str) -> float | None:
    values = [record[key] for record in steps if _is_number(record, key)]
    return rounded(float(statistics.median(values))) if values else None
