"""RUN/routing.jsonl: where the tokens went, one JSON object for each --log-routing-interval.

    {"step": 20, "counts": [[L][E]], "is_moe": [L], "mean_probs": [[L][E]],
     "coselection": [[L][E][E]], "domains": [D names], "domain_counts": [[D][L][E]], "nmi": [L]}

L = decoder layers, then multi-token-prediction layers; E = experts. Counts are assignments summed
over the global batch of that step (or over all steps of the interval: the writer says which in
"steps"). Only "step", "counts" and "is_moe" must be there. The report reads it; no torch here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_ext.state_files import cut_lines, opener, read_bytes

NAME = "routing.jsonl"
DIGITS = 5


def _plain(value: Any) -> Any:
    """Tensors and arrays as lists, floats with 5 significant digits, so that a line stays short."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, float):
        return int(value) if value == int(value) else float(f"{value:.{DIGITS}g}")
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return value


def line_of(step: int, record: Mapping[str, Any]) -> str:
    """One interval as a line; values that are None are left out."""
    values = {key: _plain(value) for key, value in record.items() if value is not None}
    return json.dumps({"step": step, **values}, separators=(",", ":")) + "\n"


def append(path: Path, step: int, record: Mapping[str, Any]) -> None:
    """Add one interval to the file at `path` (rank 0)."""
    with open(path, "a", encoding="utf-8", opener=opener) as file:
        file.write(line_of(step, record))


def cut(path: Path, last_step: int) -> None:
    """Forget intervals after `last_step`, as a resume does; nothing where there is no file."""

    def keeps(line: bytes) -> bool:
        one = _parsed(line)
        return one is not None and one["step"] <= last_step

    cut_lines(path, keeps)


def read(path: Path) -> list[dict[str, Any]]:
    """All intervals by step, [] without a file; lines torn by a kill are left out."""
    if not path.exists():
        return []
    found: dict[int, dict[str, Any]] = {}
    for line in read_bytes(path).splitlines():
        one = _parsed(line)
        if one is not None:
            found[one["step"]] = one
    return [found[step] for step in sorted(found)]


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        one = json.loads(line)
    except (ValueError, RecursionError):
        return None
    is_whole = isinstance(one, dict) and isinstance(one.get("step"), int) and "counts" in one
    return one if is_whole else None
