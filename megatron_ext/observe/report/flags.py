"""RUN/config.yaml with the origin of each value, and the values in which two runs differ."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

LINE = re.compile(r"^#?\s+(?P<key>\w+): (?P<value>.*?)(?:  # (?P<origin>[^#]*))?$")
SECTION = re.compile(r"^(?P<name>\w+):\s*$")
OF_ONE_RUN = frozenset({"run_dir", "save", "load", "tensorboard_dir", "config"})
"""Names of places, which differ between any two runs."""


def flags(run: Path) -> list[dict[str, str]]:
    """Section, flag, value and origin (default, file, flag, derived) of every value, in order."""
    try:
        lines = (run / "config.yaml").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    found, section = [], ""
    for line in lines:
        head, value = SECTION.match(line), LINE.match(line)
        if head:
            section = head["name"]
        elif value:
            origin = value["origin"] or ""
            found.append({"section": section, "flag": value["key"], "value": value["value"]})
            found[-1]["origin"] = origin
    return found


def differing(one: list[dict[str, str]], other: list[dict[str, str]]) -> list[dict[str, Any]]:
    """Flags whose values differ or that only one of the runs has; places are left out."""
    left = {(flag["section"], flag["flag"]): flag for flag in one}
    right = {(flag["section"], flag["flag"]): flag for flag in other}
    missing = {"value": "-", "origin": "not in config.yaml"}
    return [
        {"flag": name, "section": section, "a": a["value"], "b": b["value"]}
        | {"a_origin": a["origin"], "b_origin": b["origin"]}
        for section, name in {**left, **right}
        if name not in OF_ONE_RUN
        for a, b in [(left.get((section, name), missing), right.get((section, name), missing))]
        if a["value"] != b["value"]
    ]
