"""What a run left behind: its config, its records, its checkpoints; only read."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from megatron_ext.errors import DataError
from megatron_ext.state_files import read_bytes

COMPARED = ("lm_loss", "grad_norm", "samples_sha")


def steps_of(run: Path) -> dict[int, dict[str, Any]]:
    """Step -> its record of training in RUN/metrics.jsonl; of a step that is there twice the last,
    and nothing after the last one that was written whole. Raises DataError where there is no file.
    """
    path = run / "metrics.jsonl"
    try:
        lines = read_bytes(path).splitlines()
    except OSError as error:
        raise DataError(
            f"no record of this run: {error.strerror}", do="--run names a run's folder", path=path
        ) from None
    found = {}
    for line in lines:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue  # the last line of a run that was killed
        if isinstance(record, dict) and "lm_loss" in record:
            found[int(record["step"])] = record
    return found


def require_step(run: Path, step: int) -> dict[int, dict[str, Any]]:
    """The records, where step `step` is one of them or the one after the last (it ended the run).
    Raises DataError.
    """
    records = steps_of(run)
    last = max(records, default=0)
    if step not in records and step != last + 1:
        known = f"steps {min(records)} to {last}" if records else "no step"
        raise DataError(
            f"--step {step}: metrics.jsonl holds {known}",
            do="name one of them, or the next one (which ended the run)",
            path=run / "metrics.jsonl",
        )
    return records


def flags_of(run: Path) -> list[str]:
    """The flags that give the run's config, with its number of ranks (which config.yaml only tells:
    another launch of it may have another). Raises DataError.
    """
    path = run / "config.yaml"
    try:
        ranks = re.search(r"^#? *world_size: (\d+)", path.read_text(), re.MULTILINE)
    except OSError as error:
        raise DataError(
            f"no config of a run: {error.strerror}", do="--run names a run's folder", path=path
        ) from None
    return ["--config", str(path), *(["--world-size", ranks[1]] if ranks else [])]


def differences(replayed: dict[str, Any], record: dict[str, Any] | None) -> list[str]:
    """Which of `COMPARED` are not the same to the last bit, as text; none without a record."""
    if record is None:
        return []
    found = []
    for name in COMPARED:
        mine, theirs = replayed[name], record.get(name)
        if theirs is None or _exact(mine) == _exact(theirs):
            continue
        text = f"{name} is {mine!r} now, {theirs!r} then"
        if isinstance(mine, float) and theirs:
            text += f" (relative {abs(mine - theirs) / abs(theirs):.1e})"
        found.append(text)
    return found


def _exact(value: Any) -> str:
    return value if isinstance(value, str) else float(value).hex()
