"""`ledger.jsonl`: one line for each thing that happened to a checkpoint, appended by rank 0.

Events: requested, staged (copied: training may change the weights), durable (named and on disk),
verified (read back, all hashes agree), pruned, failed, quarantined, abandoned (a run went back).
"""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

from megatron_ext.state_files import opener, read_bytes

LEDGER = "ledger.jsonl"
_THERE = ("durable", "verified")
_GONE = ("pruned", "failed", "quarantined", "abandoned")


class Ledger:
    """Appends whole lines; the threads of a save share it."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / LEDGER
        self._lock = threading.Lock()

    def add(self, event: str, step: int, **values: Any) -> None:
        """Append one line. Raises OSError."""
        line = {"time": round(time.time(), 3), "event": event, "step": step, **values}
        data = (json.dumps(line) + "\n").encode()
        with self._lock:
            with open(self.path, "ab", buffering=0, opener=opener) as file:
                file.write(data)


def read_ledger(directory: Path) -> list[dict[str, Any]]:
    """All lines that can be read; a line cut by a crash is left out."""
    try:
        data = read_bytes(directory / LEDGER)
    except OSError:
        return []
    found = []
    for line in data.splitlines():
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(entry, dict) and isinstance(entry.get("step"), int):
            found.append(entry)
    return found


def standing_steps(directory: Path) -> set[int]:
    """Steps that were saved and, as far as the lines tell, have not been taken away since."""
    found: set[int] = set()
    for entry in read_ledger(directory):
        if entry.get("event") in _THERE:
            found.add(entry["step"])
        elif entry.get("event") in _GONE:
            found.discard(entry["step"])
    return found


def verified_steps(directory: Path) -> dict[int, bool]:
    """step -> whether the newest save of it has been read back without a fault."""
    found: dict[int, bool] = {}
    for entry in read_ledger(directory):
        if entry.get("event") in ("durable", "failed", "quarantined"):
            found[entry["step"]] = False
        elif entry.get("event") == "verified":
            found[entry["step"]] = True
    return found
