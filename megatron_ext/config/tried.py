"""A file's run, tried: fewer steps than its schedule, mock data instead of its own.

    --config qwen3-30b-a3b.h100 --mock-data --train-iters 50

A warm-up of 2000 steps does not fit into 50. Where a flag makes a file's run so short that a part
of its schedule does not fit, the part keeps its share of the run. Where a flag asks for mock data,
the file's tokenizer need not be there. Each is one warning; a flag of the same command always wins.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_ext.config.argv import Setting
from megatron_ext.config.resolve import Values

UNITS = ("iters", "samples")
PARTS = ("lr_decay", "lr_wsd_decay", "lr_warmup")
DATA = ("data_path", "train_data_path", "valid_data_path", "test_data_path")


def tried(values: Values, settings: Sequence[Setting]) -> None:
    """Fit a file's values to the flags that make a trial of it."""
    _without_data(values)
    lengths = [s for s in settings if s.dest in ("train_iters", "train_samples")]
    planned = [s for s in lengths if s.origin.startswith("file:") and s.value]
    asked = [s for s in lengths if s.origin == "flag" and s.value]
    if planned and asked:
        _shorten(values, planned[-1], asked[-1])


def _of_file(values: Values, dest: str) -> bool:
    return values.origin[dest].startswith("file:") and values[dest] is not None


def _without_data(v: Values) -> None:
    """Mock data by a flag: no path of a file is read, and a tokenizer that is not on this disk is
    not wanted; the vocabulary stays.
    """
    if not v["mock_data"] or v.origin["mock_data"] != "flag":
        return
    for dest in DATA:
        if _of_file(v, dest):
            v.derive(dest, None)
    size = v["vocab_size"] or v["padded_vocab_size"]
    kind = v["tokenizer_type"]
    model = v["tokenizer_model"]
    if not _of_file(v, "tokenizer_type") or kind == "NullTokenizer" or not size:
        return
    if model is None or Path(model).exists():
        return
    v.derive("tokenizer_type", "NullTokenizer")
    v.derive("tokenizer_model", None)
    v.derive("vocab_size", size - 1)  # NullTokenizer adds an end of document
    v.notes.append(
        f"--mock-data: {model} is not on this disk and not read: ids are numbers below {size}"
    )


def _shorten(v: Values, planned: Setting, asked: Setting) -> None:
    """Give a planned schedule the length, and the unit, of the run that is asked for."""
    unit, old_unit = asked.dest.removeprefix("train_"), planned.dest.removeprefix("train_")
    if old_unit != unit:
        v.derive(planned.dest, None)
    changes = _parts(v, unit, old_unit, planned.value, asked.value)
    if unit == "iters" and _of_file(v, "rampup_batch_size"):
        changes.append("--rampup-batch-size, which counts samples, left out")
        v.derive("rampup_batch_size", None)
    if changes:
        flag = f"--train-{unit} {asked.value}"
        v.notes.append(f"{flag} is a trial of the file's schedule: {', '.join(changes)}")


def _parts(v: Values, unit: str, old_unit: str, whole: int, length: int) -> list[str]:
    """Scale each part that has another unit or does not fit; one phrase each."""
    changes = []
    for part in PARTS:
        old, new = f"{part}_{old_unit}", f"{part}_{unit}"
        if not _of_file(v, old) or (old == new and v[old] < length):
            continue
        value = max(1, round(length * min(1.0, v[old] / whole)))
        value = min(value, max(length - 1, 1)) if part == "lr_warmup" else value
        flags = [f"--{name.replace('_', '-')}" for name in (old, new)]
        changes.append(f"{flags[0]} {v[old]} becomes {flags[1]} {value}")
        v.derive(old, None)
        v.derive(new, value)
    return changes
