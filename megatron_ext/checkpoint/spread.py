"""A checkpoint whose files lie on several nodes, read as one.

Every node says which files of a step it holds and which of them are as they were written; what is
whole on some node is enough. A rank reads what its node holds; the bytes of other files that its
pieces need are sent by a rank that holds them, into host memory until they are in place.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
from torch import Tensor

from megatron_ext.checkpoint import folder, manifest
from megatron_ext.checkpoint.hashes import Damaged
from megatron_ext.checkpoint.nodes import Nodes
from megatron_ext.checkpoint.reader import Span, StoredTensors, byte_span, check_share
from megatron_ext.checkpoint.spots import OBJECT_PREFIX, Box, overlap
from megatron_ext.errors import DataError
from megatron_ext.mesh.agree import agree

_log = logging.getLogger(__name__)


def _text(path: Path) -> bytes | None:
    """The manifest of a step's folder on this node; None where there is none."""
    try:
        return (path / manifest.MANIFEST).read_bytes()
    except OSError:
        return None


def _mark(text: bytes | None) -> Any:
    """(when it was written, hash in the first line): what tells two saves of a step apart."""
    try:
        body = json.loads(text)
        return float(body["manifest"]["time"]), str(body["hash"])
    except (TypeError, ValueError, KeyError):
        return None


def _same_manifest(path: Path, nodes: Nodes) -> None:
    """Every node gets the manifest of the newest save of this step; another save of it, of before
    the node left the run, makes way. Collective. Raises DataError.
    """
    text = _text(path)
    marks = nodes.gather(_mark(text))
    newest = max((mark for mark in marks if mark), default=None)

    def check() -> None:
        if newest is None and nodes.rank == 0:
            raise DataError("checkpoint is incomplete: no node holds a manifest", path=path)

    agree(check)
    box = [text]
    torch.distributed.broadcast_object_list(box, src=marks.index(newest), group=nodes.lane)

    def adopt() -> None:
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True, mode=0o700)
        folder.write_new(path / manifest.MANIFEST, box[0])

    is_other = nodes.is_leader and marks[nodes.rank] != newest
    agree(lambda: folder.on_disk(path, adopt) if is_other else None)


def _raise(failure: DataError | None) -> None:
    if failure is not None:
        raise failure


class SpreadTensors(StoredTensors):
    """`local`: files that this rank's node holds whole; `holders`: file -> ranks that can read
    it.
    """

    def __init__(self, path: Path, nodes: Nodes) -> None:
        super().__init__(path, verify=False, may_lack_files=True)
        self.nodes = nodes
        self.local: frozenset[str] = frozenset()
        self.holders: dict[str, list[int]] = {}
        self._arrived: dict[Span, Tensor] = {}

    def find_holders(self) -> Damaged | None:
        """Hash what this node holds, its ranks a share each, and learn who holds what; the damage
        that this rank saw. Collective.
        """
        nodes, damage = self.nodes, None
        present = [name for name in self.manifest.files if (self.path / name).exists()]
        bad = set()
        for name in present:
            try:
                check_share(self.manifest, nodes.place, nodes.per_node, [name])
            except DataError as error:
                damage = error if isinstance(error, Damaged) else damage
                bad.add(name)
        everyone = nodes.gather((present, bad))
        spoilt = [set() for _ in range(nodes.count)]
        for rank, (_, found) in enumerate(everyone):
            spoilt[nodes.node_of(rank)] |= found
        for rank, (names, _) in enumerate(everyone):
            for name in set(names) - spoilt[nodes.node_of(rank)]:
                self.holders.setdefault(name, []).append(rank)
        self.local = frozenset(n for n, ranks in self.holders.items() if nodes.rank in ranks)
        return damage

    def fetch(self, pieces: Iterable[ShardedTensor | ShardedObject]) -> int:
        """Get the bytes of these pieces that lie on other nodes; returns how many. Collective."""
        mine = list(dict.fromkeys(span for piece in pieces for span in self._missing(piece)))
        nodes, works = self.nodes, []
        wants = nodes.gather(mine)
        for number, span in enumerate(mine):
            raw = self._arrived[span] = torch.empty(span[2], dtype=torch.uint8)
            source = self._sender(span, nodes.rank, number)
            works.append(torch.distributed.irecv(raw, source, group=nodes.lane))
        failure = None
        for rank, spans in enumerate(wants):
            for number, span in enumerate(spans):
                if self._sender(span, rank, number) == nodes.rank:
                    failure = self._send(span, rank) or failure
        for work in works:
            work.wait()
        agree(lambda: _raise(failure))
        return sum(span[2] for span in mine)

    def _send(self, span: Span, rank: int) -> DataError | None:
        """Something is sent in any case: nobody may be left waiting."""
        failure, data = None, torch.zeros(span[2], dtype=torch.uint8)
        try:
            data = self.read_bytes(span)
        except DataError as error:
            failure = error
        torch.distributed.send(data, rank, group=self.nodes.lane)
        return failure

    def _sender(self, span: Span, rank: int, number: int) -> int:
        """The same on all ranks; they take turns."""
        ranks = self.holders[span[0]]
        return ranks[(rank + number) % len(ranks)]

    def _missing(self, piece: ShardedTensor | ShardedObject) -> Iterable[Span]:
        name, box = self._box(piece)
        for stored in self._pieces(name):
            both = overlap(box, (stored.spot.place, stored.spot.size))
            if both is not None and stored.file not in self.local:
                yield byte_span(stored, both)[0]

    def _box(self, piece: ShardedTensor | ShardedObject) -> tuple[str, Box]:
        if isinstance(piece, ShardedObject):
            name = OBJECT_PREFIX + piece.unique_key
            shape = self.shape(name)
            return name, ((0,) * len(shape), shape)
        size = (1,) * piece.prepend_axis_num + tuple(piece.local_shape)
        return piece.key, (tuple(piece.global_offset), size)

    def read_bytes(self, span: Span) -> Tensor:
        """Of a file of this node, or what `fetch` brought."""
        arrived = self._arrived.get(span)
        return super().read_bytes(span) if arrived is None else arrived

    def close(self) -> None:
        """Close the files and drop what was fetched."""
        super().close()
        self._arrived = {}


def open_spread(path: Path, nodes: Nodes) -> SpreadTensors:
    """A step of a fast tier, whose files are all whole on some node. Collective. Raises DataError
    where one is on no node any more, Damaged where the last copy is not what was written.
    """
    _same_manifest(path, nodes)
    stored = agree(lambda: SpreadTensors(path, nodes))
    damage = stored.find_holders()
    lost = sorted(set(stored.manifest.files) - set(stored.holders))
    is_damaged = any(nodes.gather(damage is not None))
    if damage is not None and not lost:
        _log.warning("%s; another node holds it whole", damage)

    def check() -> None:
        if lost and damage is not None:
            raise damage
        if lost and not is_damaged and nodes.rank == 0:
            raise DataError(
                f"checkpoint is incomplete: {', '.join(lost[:8])} on no node", path=path
            )

    agree(check)
    return stored
