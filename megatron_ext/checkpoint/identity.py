"""`RUN/run.json`: which run a folder belongs to.

    id           written once, when the folder is first used, and in each of the run's checkpoints
    origins      what starts of it loaded at first (--load of another folder, --finetune, ...)
    fingerprint  of the last start: what a run that has not saved yet is compared by
    course       the step that a start went back to, and a hash of its flags: it does so once
    finished     how far it was asked to train when it had done it
    launch       the launch that holds the folder or held it last
    overwrote    it began with --overwrite-run

A folder that an older version made has none: its config.yaml and checkpoints tell, and steps
without an id are its own.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from megatron_ext.checkpoint import folder
from megatron_ext.config.once import OF_A_LOAD

RUN = "run.json"
LAUNCH = "PRETRAIN_MOE_LAUNCH"
"""Environment variable: one name for all ranks and attempts of a launch."""
DEFAULT_START = {"load": None, **OF_A_LOAD}


@dataclass(frozen=True)
class Identity:
    """The run that a folder belongs to."""

    id: str = ""
    created: float = 0.0
    fingerprint: Mapping[str, Any] = field(default_factory=dict)
    origins: tuple[Mapping[str, Any], ...] = ()
    save: str | None = None
    course: Mapping[str, Any] | None = None
    finished: Mapping[str, Any] | None = None
    launch: str | None = None
    stamp: str | None = None
    overwrote: bool = False

    def named(self) -> Identity:
        """The same with an id, a new one if it has none."""
        if self.id:
            return self
        return Identity(**{**vars(self), "id": uuid.uuid4().hex, "created": time.time()})

    def owns(self, run: Mapping[str, Any]) -> bool:
        """Whether a checkpoint, by its record's `run`, was saved by this run; one without an id was
        written by an older version and belongs to whom its folder belongs.
        """
        return run.get("id") in (None, self.id) or not self.id


_KINDS = {"id": str, "created": (int, float), "fingerprint": dict, "origins": list}


def read(root: Path) -> Identity | None:
    """Of a run's folder; None where there is none, or none that can be read."""
    try:
        text = (root / RUN).read_bytes() if (root / RUN).is_file() else None
        found = json.loads(text) if text is not None else None
    except (OSError, ValueError):
        return None
    if found is None:
        return _of_older_version(root)
    if not isinstance(found, dict) or any(
        not isinstance(found.get(name), kind) for name, kind in _KINDS.items()
    ):
        return None
    known = {entry.name for entry in fields(Identity)}
    found["origins"] = tuple(found["origins"])
    return Identity(**{name: value for name, value in found.items() if name in known})


def write(root: Path, identity: Identity) -> None:
    """Replace it as a whole. Raises OSError."""
    folder.write_atomically(root / RUN, json.dumps(asdict(identity), indent=1) + "\n")


def of_checkpoint(record: Mapping[str, Any]) -> Identity:
    """As the record of a checkpoint tells it."""
    run = record["run"]
    if run.get("id"):
        origins = tuple(run.get("origins") or ())
        return Identity(id=run["id"], fingerprint=run.get("fingerprint") or {}, origins=origins)
    return _of_yaml(run.get("config") or "")


def _of_older_version(root: Path) -> Identity | None:
    """By RUN/config.yaml."""
    try:
        return _of_yaml((root / "config.yaml").read_text())
    except (OSError, UnicodeDecodeError):
        return None


def _of_yaml(text: str) -> Identity:
    """From the values of every flag: what counts of them, the caller knows."""
    try:
        sections = yaml.safe_load(text)
    except yaml.YAMLError:
        return Identity()
    values: dict[str, Any] = {}
    for section in sections.values() if isinstance(sections, dict) else ():
        values |= section if isinstance(section, dict) else {}
    origin = {name: values.get(name, default) for name, default in DEFAULT_START.items()}
    if origin["load"] is not None:
        origin["load"] = str(Path(str(origin["load"])).resolve())
    return Identity(fingerprint=values, origins=() if origin == DEFAULT_START else (origin,))
