"""Where checkpoints go and which may go: fast places often, the store seldom.

    memory   /dev/shm, owned by this user and named after the store: survives a restart in place
    local    a folder of a disk of this node (in --ckpt-local-dir), named in the same way
    store    --save

A tier is a folder, an interval and how many are kept; the format is the same everywhere. A step
that is due for several goes to the slowest. Memory keeps one step, since a copy of it is on the
next node. On several nodes memory and local hold the files of a node and of the one before
(nodes.py, neighbour.py).

The name of the memory tier can be guessed by every user of the machine, so what somebody else has
put there is not loaded: see `foreign`.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from megatron_ext.checkpoint import folder
from megatron_ext.checkpoint.record import read_record
from megatron_ext.errors import ConfigError
from megatron_ext.owned import GROUP_AND_OTHERS, why_foreign

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

    def make(self) -> None:
        """Its folder: of the store by the umask, of a fast tier for this user alone."""
        mode = 0o777 if self.name == STORE else 0o700
        self.directory.mkdir(parents=True, exist_ok=True, mode=mode)


def memory_folder(store: Path) -> Path:
    """The same name for every start of a run, another one for another --save folder or user."""
    return _SHM / _own_name(store)


def local_folder(top: Path, store: Path) -> Path:
    """The run's own folder in that of --ckpt-local-dir, which runs may share; that one itself where
    an older version has put its steps there.
    """
    return top if folder.steps(top) else top / _own_name(store)


def _own_name(store: Path) -> str:
    mark = xxhash.xxh3_64_hexdigest(str(store.resolve()).encode())
    return f"pretrain_moe.{os.geteuid()}.{mark}"


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
        own = local_folder(Path(cfg.ckpt_local_dir), store)
        found.append(Tier("local", own, cfg.ckpt_local_interval, 2))
    return [*found, Tier(STORE, store, cfg.save_interval, cfg.keep_last, cfg.keep_every)]


def foreign(tier: Tier) -> str:
    """Why a fast tier may hold what somebody else has put there, "" where it does not, or where
    there is none yet: it, its steps and their files belong to this user (the folder of
    --ckpt-local-dir and all below may be root's), nobody else may write them, and none is a link.
    In the folder that --ckpt-local-dir names this user's group may write.
    """
    is_memory = tier.name == "memory"
    owners = () if is_memory else (0,)
    writers = GROUP_AND_OTHERS if is_memory else stat.S_IWOTH
    try:
        top = tier.directory.lstat()
        if not is_memory and top.st_mode & stat.S_ISVTX:
            writers = 0  # who may write there cannot replace what others have made
        why = why_foreign(top, owners, writers)
        if why:
            return f"{tier.directory} {why}"
        for path in _below(tier.directory):
            why = why_foreign(path.lstat(), owners, stat.S_IWOTH)
            if why:
                return f"{path} {why}"
    except FileNotFoundError:
        return ""
    except OSError as error:
        return f"{tier.directory} cannot be read: {error.strerror}"
    return ""


def _below(directory: Path) -> Iterator[Path]:
    """The folders of steps, each before its files."""
    for step in folder.steps(directory):
        path = directory / folder.step_name(step)
        yield path
        yield from path.iterdir()


def has_fast_step(cfg: Any, store: Path, is_own: Callable[[Mapping[str, Any]], bool]) -> bool:
    """Whether this node holds a step of this run in its memory or local tier; `is_own` says it of a
    checkpoint's record.
    """
    for tier in tiers_of(cfg, store):
        is_usable = tier.name != STORE and not foreign(tier)
        for step in folder.steps(tier.directory) if is_usable else ():
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
