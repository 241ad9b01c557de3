"""What happened to checkpoints, from their ledger: only lines that were not read before."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_ext.state_files import opener

NAME = "ledger.jsonl"


class LedgerEvents:
    """Follows SAVE/ledger.jsonl from its end at the start of the run."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / NAME
        self._read = self._path.stat().st_size if self._path.exists() else 0

    def new(self) -> list[dict[str, Any]]:
        """Whole lines that were added since; a line being written comes with the next call."""
        if not self._path.exists():
            return []
        with open(self._path, "rb", opener=opener) as file:
            file.seek(self._read)
            text = file.read()
        whole, newline, _ = text.rpartition(b"\n")
        self._read += len(whole) + len(newline)
        return [one for one in map(_parsed, whole.splitlines()) if one is not None]


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        one = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return one if isinstance(one, dict) and {"event", "step"} <= one.keys() else None
