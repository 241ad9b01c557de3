"""Markdown tables and JSON files, and the flags of every program that writes them."""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def parser(name: str, doc: str, rounds: str | None = None) -> argparse.ArgumentParser:
    """Of python -m tests.bench `name`: --rounds (whose help is `rounds`), and --json."""
    made = argparse.ArgumentParser(
        prog=f"python -m tests.bench {name}",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--rounds", type=int, default=5, help=rounds)
    made.add_argument("--json", help="file to write")
    return made


def markdown(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table; numbers to the right, `|` in a cell escaped, None and nan as a dash."""
    cells = [[_cell(value) for value in row] for row in rows]
    widths = [max(len(row[i]) for row in [list(head), *cells]) for i in range(len(head))]
    numeric = [
        any(isinstance(row[i], int | float) for row in rows) or _looks_numeric(cells, i)
        for i in range(len(head))
    ]

    def line(row: Sequence[str]) -> str:
        padded = [
            text.rjust(width) if right else text.ljust(width)
            for text, width, right in zip(row, widths, numeric)
        ]
        return "| " + " | ".join(padded) + " |"

    rule = ["-" * (w - 1) + ":" if right else "-" * w for w, right in zip(widths, numeric)]
    return "\n".join([line(head), line(rule), *map(line, cells)])


def _cell(value: Any) -> str:
    if value is None or isinstance(value, float) and math.isnan(value):
        return "-"
    return str(value).replace("|", "\\|").replace("\n", " ")


def _looks_numeric(cells: Sequence[Sequence[str]], column: int) -> bool:
    return bool(cells) and all(row[column][:1].isdigit() or row[column] == "-" for row in cells)


def machine() -> dict[str, Any]:
    """Where a table was measured."""
    model = platform.processor() or platform.machine()
    with open("/proc/cpuinfo") as lines:
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else model,
        "cores": len(os.sched_getaffinity(0)),
        "load": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "command": " ".join(["python -m tests.bench", *sys.argv[1:]]),
    }


def write_json(path: str | None, content: Mapping[str, Any]) -> None:
    """Write what was measured, with the machine; nothing without a path."""
    if path:
        Path(path).write_text(json.dumps({"machine": machine(), **content}, indent=1) + "\n")
