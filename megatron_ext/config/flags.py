"""One list of all flags, from our sections, megatron-core's dataclasses and three tables.

    sections/*.py --+
    megatron-core --+--> Field --> Flag(dest, names, kind, default, help) --> argv.py
    inert.py      --+        refused.py and renamed.py, too: flags that only Megatron-LM has

`dest` is the key of a value everywhere: in origins, in --print-config, and as an attribute of its
section.  Several sections may show the same dest (`lr` is in schedule and in optimizer).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from megatron_ext.config import ignored, mcore_fields, refused, renamed, spellings
from megatron_ext.config.fields import UNREADABLE, Field, read_dataclass
from megatron_ext.config.kinds import Kind, kind_of
from megatron_ext.config.mcore_ranges import range_of

OURS: dict[str, tuple[str, str]] = {
    "parallel": ("parallel.py", "ParallelSection"),
    "model": ("model.py", "ModelSection"),
    "moe": ("model.py", "MoeSection"),
    "data": ("data.py", "DataSection"),
    "train": ("train.py", "TrainSection"),
    "schedule": ("train.py", "ScheduleSection"),
    "checkpoint": ("checkpoint.py", "CheckpointSection"),
    "observe": ("observe.py", "ObserveSection"),
    "resilience": ("resilience.py", "ResilienceSection"),
    "health": ("health.py", "HealthSection"),
}
"""Section -> file and class."""

GENERATED = ("transformer", "optimizer", "ddp")
"""Sections whose fields come from megatron-core."""


@dataclass(frozen=True)
class Flag:
    """One option.

    Attributes:
        dest: key of the value.
        section: the first section that shows it.
        names: spellings; for a bool, those that mean True.
        negatives: for a bool, the spellings that mean False.
    """

    dest: str
    section: str
    kind: Kind
    default: object
    help: str
    names: tuple[str, ...]
    negatives: tuple[str, ...] = ()


@dataclass(frozen=True)
class Member:
    """A section's attribute, and the dest that it shows."""

    name: str
    dest: str
    mla_only: bool = False


def _negated(name: str) -> str:
    return "--" + name[len("--no-") :] if name.startswith("--no-") else "--no-" + name[len("--") :]


def _bool_names(field_name: str, spelled: list[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Spellings that mean True and False: ``--x``/``--no-x``, whichever of them was listed."""
    inverted = [
        s
        for s in spelled
        if s.startswith(("--no-", "--disable-", "--muon-no-"))
        and not field_name.startswith(("no_", "disable_"))
    ]
    direct = [s for s in spelled if s not in inverted]
    positive = [*direct, *(_negated(s) for s in inverted)]
    negative = [*inverted, *(_negated(s) for s in direct)]
    return tuple(dict.fromkeys(positive)), tuple(dict.fromkeys(negative))


def _kind(field: Field) -> Kind | None:
    kind = kind_of(field.annotation)
    if kind is None:
        return None
    choices = spellings.CHOICES.get(field.name, kind.choices)
    optional = kind.optional or field.name in spellings.OPTIONAL or field.default is None
    limits = kind.range if kind.range or choices else range_of(field.name, kind.base)
    return Kind(kind.base, kind.many, choices, optional, limits)


def flag_from_field(field: Field, section: str) -> Flag | None:
    """The flag of a field; None where no word can spell its value."""
    kind = _kind(field)
    default = field.meta.get("default", field.default)
    if kind is None or default is UNREADABLE or field.name.startswith("_"):
        return None
    default = spellings.DEFAULTS.get(field.name, default)
    own_name = "--" + field.name.replace("_", "-")
    aliases = spellings.ALIASES.get(field.name, ())
    spelled = [*field.meta.get("arg_names", []), *aliases, own_name]
    spelled = list(dict.fromkeys(spelled))
    names, negatives = tuple(spelled), ()
    if kind.base == "bool":
        names, negatives = _bool_names(field.name, spelled)
    text = spellings.HELP.get(field.name, field.help)
    return Flag(field.name, section, kind, default, text, names, negatives)


@lru_cache(maxsize=1)
def section_fields() -> dict[str, dict[str, Field]]:
    """All fields of all sections; generated ones without those that the program derives."""
    folder = Path(__file__).parent / "sections"
    found = {}
    for section, (file, class_name) in OURS.items():
        found[section] = {f.name: f for f in read_dataclass(folder / file, class_name)}
    parallel = found["parallel"]
    sources = {
        "transformer": {**mcore_fields.transformer_fields(), **mcore_fields.mla_fields()},
        "optimizer": mcore_fields.optimizer_fields(),
        "ddp": mcore_fields.ddp_fields(),
    }
    for section, fields in sources.items():
        skip = spellings.NOT_FLAGS | (set(parallel) if section == "transformer" else set())
        found[section] = {
            n: f for n, f in fields.items() if n not in skip and kind_of(f.annotation)
        }
    return found


@lru_cache(maxsize=1)
def members() -> dict[str, tuple[Member, ...]]:
    """Section -> its attributes and the dest of each."""
    mla = mcore_fields.mla_fields()
    return {
        section: tuple(
            Member(n, spellings.SAME_FLAG.get(n, n), section == "transformer" and n in mla)
            for n, f in fields.items()
            if not n.startswith("_")
        )
        for section, fields in section_fields().items()
    }


@lru_cache(maxsize=1)
def all_flags() -> dict[str, Flag]:
    """Every flag by dest: ours first, so that a shared one keeps our help and default."""
    flags: dict[str, Flag] = {}
    for section, fields in section_fields().items():
        for field in fields.values():
            if field.name in flags or field.name in spellings.SAME_FLAG:
                continue
            flag = flag_from_field(field, section)
            if flag is not None:
                flags[flag.dest] = flag
    for inert in (*ignored.INERT, *refused.flags(), *renamed.RENAMED):
        field = Field(inert.dest, inert.annotation, inert.default, inert.help, "Inert", inert.meta)
        flag = flag_from_field(field, "megatron_only")
        assert flag is not None and inert.dest not in flags, f"{inert.dest} is defined twice"
        flags[inert.dest] = flag
    return flags
