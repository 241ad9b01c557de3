"""The routing record: what the routers did in one step, counted once and read by everybody.

Each router owns a `Tally` that it fills in its forward pass (once per micro-batch, also under
recompute: only the pass with gradients counts). After the backward passes `collect` makes one small
all-reduce over all ranks and gives every rank the same `RoutingRecord`; losses, metrics, health and
pictures read that and nobody counts again. What costs more (which experts are chosen together,
which domain goes where) is taken only in the steps of --log-routing-interval: moe/close_look.py.

Worked example, 8 ranks tp2 dp2 pp2, 4 layers, 16 experts: every rank holds the routers of 2 layers
and S/tp of the tokens of its micro-batches. A [4, 2 x 16 + ...] table is filled in those 2 rows,
the sum over all 8 ranks adds the shards of tp, cp and dp within a row, and rows of different
pipeline stages do not overlap.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from megatron_ext.moe.routed import Routed

LOSS_NAMES = (
    "load_balancing_loss",
    "seq_load_balancing_loss",
    "global_load_balancing_loss",
    "z_loss",
)
SCORE_SUMS = ("entropy", "logit_norm", "logit_peak")
"""Sums over tokens that stand after the E probabilities of `score_sums`."""


def scores(logits_TE: Tensor, score_function: str) -> Tensor:
    """[T, E] the distribution over experts of each token: softmax, or sigmoids divided by their
    sum (what the balance losses use). An expert bias is not in it: it moves the choice, not this.
    """
    if score_function == "softmax":
        return torch.softmax(logits_TE, dim=-1)
    positive = torch.sigmoid(logits_TE)
    return positive / positive.sum(dim=-1, keepdim=True).clamp(min=1e-20)


def score_sums(logits_TE: Tensor, score_function: str) -> Tensor:
    """[E + 3] sums over the tokens: probability of each expert, entropy of a token's distribution
    (nats), L2 norm of its logits, its largest |logit|.
    """
    logits_TE = logits_TE.float()
    probs_TE = scores(logits_TE, score_function)
    entropy_T = torch.special.entr(probs_TE).sum(dim=-1)
    return torch.cat((probs_TE.sum(dim=0), _of_logits(logits_TE, entropy_T.sum())))


def _of_logits(logits_TE: Tensor, entropy: Tensor) -> Tensor:
    """[3] SCORE_SUMS of float32 logits, the first of them given."""
    norm_T = torch.linalg.vector_norm(logits_TE, dim=-1)
    peak_T = logits_TE.abs().amax(dim=-1)  # on a CPU 8 times as fast as an infinity norm
    return torch.stack((entropy, norm_T.sum(), peak_T.sum()))


def routed_sums(routed: Routed, probs_BE: Tensor) -> Tensor:
    """`score_sums` of what is scored already; `probs_BE` are sums of its distribution."""
    if routed.log_probs_TE is None:
        entropy = torch.special.entr(routed.probs_TE).sum()
    else:
        logs_TE = routed.log_probs_TE.clamp(min=-1e4)  # 0 * -inf is not a number
        entropy = -(routed.probs_TE * logs_TE).sum()
    return torch.cat((probs_BE.sum(dim=0), _of_logits(routed.logits_TE, entropy)))


class Tally:
    """What one router saw since the last `clear`: sums over its own token shard, on its own device,
    without syncs.
    """

    def __init__(self, num_experts: int) -> None:
        self.num_experts = num_experts
        self.look = None  # moe/close_look.py, in the steps that want one
        self.clear()

    def clear(self) -> None:
        self.num_micro_batches = 0
        self.num_tokens = 0
        self.num_routed = 0
        self.counts_E: Tensor | None = None
        self.scores: list[Tensor] = []
        self.losses: dict[str, Tensor] = {}

    def add_routing(self, routing_map_TE: Tensor, num_tokens_times_k: int) -> None:
        """Count one micro-batch: assignments kept per expert, and how many there would be without
        dropping.
        """
        counts_E = routing_map_TE.detach().sum(dim=0)
        self.add_counts(counts_E, routing_map_TE.shape[0], num_tokens_times_k)

    def add_counts(self, counts_E: Tensor, num_tokens: int, num_tokens_times_k: int) -> None:
        """The same, counted already (integers)."""
        self.counts_E = counts_E if self.counts_E is None else self.counts_E + counts_E
        self.num_tokens += num_tokens
        self.num_routed += num_tokens_times_k
        self.num_micro_batches += 1

    @torch.no_grad()
    def add_scores(self, logits_TE: Tensor, score_function: str) -> None:
        """Take the sums of `score_sums` of one micro-batch; they are added up once a step."""
        self.scores.append(score_sums(logits_TE.detach(), score_function))

    @torch.no_grad()
    def add_sums(self, routed: Routed, probs_BE: Tensor) -> None:
        """The same of logits that are scored already."""
        self.scores.append(routed_sums(routed, probs_BE))

    def add_loss(self, name: str, share: Tensor) -> None:
        """Add this rank's share of an unscaled loss: shares sum over all ranks of the layer to the
        layer's loss.
        """
        share = share.detach().double().view(1)
        self.losses[name] = self.losses[name] + share if name in self.losses else share

    def pieces(self) -> list[Tensor]:
        """One-dimensional tensors that make a row of `summed_rows`; a few micro-batches seen."""
        zero = self.counts_E.new_zeros(1)
        sums = self.scores or [self.counts_E.new_zeros(self.num_experts + len(SCORE_SUMS))]
        if len(sums) > 1:
            sums = [torch.stack(sums).sum(dim=0, dtype=torch.float64)]
        return [self.counts_E, *sums, *(self.losses.get(name, zero) for name in LOSS_NAMES)]


def summed_rows(seen: Sequence[Tally]) -> Tensor:
    """[n, width(E)] float64: counts, probabilities, score sums, tokens, routed assignments, and the
    losses averaged over the micro-batches, of n tallies that have seen some. One concatenation,
    whatever n is.
    """
    flat = torch.cat([piece.double() for tally in seen for piece in tally.pieces()])
    table = flat.view(len(seen), -1)
    known = [(one.num_tokens, one.num_routed, one.num_micro_batches) for one in seen]
    known = torch.tensor(known, dtype=torch.float64).to(flat.device)
    sums, losses = table.split((table.shape[1] - len(LOSS_NAMES), len(LOSS_NAMES)), dim=1)
    return torch.cat((sums, known[:, :2], losses / known[:, 2:]), dim=1)


def width(num_experts: int) -> int:
    """Numbers in a row of `summed_rows`."""
    return 2 * num_experts + len(SCORE_SUMS) + 2 + len(LOSS_NAMES)


@dataclass(frozen=True)
class RoutingRecord:
    """One step's routing, identical on all ranks.

    counts_LE     [L, E] float64: assignments per expert that were computed, summed over the global
                  batch; rows of dense layers are zero. L = decoder layers, then MTP layers.
    dropped_L     [L]: assignments dropped by a capacity, same sum.
    losses_L      name -> [L]: unscaled loss (loss / coefficient; 1 is a perfectly even load), mean
                  over micro-batches.
    is_moe_L      [L] bool.
    tokens_L      [L]: tokens that the layer's router scored, same sum as the counts.
    probs_LE      [L, E]: mean over those tokens of the router's distribution (see `scores`).
    entropy_L     [L]: mean over tokens of the entropy of a token's distribution, nats.
    logit_norm_L  [L]: mean over tokens of the L2 norm of the logits.
    logit_peak_L  [L]: mean over tokens of a token's largest |logit|.
    num_ranks     ranks that the sums are over: all of the run; within a row those are the tp, cp
                  and dp ranks of the layer's pipeline stage, the other stages add nothing.
    look          what only the steps of --log-routing-interval hold, else None.
    """

    counts_LE: Tensor
    dropped_L: Tensor
    losses_L: dict[str, Tensor]
    is_moe_L: Tensor
    tokens_L: Tensor
    probs_LE: Tensor
    entropy_L: Tensor
    logit_norm_L: Tensor
    logit_peak_L: Tensor
    num_ranks: int = 1
    look: Look | None = None

    @property
    def num_experts(self) -> int:
        """Experts of a layer."""
        return self.counts_LE.shape[1]

    @cached_property
    def _num_moe(self) -> int:
        return int(self.is_moe_L.sum())

    def mean_loss(self, name: str) -> float:
        """Mean over the MoE layers, as Megatron-LM logs it; 0 where no layer has this loss."""
        return float(self.losses_L[name].sum()) / self._num_moe if self._num_moe else 0.0

    def mean_of_layers(self, values_L: Tensor) -> float:
        """Mean over the MoE layers; 0 without one."""
        if not self._num_moe:
            return 0.0
        has_dense = self._num_moe < len(self.is_moe_L)
        return float((values_L[self.is_moe_L] if has_dense else values_L).double().mean())

    def max_violation_L(self) -> Tensor:
        """MaxVio = max load / mean load - 1 per layer (Wang et al. 2024, arXiv:2408.15664); 0 in
        dense layers.
        """
        return self._max_violation_L

    @cached_property
    def _max_violation_L(self) -> Tensor:
        mean = self.counts_LE.mean(dim=1).clamp(min=1e-9)
        return torch.where(
            self.is_moe_L, self.counts_LE.amax(dim=1) / mean - 1, torch.zeros(()).double()
        )

    def dead_experts_L(self) -> Tensor:
        """Number of experts of each layer that got no token of the global batch."""
        return self._dead_experts_L

    @cached_property
    def _dead_experts_L(self) -> Tensor:
        return ((self.counts_LE == 0) & self.is_moe_L[:, None]).sum(dim=1)

    def load_entropy_share_L(self) -> Tensor:
        """Entropy of the load / ln E: 1 even, 0 all tokens to one expert; 0 in dense layers."""
        return self._load_entropy_share_L

    @cached_property
    def _load_entropy_share_L(self) -> Tensor:
        total = self.counts_LE.sum(dim=1, keepdim=True).clamp(min=1e-9)
        return entropy(self.counts_LE / total) / math.log(max(self.num_experts, 2))

    def router_entropy_share_L(self) -> Tensor:
        """Mean entropy of a token's distribution / ln E: 1 undecided, 0 certain."""
        return self.entropy_L / math.log(max(self.num_experts, 2))

    def busiest_ep_rank_tokens(self, ep: int, replicas: int = 1) -> float:
        """Assignments of the most loaded expert-parallel rank in its most loaded layer, mean over
        the `replicas` (expert data parallel) of its experts; rank r holds E/ep experts from rE/ep.
        """
        per_rank = self.counts_LE.unflatten(1, (ep, -1)).sum(dim=2)
        return float(per_rank.max()) / replicas


@dataclass(frozen=True)
class Look:
    """The costly part of a record, summed over the global batch like the counts.

    pairs_LEE    [L, E, E]: tokens that chose both experts; the diagonal is counts_LE.
    domains_LDE  [L, D, E]: assignments of each domain's tokens; the sum over D is counts_LE.
    logit_max_L  [L]: largest |logit| of any token.
    bad_LE       [L, E]: ranks on which a weight gradient of the expert is not finite.
    bad_outputs_LE  [L, E]: ranks on which an output of the expert is not finite.
    """

    pairs_LEE: Tensor
    domains_LDE: Tensor
    logit_max_L: Tensor
    bad_LE: Tensor
    bad_outputs_LE: Tensor | None = None

    def nmi_L(self) -> Tensor:
        """[L] normalised mutual information of domain and expert, see `mutual_information`."""
        return mutual_information(self.domains_LDE)


def entropy(probs: Tensor) -> Tensor:
    """-sum p ln p over the last axis, nats."""
    return torch.special.entr(probs).sum(dim=-1)


def mutual_information(table_LDE: Tensor) -> Tensor:
    """[L] I(D; E) / min(H(D), H(E)) of tables of counts: 0 where the expert says nothing about the
    domain, 1 where one decides the other; 0 with a single domain. N counts of independent D and E
    give about (D - 1)(E - 1) / 2N nats by chance (Miller 1955).
    """
    joint = table_LDE.double() / table_LDE.sum(dim=(1, 2), keepdim=True).clamp(min=1e-9)
    domains, experts = entropy(joint.sum(dim=2)), entropy(joint.sum(dim=1))
    shared = domains + experts - entropy(joint.flatten(1))
    smaller = torch.minimum(domains, experts)
    return torch.where(smaller > 1e-9, (shared / smaller.clamp(min=1e-9)).clamp(0, 1), 0.0)


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


def table_to_record(table: Tensor, num_experts: int, num_ranks: int = 1) -> RoutingRecord:
    """Split the summed table [L, width(E)] into its named parts."""
    sizes = (num_experts, num_experts, len(SCORE_SUMS), 2, len(LOSS_NAMES))
    counts, probs, sums, known, losses = table.split(sizes, dim=1)
    tokens, routed = known.unbind(dim=1)
    per_token = tokens.clamp(min=1.0)
    means = {name: sums[:, i] / per_token for i, name in enumerate(SCORE_SUMS)}
    return RoutingRecord(
        counts,
        routed - counts.sum(dim=1),
        {name: losses[:, i] for i, name in enumerate(LOSS_NAMES)},
        routed > 0,
        tokens,
        probs / per_token[:, None],
        *(means[name] for name in SCORE_SUMS),
        num_ranks=num_ranks,
    )


def _tallies_of(chunk: nn.Module, num_layers: int) -> list[tuple[int, Tally]]:
    """`tallies` of one chunk; its modules are looked through once."""
    known = chunk.__dict__.get("_tallies")
    if known is None:
        known = chunk.__dict__["_tallies"] = list(tallies([chunk], num_layers))
    return known


def collect(
    chunks: Iterable[nn.Module], num_layers: int, num_mtp_layers: int, num_experts: int, device
) -> RoutingRecord:
    """Sum all tallies over all ranks (one all-reduce of L x (2E + 9) numbers) and clear them."""
    shape = (num_layers + num_mtp_layers, width(num_experts))
    table = torch.zeros(shape, dtype=torch.float64, device=device)
    known = [one for chunk in chunks for one in _tallies_of(chunk, num_layers)]
    seen = [(row, tally) for row, tally in known if tally.num_micro_batches]
    if seen:
        rows = torch.tensor([row for row, _ in seen], device=device)
        table.index_add_(0, rows, summed_rows([tally for _, tally in seen]))
        for _, tally in seen:
            tally.clear()
    world = torch.distributed.get_world_size()
    if world > 1:
        torch.distributed.all_reduce(table)
    return table_to_record(table.cpu(), num_experts, world)
