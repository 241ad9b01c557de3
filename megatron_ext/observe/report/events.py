"""What happened in a run, from its ledger, logs, health file and exit reason, by time."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

from megatron_ext.state_files import read_text

MAX_EVENTS = 600
WARNING = re.compile(
    r"^(?P<time>\d{4}-\d\d-\d\d \d\d:\d\d:\d\d)\S* "
    r"level=(?P<level>WARNING|ERROR|CRITICAL) (?P<text>.*)$"
)
OF_PACKAGES = re.compile(r"py\.warnings: \S*site-packages")
"""What the page leaves out of the logs: Python warnings of installed packages about themselves."""
SILENT = frozenset({"requested", "staged"})
"""Events of the ledger that the page leaves out: durable and verified say the same later."""


def _text(record: dict[str, Any]) -> str:
    left_out = ("time", "event", "step", "kind", "level")
    values = [f"{key} {value}" for key, value in record.items() if key not in left_out]
    return ", ".join(values)


def _lines_of(path: Path, source: str) -> list[dict[str, Any]]:
    """Events of a file of JSON lines: any object with "event" (or "kind") and "time"."""
    found = []
    for line in read_text(path).splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue  # torn by a kill
        name = record.get("event") or record.get("kind") if isinstance(record, dict) else None
        if name and name not in SILENT:
            found.append(
                {
                    "time": float(record.get("time") or 0.0),
                    "step": record.get("step"),
                    "source": source,
                    "what": str(name),
                    "text": _text(record),
                }
            )
    return found


def _warnings(path: Path) -> list[dict[str, Any]]:
    """Warnings and errors of a rank's log; the same text once, with its number."""
    counted: dict[str, dict[str, Any]] = {}
    for line in read_text(path).splitlines():
        match = WARNING.match(line)
        if match is None or OF_PACKAGES.match(match["text"]):
            continue
        text = match["text"][:300]
        if text in counted:
            counted[text]["count"] += 1
            continue
        moment = time.mktime(time.strptime(match["time"], "%Y-%m-%d %H:%M:%S"))
        counted[text] = {"time": moment, "step": None, "source": path.stem, "count": 1}
        counted[text] |= {"what": match["level"].lower(), "text": text}
    for one in counted.values():
        count = one.pop("count")
        one["text"] += f" ({count} times)" if count > 1 else ""
    return list(counted.values())


def _exit(path: Path) -> list[dict[str, Any]]:
    try:
        reason = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    what = f"exit {reason.get('code')}"
    text = f"rank {reason.get('rank')}: {reason.get('what')}; {reason.get('do')}"
    moment = float(reason.get("time") or 0.0)
    return [
        {"time": moment, "step": reason.get("step"), "source": "exit", "what": what, "text": text}
    ]


def starts(steps: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Where a process began to train: the first one, and every resume."""
    found = []
    for record in steps:
        if "started_unix_s" in record:
            first = record["step"] - 1
            what = "start" if first == 0 else "resume"
            found.append({"time": record["started_unix_s"], "step": first, "source": "run"})
            found[-1] |= {"what": what, "text": f"after step {first}" if first else ""}
    return found


def findings(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Health and stragglers, which metrics.jsonl holds between the steps. They have no time of
    their own: it is the start of the process plus the steps' times since.
    """
    found, clock = [], 0.0
    for record in records:
        clock = record.get("started_unix_s", clock) + record.get("step_time_s", 0.0)
        if "health" in record:
            text = f"{record.get('what')} ({record.get('action')}): {record.get('do')}"
            found.append({"source": "health", "what": record["health"], "text": text})
        elif "straggler_rank" in record:
            text = ", ".join(f"{key} {value}" for key, value in record.items() if key != "step")
            found.append({"source": "straggler", "what": "straggler", "text": text})
        elif "slow_steps" in record:
            found.append({"source": "straggler", "what": "slow", "text": record["slow_steps"]})
        else:
            continue
        found[-1] |= {"time": round(clock, 3), "step": record["step"]}
    return found


def events(run: Path, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """All of them by time, the newest MAX_EVENTS: time (unix seconds, 0 where it is not known),
    step, source, what, text.
    """
    found = starts(records) + findings(records)
    for path in (*run.glob("*.jsonl"), *run.glob("checkpoints/ledger.jsonl")):
        if path.name not in ("metrics.jsonl", "routing.jsonl"):
            found += _lines_of(path, path.stem)
    for path in sorted(run.glob("logs/rank_*.log")):
        found += _warnings(path)
    for path in run.glob("exit_reason*.json"):
        found += _exit(path)
    return sorted(found, key=lambda one: one["time"])[-MAX_EVENTS:]
