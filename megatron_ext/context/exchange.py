"""Moves between the ranks of one group, started before and waited for after a computation."""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist
from torch import Tensor

Parcel = tuple[int, Tensor]
"""(rank in the group, contiguous tensor)."""


class Pending:
    """Transfers under way; holds their tensors until they are done."""

    def __init__(self, works: list, tensors: list[Tensor]) -> None:
        self.works, self.tensors = works, tensors

    def wait(self) -> None:
        """Return when everything that was sent may be overwritten and everything received read (on
        CUDA: from here on in the current stream)."""
        for work in self.works:
            work.wait()
        self.tensors = []


class Exchange:
    """Point-to-point transfers of a process group (gloo or NCCL).

    All ranks call `start` in the same order; between two ranks parcels arrive in the order in
    which they were sent, which is all that NCCL guarantees (it ignores tags). Sends and receives of
    a call are one batch, so that crossing messages cannot block each other.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.rank, self.size = group, group.rank(), group.size()
        self.global_ranks = dist.get_process_group_ranks(group)

    def start(self, sends: Sequence[Parcel], receives: Sequence[Parcel]) -> Pending:
        """Begin to send and to receive into the given tensors."""
        operations = [
            dist.P2POp(operation, tensor, self.global_ranks[peer], self.group)
            for operation, parcels in ((dist.isend, sends), (dist.irecv, receives))
            for peer, tensor in parcels
        ]
        works = dist.batch_isend_irecv(operations) if operations else []
        return Pending(works, [tensor for _, tensor in (*sends, *receives)])
