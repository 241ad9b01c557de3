"""Which ranks share a node, so that a checkpoint in its memory or on its disk outlives another one.

LOCAL_WORLD_SIZE ranks in a row share a node (torchrun, launch/run.sh; srun's tasks per node). The
neighbour of a rank is the one at the same place of the next node: rank + LOCAL_WORLD_SIZE, modulo
the world. A fast tier whose folder all ranks see (one node, or a shared file system) needs no
neighbour; one that each node has for itself is *spread*: a node holds the files of its own ranks
and copies of those of the node before it.
"""

from __future__ import annotations

import datetime
import logging
import os
import shutil
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_ext.checkpoint import folder
from megatron_ext.checkpoint.tiers import STORE, Tier, foreign
from megatron_ext.errors import ConfigError, DataError, DiskError, Fatal
from megatron_ext.mesh.agree import FailedElsewhere, agree, first_rank

LIMIT_S = 600
"""How long a background thread waits for the other ranks' before the save has failed."""
_MARK = ".node_"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Nodes:
    """This rank among the nodes. `lane`: a gloo group of all ranks of its own; a thread of a save
    uses it, and the main thread while there is none.
    """

    rank: int
    world: int
    per_node: int
    lane: Any

    @property
    def count(self) -> int:
        """Nodes of the run."""
        return self.world // self.per_node

    @property
    def place(self) -> int:
        """0 .. per_node - 1 within the node."""
        return self.rank % self.per_node

    @property
    def is_leader(self) -> bool:
        """The first rank of its node: it makes and removes the node's folders."""
        return self.place == 0

    @property
    def neighbour(self) -> int:
        """The rank that keeps a copy of this one's files."""
        return (self.rank + self.per_node) % self.world

    @property
    def source(self) -> int:
        """The rank whose files this one keeps a copy of."""
        return (self.rank - self.per_node) % self.world

    def node_of(self, rank: int) -> int:
        """The number of a rank's node."""
        return rank // self.per_node

    def gather(self, value: Any) -> list[Any]:
        """A value of every rank, in rank order. Collective over the lane."""
        values: list = [None] * self.world
        torch.distributed.all_gather_object(values, value, group=self.lane)
        return values


def ranks_per_node(world: int, environ: Mapping[str, str] = os.environ) -> int:
    """From LOCAL_WORLD_SIZE, else Slurm's `4(x2)`; all ranks where neither is set."""
    text = environ.get("LOCAL_WORLD_SIZE") or environ.get("SLURM_TASKS_PER_NODE", "")
    number = text.partition("(")[0]
    return min(int(number), world) if number.isdigit() and int(number) else world


def nodes_of_launch() -> Nodes:
    """Collective. Raises ConfigError where the nodes have different numbers of ranks."""
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    limit = datetime.timedelta(seconds=LIMIT_S)
    lane = torch.distributed.new_group(backend="gloo", timeout=limit)
    nodes = Nodes(rank, world, ranks_per_node(world), lane)
    sizes = sorted(set(nodes.gather(nodes.per_node)))
    if len(sizes) > 1 or world % sizes[0]:
        raise ConfigError(
            f"--ckpt-tiers memory and local need equal nodes: {world} ranks, {sizes} on a node",
            do="start as many ranks on each node, or --ckpt-tiers store",
        )
    return nodes


def open_tiers(tiers: Iterable[Tier], nodes: Nodes) -> tuple[list[Tier], frozenset[str]]:
    """Make the folders of the fast tiers on every node and empty them of what killed writers left.

    The tiers that can be used, and the names of those that are spread over the nodes. A fast tier
    that cannot be made or written, or that holds what somebody else has put there, is one warning
    and none of them: the run does without it until it starts again. Collective.
    """
    usable, spread = [], set()
    for tier in tiers:
        try:
            if tier.name != STORE and not _open(tier, nodes):
                spread.add(tier.name)
            usable.append(tier)
        except (DiskError, Foreign, FailedElsewhere) as error:
            if not isinstance(error, FailedElsewhere):  # on the first rank that found it
                _log.warning(
                    "--ckpt-tiers: this run does without its %s tier: %s", tier.name, error.what
                )
    return usable, frozenset(spread)


def _open(tier: Tier, nodes: Nodes) -> bool:
    """True where all ranks see the folder of a fast tier. Collective. Raises DiskError, Foreign."""
    path = tier.directory
    agree(lambda: folder.on_disk(path, lambda: _make(tier, nodes)))
    return _is_seen_by_all(path, nodes)


class Foreign(Fatal):  # noqa: N818 - whose folder it is
    """A fast tier may hold what somebody else has put there; never ends a run."""

    code = DataError.code


def _make(tier: Tier, nodes: Nodes) -> None:
    if not nodes.is_leader:
        return
    directory = tier.directory
    why = foreign(tier)  # before mkdir, which would follow a link
    if not why:
        tier.make()
        why = foreign(tier)  # somebody may have been faster
    if why:
        raise Foreign(f"{why}: whoever may write there decides what this run loads")
    for mark in directory.glob(f"{_MARK}*"):
        mark.unlink(missing_ok=True)
    if nodes.count == 1:
        folder.remove_unfinished(directory)


def _is_seen_by_all(directory: Path, nodes: Nodes) -> bool:
    """Rank 0 leaves a mark; who sees it shares its folder. On several nodes, the leader of a folder
    of its own sweeps it here. Collective.
    """
    mark = directory / f"{_MARK}{first_rank(lambda: uuid.uuid4().hex[:8])}"
    agree(lambda: folder.on_disk(directory, mark.touch) if nodes.rank == 0 else None)
    sees = mark.exists()
    everyone = nodes.gather(sees)
    if nodes.count > 1 and nodes.is_leader and (nodes.rank == 0 or not sees):
        folder.on_disk(directory, lambda: folder.remove_unfinished(directory))
    mark.unlink(missing_ok=True)
    return all(everyone)


def steps_anywhere(directories: Iterable[Path], nodes: Nodes) -> dict[Path, list[int]]:
    """The steps of which some node has a folder, newest first. Collective."""
    mine = [folder.steps(path) for path in directories]
    everyone = nodes.gather(mine)
    return {
        path: sorted({step for seen in everyone for step in seen[index]}, reverse=True)
        for index, path in enumerate(directories)
    }


def remove_later(directories: Iterable[Path], step: int, nodes: Nodes) -> None:
    """Delete steps of an abandoned course: the run goes on from `step`. On the node's leader."""
    for path in directories if nodes.is_leader else ():
        for later in (found for found in folder.steps(path) if found > step):
            shutil.rmtree(path / folder.step_name(later), ignore_errors=True)
