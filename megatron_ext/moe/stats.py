"""The routing record: what the routers did in one step, counted once and read by everybody.

Each router owns a `Tally` that it fills in its forward pass (once per micro-batch, also under
recompute: only the pass with gradients counts). After the backward passes `collect` makes one small
all-reduce over all ranks and gives every rank the same `RoutingRecord`; losses, metrics, health and
pictures read that and nobody counts again.

Worked example, 8 ranks tp2 dp2 pp2, 4 layers, 16 experts: every rank holds the routers of 2 layers
and S/tp of the tokens of its micro-batches. A [4, 16 + ...] table is filled in those 2 rows, the
sum over all 8 ranks adds the shards of tp, cp and dp within a row, and rows of different pipeline
stages do not overlap.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

LOSS_NAMES = (
    "load_balancing_loss",
    "seq_load_balancing_loss",
    "global_load_balancing_loss",
    "z_loss",
)


class Tally:
    """What one router saw since the last `clear`: counts of its own token shard, on its own device,
    without syncs.
    """

    def __init__(self, num_experts: int) -> None:
        self.num_experts = num_experts
        self.clear()

    def clear(self) -> None:
        self.num_micro_batches = 0
        self.counts_E: Tensor | None = None
        self.losses: dict[str, Tensor] = {}
        self.num_routed: Tensor | None = None

    def add_routing(self, routing_map_TE: Tensor, num_tokens_times_k: int) -> None:
        """Count one micro-batch: assignments kept per expert, and how many there would be without
        dropping.
        """
        counts = routing_map_TE.detach().sum(dim=0, dtype=torch.float64)
        self.counts_E = counts if self.counts_E is None else self.counts_E + counts
        routed = torch.full(
            (), float(num_tokens_times_k), dtype=torch.float64, device=counts.device
        )
        self.num_routed = routed if self.num_routed is None else self.num_routed + routed
        self.num_micro_batches += 1

    def add_loss(self, name: str, share: Tensor) -> None:
        """Add this rank's share of an unscaled loss: shares sum over all ranks of the layer to the
        layer's loss.
        """
        share = share.detach().double()
        self.losses[name] = self.losses[name] + share if name in self.losses else share

    def row(self) -> Tensor:
        """[E + 1 + len(LOSS_NAMES)]: counts, routed assignments, losses averaged over the
        micro-batches.
        """
        zero = torch.zeros((), dtype=torch.float64, device=self.counts_E.device)
        losses = [self.losses.get(name, zero) / self.num_micro_batches for name in LOSS_NAMES]
        return torch.cat((self.counts_E, torch.stack([self.num_routed, *losses])))


@dataclass(frozen=True)
class RoutingRecord:
    """One step's routing, identical on all ranks.

    counts_LE    [L, E] float64: assignments per expert that were computed, summed over the global
                 batch; rows of dense layers are zero. L = decoder layers, then MTP layers.
    dropped_L    [L]: assignments dropped by a capacity, same sum.
    losses_L     name -> [L]: unscaled loss (loss / coefficient; 1 is a perfectly even load), mean
                 over micro-batches.
    is_moe_L     [L] bool.
    """

    counts_LE: Tensor
    dropped_L: Tensor
    losses_L: dict[str, Tensor]
    is_moe_L: Tensor

    def mean_loss(self, name: str) -> float:
        """Mean over the MoE layers, as Megatron-LM logs it; 0 where no layer has this loss."""
        num_moe = int(self.is_moe_L.sum())
        return float(self.losses_L[name].sum()) / num_moe if num_moe else 0.0

    def max_violation_L(self) -> Tensor:
        """MaxVio = max load / mean load - 1 per layer (Wang et al. 2024, arXiv:2408.15664); 0 in
        dense layers.
        """
        mean = self.counts_LE.mean(dim=1).clamp(min=1e-9)
        return torch.where(
            self.is_moe_L, self.counts_LE.amax(dim=1) / mean - 1, torch.zeros(()).double()
        )

    def dead_experts_L(self) -> Tensor:
        """Number of experts of each layer that got no token of the global batch."""
        return ((self.counts_LE == 0) & self.is_moe_L[:, None]).sum(dim=1)


def tallies(chunks: Iterable[nn.Module], num_layers: int) -> Iterator[tuple[int, Tally]]:
    """(row, tally) of every router on this rank; rows of MTP layers follow those of the decoder."""
    for chunk in chunks:
        layer_of: dict[str, int] = {}
        for name, module in chunk.named_modules():
            if hasattr(module, "layer_number") and hasattr(module, "self_attention"):
                is_mtp = ".mtp." in f".{name}."
                mtp_index = int(name.partition("mtp.layers.")[2].partition(".")[0]) if is_mtp else 0
                layer_of[name] = num_layers + mtp_index if is_mtp else module.layer_number - 1
            tally = getattr(module, "tally", None)
            if isinstance(tally, Tally):
                owner = next(
                    parent for parent in reversed(layer_of) if name.startswith(parent + ".")
                )
                yield layer_of[owner], tally


def table_to_record(table: Tensor, num_experts: int) -> RoutingRecord:
    """Split the summed table [L, E + 1 + losses] into its named parts."""
    counts = table[:, :num_experts]
    routed = table[:, num_experts]
    losses = {name: table[:, num_experts + 1 + i] for i, name in enumerate(LOSS_NAMES)}
    return RoutingRecord(counts, routed - counts.sum(dim=1), losses, routed > 0)


def collect(
    chunks: Iterable[nn.Module], num_layers: int, num_mtp_layers: int, num_experts: int, device
) -> RoutingRecord:
    """Sum all tallies over all ranks (one all-reduce of L x (E + 5) numbers) and clear them."""
    width = num_experts + 1 + len(LOSS_NAMES)
    table = torch.zeros(num_layers + num_mtp_layers, width, dtype=torch.float64, device=device)
    for row, tally in tallies(chunks, num_layers):
        if tally.num_micro_batches:
            table[row] += tally.row()
            tally.clear()
    torch.distributed.all_reduce(table)
    return table_to_record(table.cpu(), num_experts)
