"""Which rank writes which piece: agreed once, and again only when the pieces of some rank change.

offers of all ranks -> rank 0: each box once, gaps and overlaps refused -> what each rank writes
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, is_main_replica

from megatron_ext.checkpoint.spots import Spot, assign, check_whole, spot_of


class Planner:
    """Keeps the plan of the last save.

    With `share_replicas` the copies of a weight on dp ranks compete and the rank with the fewest
    bytes gets it; otherwise the first replica is written.
    """

    def __init__(self, share_replicas: bool) -> None:
        self.share_replicas = share_replicas
        self.by_rank: list[list[Spot]] = []  # on rank 0: what each rank writes, in its order
        self._signature: list[Spot] | None = None
        self._mine: list[int] = []

    def plan(
        self, pieces: Iterable[ShardedTensor | ShardedObject]
    ) -> list[tuple[Spot, ShardedTensor | ShardedObject]]:
        """What this rank writes. Collective. Raises ValueError on every rank where the pieces of
        all ranks leave a gap or overlap.
        """
        if not self.share_replicas:
            pieces = [piece for piece in pieces if is_main_replica(piece.replica_id)]
        unique = {}  # tied weights once; an empty box is nobody's
        for piece in pieces:
            spot = spot_of(piece)
            if spot.num_bytes or not spot.shape:
                unique[spot.key] = (spot, piece)
        offered = list(unique.values())
        spots = [spot for spot, _ in offered]
        changed: list = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(changed, spots != self._signature)
        if any(changed):
            self._signature = None
            self._mine = self._agree(spots)
            self._signature = spots
        return [offered[index] for index in self._mine]

    def _agree(self, spots: list[Spot]) -> list[int]:
        rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
        offers: list | None = [None] * world if rank == 0 else None
        torch.distributed.gather_object(spots, offers, dst=0)
        answer: list = [None]
        if offers is not None:
            try:
                chosen = assign(offers)
                self.by_rank = [[o[i] for i in mine] for o, mine in zip(offers, chosen)]
                check_whole(spot for mine in self.by_rank for spot in mine)
                answer = [chosen]
            except ValueError as error:
                answer = [error]
        torch.distributed.broadcast_object_list(answer, src=0)
        if isinstance(answer[0], ValueError):
            raise answer[0]
        return answer[0][rank]
