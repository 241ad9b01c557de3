"""``--explain-flags``: what a command line means, flag by flag, without torch and without ranks.

    used                    flag, value, where it came from, which part reads it
    no effect               ... why
    other or old names      ... what to write instead
    derived                 what followed from the others
    missing                 what a training needs besides

Rules that the line breaks are in `RunConfig.broken`, for the program to say behind it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from megatron_ext.config import ignored, renamed
from megatron_ext.config.argv import UNSET, Setting
from megatron_ext.config.checks import required
from megatron_ext.config.conditions import unmet
from megatron_ext.config.flags import Flag, all_flags, members

if TYPE_CHECKING:
    from megatron_ext.config.run_config import RunConfig

READERS = {
    "parallel": "ranks and groups",
    "transformer": "megatron-core's TransformerConfig",
    "optimizer": "megatron-core's OptimizerConfig",
    "ddp": "megatron-core's DistributedDataParallelConfig",
    "model": "model",
    "moe": "router and experts",
    "data": "data and tokenizer",
    "train": "training loop",
    "schedule": "learning rate and weight decay",
    "checkpoint": "checkpoints",
    "observe": "logs and pictures",
    "resilience": "guards against faults",
    "health": "health of the run",
}
"""Section -> who reads it, in words."""
WIDEST = 44
"""Characters of a value that are shown."""


@dataclass(frozen=True)
class Line:
    """One flag of a group."""

    flag: str
    value: str
    source: str
    text: str


@dataclass(frozen=True)
class Explanation:
    """The groups, in the order of the command line."""

    used: tuple[Line, ...]
    no_effect: tuple[Line, ...]
    other_names: tuple[Line, ...]
    derived: tuple[Line, ...]
    missing: tuple[Line, ...]
    num_defaults: int
    notes: tuple[str, ...]


def smallest_world(values: Mapping[str, object]) -> int:
    """The least number of ranks that both grids of these sizes fit."""

    def size(name: str) -> int:
        value = values[name]
        return value if isinstance(value, int) and value > 0 else 1

    tp, pp = size("tensor_model_parallel_size"), size("pipeline_model_parallel_size")
    etp = size("expert_tensor_parallel_size") if values["expert_tensor_parallel_size"] else tp
    return math.lcm(
        tp * pp * size("context_parallel_size"), etp * pp * size("expert_model_parallel_size")
    )


def explain(cfg: RunConfig) -> Explanation:
    """The groups of a resolved configuration."""
    values = _values(cfg)
    reasons = ignored.reasons(values)
    groups: dict[str, list[Line]] = {"used": [], "no_effect": [], "other_names": []}
    history: dict[str, list[Setting]] = {}
    for setting in cfg.given:
        history.setdefault(setting.dest, []).append(setting)
    for dest, settings in history.items():
        flag = all_flags().get(dest)
        if flag is not None:
            group, text = _place(flag, settings[-1].value, reasons, values)
            groups[group].append(_line(settings, text, _becomes(cfg, settings[-1], values)))
    followed = {"derived", "environment", "scale-down"}
    derived = [
        Line(_name(dest), _shown(values[dest]), origin, "")
        for dest, origin in cfg.origins.items()
        if origin in followed and dest not in history
    ]
    return Explanation(
        **{name: tuple(lines) for name, lines in groups.items()},
        derived=tuple(derived),
        missing=_missing(cfg),
        num_defaults=sum(origin == "default" for origin in cfg.origins.values()),
        notes=tuple(
            w for w in cfg.warnings if not w.startswith(("no effect:", renamed.OTHER_NAMES))
        ),
    )


def _missing(cfg: RunConfig) -> tuple[Line, ...]:
    """What a training with these flags would ask for; not what was given and is wrong."""
    wrong = {v.flag for v in cfg.broken if v.value is not None}
    found = required.rules(replace(cfg, action="train"))
    return tuple(Line(v.flag, "", v.rule, v.use) for v in found if v.flag not in wrong)


def _values(cfg: RunConfig) -> dict[str, object]:
    found = {
        m.dest: getattr(section, m.name)
        for name, section in cfg.sections().items()
        for m in members()[name]
    }
    return {**found, **cfg.megatron_only}


def _place(
    flag: Flag, value: object, reasons: Mapping[str, str], values: Mapping[str, object]
) -> tuple[str, str]:
    """The group of a flag that was given, and what is said of it there."""
    old = {i.dest: i.reason for i in renamed.RENAMED}
    if flag.dest in old:
        return "other_names", f"write {old[flag.dest]}"
    lost = reasons.get(flag.dest, "")
    if lost and flag.section != "megatron_only" and ignored.asks_for_nothing(flag, value):
        lost = f"so anyway: {lost}"
    if flag.dest in renamed.DEPRECATED:
        return "other_names", _deprecated(renamed.DEPRECATED[flag.dest], lost)
    lost = lost or unmet(flag.dest, values)
    if lost:
        return "no_effect", lost
    return "used", _readers(flag.dest)


def _deprecated(instead: str, lost: str) -> str:
    text = instead if instead.startswith("nothing") else f"write {instead}"
    return f"{text} (no effect: {lost})" if lost and not text.startswith("nothing") else text


def _readers(dest: str) -> str:
    found = [s for s, shown in members().items() if any(m.dest == dest for m in shown)]
    return ", ".join(READERS[s] for s in found) or "parsed only"


def _becomes(cfg: RunConfig, last: Setting, values: Mapping[str, object]) -> str:
    """`` -> 4`` where a rule refined the value that was given."""
    if cfg.origins[last.dest] != "derived" or values[last.dest] == last.value:
        return ""
    return f" -> {_shown(values[last.dest])}"


def _line(settings: Sequence[Setting], text: str, becomes: str) -> Line:
    *earlier, last = settings
    shown = "" if isinstance(last.value, bool) else _shown(last.value)
    source = _source(last.origin)
    over = [s for s in earlier if s.value != last.value]
    if over:
        source += f", over {_shown(over[-1].value)} of {_source(over[-1].origin)}"
    return Line(last.flag, (shown + becomes).strip(), source, text)


def _source(origin: str) -> str:
    """`flag`, or the file, relative to where the program was started if it lies below."""
    return origin.removeprefix("file:").removeprefix(os.getcwd() + os.sep)


def _shown(value: object) -> str:
    if value is None:
        return UNSET
    text = " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return text if len(text) <= WIDEST else text[: WIDEST - 3] + "..."


def _name(dest: str) -> str:
    return all_flags()[dest].names[0]


def to_text(explained: Explanation) -> str:
    """The groups as aligned columns, without a final line break."""
    blocks = [
        _block("used", explained.used),
        _block("no effect", explained.no_effect),
        _block("other or old names, read as said", explained.other_names),
        _block("derived from these", explained.derived),
    ]
    if explained.missing:
        blocks.append(_block("missing for a training", explained.missing))
    tail = f"{explained.num_defaults} values keep their default (--print-config yaml shows all)"
    notes = [f"note: {text}" for text in explained.notes]
    return "\n\n".join([*blocks, "\n".join([*notes, tail])])


def _block(title: str, lines: Sequence[Line]) -> str:
    head = f"{title}: {len(lines)}"
    rows = [(line.flag, line.value, line.source, line.text) for line in lines]
    widths = [_width(column) for column in zip(*rows, strict=True)][:-1] if rows else []
    shown = [
        "  " + "  ".join([*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[-1]])
        for row in rows
    ]
    return "\n".join([head, *(row.rstrip() for row in shown)])


def _width(column: Iterable[str]) -> int:
    return max(map(len, column))
