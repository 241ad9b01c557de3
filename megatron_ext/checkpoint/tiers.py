"""Where checkpoints go and which may go: fast places often, the store seldom.

    memory   /dev/shm, owned by this user and named after the store: survives a restart in place
    local    a folder of a disk of this node (--ckpt-local-dir)
    store    --save

A tier is a folder, an interval and how many are kept; the format is the same everywhere. A step
that is due for several goes to the slowest. Memory keeps one step, since a copy of it is on the
next node. On several nodes memory and local hold the files of a node and of the one before
(nodes.py, neighbour.py).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from megatron_ext.checkpoint import folder
from megatron_ext.checkpoint.record import read_record
from megatron_ext.errors import ConfigError

STORE = "store"
_SHM = Path("/dev/shm")


@dataclass(frozen=True)
class Tier:
    """One place. `interval` in steps (None: when asked); keeps all where `keep_last` is None."""

    name: str
    directory: Path
    interval: int | None
    keep_last: int | None
    keep_every: int | None = None


def memory_folder(store: Path) -> Path:
    """The same name for every start of a run, another one for another --save folder or user."""
    mark = xxhash.xxh3_64_hexdigest(str(store.resolve()).encode())
    return _SHM / f"pretrain_moe.{os.geteuid()}.{mark}"


def tiers_of(cfg: Any, store: Path) -> list[Tier]:
    """The tiers that --ckpt-tiers names, fastest first; the store is always among them. Raises
    ConfigError.
    """
    names = [name.strip() for name in cfg.ckpt_tiers.split(",") if name.strip()]
    unknown = [name for name in names if name not in ("memory", "local", STORE)]
    if unknown:
        raise ConfigError(
            f"--ckpt-tiers {cfg.ckpt_tiers}: {unknown[0]} is not a tier",
            do="use memory, local and store, separated by commas",
        )
    if "local" in names and not cfg.ckpt_local_dir:
        raise ConfigError(
            "--ckpt-tiers local needs a folder", do="--ckpt-local-dir on a disk of the node"
        )
    found = []
    if "memory" in names:
        found.append(Tier("memory", memory_folder(store), cfg.ckpt_memory_interval, 1))
    if "local" in names:
        found.append(Tier("local", Path(cfg.ckpt_local_dir), cfg.ckpt_local_interval, 2))
    return [*found, Tier(STORE, store, cfg.save_interval, cfg.keep_last, cfg.keep_every)]


def has_fast_step(cfg: Any, store: Path, is_own: Callable[[Mapping[str, Any]], bool]) -> bool:
    """Whether this node holds a step of this run in its memory or local tier; `is_own` says it of a
    checkpoint's record.
    """
    for tier in tiers_of(cfg, store):
        for step in folder.steps(tier.directory) if tier.name != STORE else ():
            record = read_record(tier.directory / folder.step_name(step))
            if record is not None and is_own(record["run"]):
                return True
    return False


def due(tiers: Iterable[Tier], step: int) -> str | None:
    """The slowest tier whose interval has come."""
    found = [tier.name for tier in tiers if tier.interval and step % tier.interval == 0]
    return found[-1] if found else None


def to_prune(
    steps: Iterable[int], newest: int, tier: Tier, keep: Collection[int] = ()
) -> list[int]:
    """Steps that may be deleted now that `newest` is verified, oldest first: not the `keep_last`
    newest, no multiple of `keep_every`, none of `keep`, none newer than `newest`.
    """
    if tier.keep_last is None:
        return []
    known = sorted(step for step in steps if step <= newest)
    stay = {newest, *keep, *known[-max(1, tier.keep_last) :]}
    if tier.keep_every:
        stay |= {step for step in known if step % tier.keep_every == 0}
    return [step for step in known if step not in stay]
