"""Numbers outside their range: one violation each, and the nearest number inside for the rest.

The other rules then see numbers that they can compute with, so that everything wrong is said in
one go. Where a size of the model or of the grid is out of range they would only report
consequences: `Checked.sizes_hold` is False and they are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron_ext.config.argv import Setting
from megatron_ext.config.flags import Flag, all_flags
from megatron_ext.errors import Violation
from megatron_ext.ranges import RANGES, Range

_SIZES = tuple(RANGES[kind] for kind in ("Size", "Parts", "Layers"))
MOST_DIGITS = 20
MOST_NUMBERS = 6
"""Of a value, that a message shows."""


@dataclass(frozen=True)
class Checked:
    """Settings in which every number is inside its range, and what was not."""

    settings: tuple[Setting, ...]
    violations: tuple[Violation, ...]
    sizes_hold: bool


def bounded(settings: Sequence[Setting]) -> Checked:
    """Looks at the last value of each flag; one that was overridden is nobody's fault."""
    flags, last = all_flags(), {s.dest: s for s in settings}
    kept, found, sizes_hold = [], [], True
    for setting in settings:
        flag = flags.get(setting.dest)
        limits = flag.kind.range if flag else None
        wrong = limits and _first_outside(setting.value, limits)
        if wrong is None or limits is None or flag is None:
            kept.append(setting)
            continue
        kept.append(replace(setting, value=_inside(setting.value, limits)))
        if last[setting.dest] is setting:
            found.append(_violation(setting, wrong, flag, limits))
            sizes_hold = sizes_hold and limits not in _SIZES
    return Checked(tuple(kept), tuple(found), sizes_hold)


def _first_outside(value: object, limits: Range) -> float | None:
    if isinstance(value, list | tuple):
        return next((n for n in value if not limits.holds(n)), None)
    return None if value is None or limits.holds(value) else value  # type: ignore[arg-type,return-value]


def _inside(value: object, limits: Range) -> object:
    if isinstance(value, list | tuple):
        return type(value)(_inside(n, limits) for n in value)
    return limits.nearest(value)  # type: ignore[arg-type]


def _violation(setting: Setting, number: float, flag: Flag, limits: Range) -> Violation:
    where = setting.origin.removeprefix("file:")
    rule = limits.rule(number) + ("" if where == setting.origin else f" (in {where})")
    use = limits.example if flag.default is None else f"use {_shown(flag.default)}, the default"
    return Violation(setting.flag, _shown(setting.value), rule, use)


def _shown(value: object) -> str:
    if isinstance(value, list | tuple):
        text = " ".join(_shown(n) for n in value[:MOST_NUMBERS])
        return text if len(value) <= MOST_NUMBERS else f"{text} ..."
    text = str(value)
    return text if len(text) <= MOST_DIGITS else f"{text[:MOST_DIGITS]}... ({len(text)} digits)"
