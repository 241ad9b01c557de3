"""What the numbers of a manifest may be: pure, for `verify` and a load alike.

A right hash only says that the bytes are those that somebody wrote. A negative counter would cut
away the history of a run, a NaN in the schedule would become a learning rate, a block of 10^18
bytes would be asked of the memory.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

LARGEST = 1 << 62
MOST_PARTS = 1 << 24
"""Layers, experts, ranks: readers count through them."""
LONGEST_TEXT = 64 << 20
SCHEDULE = (
    *("max_lr", "min_lr", "lr_warmup_steps", "lr_decay_steps", "lr_decay_style", "num_steps"),
    *("start_wd", "end_wd", "wd_incr_steps", "wd_incr_style"),
)
"""What megatron-core's schedule reads; a manifest holds all of it or no schedule."""


def check_record(body: Mapping[str, Any]) -> None:
    """Everything but files and tensors. Raises ValueError with the path of the first value that
    cannot be, KeyError where a part is missing.
    """
    _count("step", body["step"])
    for name in ("layout", "progress", "run", "extra"):
        _is(name, body[name], dict)
    for name, value in body["layout"].items():
        if value is not None:
            _count(f"layout.{name}", value, 1, MOST_PARTS)
    _check_progress(body["step"], body["progress"])
    _number("time", body.get("time", 0.0))
    _is("id", body.get("id", ""), str)
    for name, value in (body.get("model") or {}).items():
        if value is not None:
            _count(f"model.{name}", value, 1, MOST_PARTS)
    _check_optimizer(body["optimizer"])
    _check_schedule(body["scheduler"])
    for name, kind in (("config", str), ("fingerprint", dict), ("id", str)):
        if body["run"].get(name) is not None:
            _is(f"run.{name}", body["run"][name], kind)


def _check_progress(step: int, value: Mapping[str, Any]) -> None:
    for name, count in value.items():
        _count(f"progress.{name}", count)
    if value["step"] != step:
        raise ValueError(f"progress.step is {value['step']}, step is {step}")
    if step and "consumed_samples" not in value:
        raise ValueError("progress has no consumed_samples: a run would see its data again")


def _check_schedule(value: Any) -> None:
    _check_numbers("scheduler", value)
    lacking = [name for name in SCHEDULE if name not in (value or SCHEDULE)]
    if lacking:
        raise ValueError(f"scheduler has no {lacking[0]}")


def _check_optimizer(value: Any) -> None:
    if value is None:
        return
    _is("optimizer", value, dict)
    _count("optimizer.step", value["step"])
    _check_numbers("optimizer.grad_scaler", value["grad_scaler"])


def _check_numbers(path: str, value: Any) -> None:
    """An object of numbers that are finite and not negative, of words, and of nothings."""
    if value is None:
        return
    _is(path, value, dict)
    for name, entry in value.items():
        is_word = "style" in name or isinstance(entry, bool) or entry is None
        if is_word and not isinstance(entry, (str, bool, type(None))):
            raise ValueError(f"{path}.{name} must be a word")
        if not is_word:
            _number(f"{path}.{name}", entry)


def _is(path: str, value: Any, kind: type) -> None:
    if not isinstance(value, kind) or (kind is str and len(value) > LONGEST_TEXT):
        raise ValueError(f"{path} must be {'an object' if kind is dict else 'a text'}")


def _count(path: str, value: Any, least: int = 0, most: int = LARGEST) -> None:
    if type(value) is not int or not least <= value < most:
        raise ValueError(f"{path} must be a whole number from {least} on, is {_shown(value)}")


def _number(path: str, value: Any) -> None:
    is_one = type(value) in (int, float) and math.isfinite(value) and 0 <= value < LARGEST
    if not is_one:
        raise ValueError(f"{path} must be a finite number from 0 on, is {_shown(value)}")


def _shown(value: Any) -> str:
    return repr(value)[:60] if not isinstance(value, int) or abs(value) < LARGEST else "larger"
