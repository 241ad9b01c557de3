"""Tokens to their experts and back, without a T x E map: megatron-core's all-to-all dispatcher by
sorting.

    ep = etp = 1   x [T, H] --spread--> rows in the experts' blocks [P, H] --experts-->
                   --collect with the routing weights--> y [T, H]
    else           spread (by expert of all ranks) -> all-to-all over ep -> gather over etp
                   -> sorted into blocks -> experts -> and back the same way -> collect

Where megatron-core permutes, sorts chunks and pads (three copies), rows go to their place in one.
The routing weights stay with their tokens and are applied when a token's rows are summed: the last
product of an expert is linear, so this is megatron-core's weighting before it, and it saves an
all-to-all of weights forward and backward.

Suffixes: T tokens of this rank, K experts of each, A assignments (T x K where none is dropped), R
rows received, P places in blocks, E experts, e experts of this rank, H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core.tensor_parallel import (
    all_to_all,
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.token_dispatcher import (
    MoEAlltoAllTokenDispatcher,
    MoETokenDispatcher,
)
from torch import Tensor

from megatron_ext.costs.roads import can_sort
from megatron_ext.moe.choice import Choice, counted
from megatron_ext.moe.experts import GroupedExperts
from megatron_ext.moe.places import Places, chunk_order, expert_order, in_blocks, without_blocks
from megatron_ext.moe.rows import TokenRows, collect, sort_rows, spread, token_rows, unsort_rows


@dataclass(frozen=True)
class Exchange:
    """Rows that this rank sends to and gets from each rank, as lists for the collectives.

    sent, received  by ep rank;  gathered: by etp rank, all that its ep group sends here
    rows_Se         int64 on the CPU: rows of each source (etp x ep, ep fastest) for each expert
    """

    sent: list[int]
    received: list[int]
    gathered: list[int]
    rows_Se: Tensor


def exchange_of(counts: Tensor, first: int, num_local: int, tp_rank: int) -> Exchange:
    """`counts` [ep, etp, E] int64 on the CPU: assignments of every rank to every expert; this rank
    has experts `first` to `first + num_local`.
    """
    mine = counts[:, :, first : first + num_local].transpose(0, 1)  # [etp, ep, e]
    ranks = mine.sum(dim=2)
    own = counts[first // num_local, tp_rank]
    return Exchange(
        own.view(-1, num_local).sum(dim=1).tolist(),
        ranks[tp_rank].tolist(),
        ranks.sum(dim=1).tolist(),
        mine.reshape(-1, num_local),
    )


def of_choice(choice: Choice, probs_TK: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(experts [A], tokens [A], first assignment [T], weights [A])."""
    num_tokens, topk = choice.experts_TK.shape
    starts_T = torch.arange(0, num_tokens * topk, topk, device=probs_TK.device)
    tokens_A = torch.arange(num_tokens * topk, device=probs_TK.device) // topk
    return choice.experts_TK.reshape(-1), tokens_A, starts_T, probs_TK.reshape(-1)


def of_map(map_TE: Tensor, probs_TE: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same of megatron-core's map, in which a token may have any number of experts."""
    tokens_A, experts_A = map_TE.nonzero(as_tuple=True)
    counts_T = map_TE.sum(dim=1)
    return experts_A, tokens_A, torch.cumsum(counts_T, 0) - counts_T, probs_TE[map_TE]


class SortedDispatcher(MoETokenDispatcher):
    """Takes the place of `stock`, whose groups it uses. A forward pass leaves what its way back
    needs in `rows`, `weights_A`, `exchange` and `sorted`, as megatron-core's dispatchers do.
    """

    def __init__(self, stock: MoEAlltoAllTokenDispatcher, experts: GroupedExperts) -> None:
        super().__init__(stock.config, experts.groups)
        self.experts = experts
        self.num_experts = stock.num_experts
        self.first, self.num_local = stock.local_expert_indices[0], stock.num_local_experts
        self.is_local = self.ep_size == self.tp_size == 1
        self.hidden_shape: torch.Size | None = None
        self.rows: TokenRows | None = None
        self.weights_A: Tensor | None = None
        self.exchange: Exchange | None = None
        self.sorted: Places | None = None

    def _blocks(self, order: Tensor, counts: Tensor) -> Places:
        """Places of rows in `order` for this rank's experts."""
        if order.device.type != "cpu":
            return without_blocks(order, counts)
        counts = counts.tolist()
        return in_blocks(order, counts, self.experts.block_rows(counts))

    def _exchange(self, counts_E: Tensor) -> Exchange:
        """Collective over tp_ep; waits for the counts, as the all-to-all needs them."""
        every = gather_from_sequence_parallel_region(counts_E, group=self.tp_ep_group)
        every = every.view(self.ep_size, self.tp_size, self.num_experts).cpu()
        return exchange_of(every, self.first, self.num_local, self.tp_rank)

    def dispatch_preprocess(self, hidden_states: Tensor, routing_map: Choice | Tensor, probs):
        """[.., H] -> (rows by expert [P or A, H], None); `routing_map` is a Choice or a [T, E] map,
        `probs` [T, K] or [T, E].
        """
        self.hidden_shape = hidden_states.shape
        x_TH = hidden_states.reshape(-1, self.hidden_shape[-1])
        if isinstance(routing_map, Choice):
            experts_A, tokens_A, starts_T, self.weights_A = of_choice(routing_map, probs)
            counts_E = routing_map.counts_E
        else:
            experts_A, tokens_A, starts_T, self.weights_A = of_map(routing_map, probs)
            counts_E = counted(experts_A, self.num_experts)
        order = expert_order(experts_A, self.num_experts)
        if self.is_local:
            self.sorted = places = self._blocks(order, counts_E)
        else:
            places = without_blocks(order, counts_E)
            self.exchange = self._exchange(counts_E)
        self.rows = token_rows(places, tokens_A, starts_T)
        return spread(x_TH, self.rows), None

    def token_dispatch(self, hidden_states: Tensor, probs: None):
        """To the ranks of the experts: [A, H] -> [R/etp, H]."""
        if self.ep_size > 1:
            to = self.exchange
            hidden_states = all_to_all(self.ep_group, hidden_states, to.received, to.sent)
        return hidden_states, probs

    def dispatch_postprocess(self, hidden_states: Tensor, probs: None):
        """-> (rows in blocks [P, H], rows of each block [e], None)."""
        if self.is_local:
            return hidden_states, self.sorted.rows_E, probs
        if self.tp_size > 1:
            hidden_states = gather_from_sequence_parallel_region(
                hidden_states, group=self.tp_group, output_split_sizes=self.exchange.gathered
            )
        rows_Se = self.exchange.rows_Se
        order = chunk_order(rows_Se).to(hidden_states.device)
        self.sorted = self._blocks(order, rows_Se.sum(dim=0).to(hidden_states.device))
        return sort_rows(hidden_states, self.sorted), self.sorted.rows_E, probs

    def combine_preprocess(self, hidden_states: Tensor) -> Tensor:
        """Blocks [P, H] -> rows as they came, summed over etp: [R/etp, H]."""
        if self.is_local:
            return hidden_states
        hidden_states = unsort_rows(hidden_states, self.sorted)
        if self.tp_size > 1:
            dtype = hidden_states.dtype
            hidden_states = reduce_scatter_to_sequence_parallel_region(
                hidden_states.to(self.weights_A.dtype),
                group=self.tp_group,
                input_split_sizes=self.exchange.gathered,
            ).to(dtype)
        return hidden_states

    def token_combine(self, hidden_states: Tensor) -> Tensor:
        """Back to the ranks of the tokens: [R/etp, H] -> [A, H]."""
        if self.ep_size > 1:
            back = self.exchange
            hidden_states = all_to_all(self.ep_group, hidden_states, back.sent, back.received)
        return hidden_states

    def combine_postprocess(self, hidden_states: Tensor) -> Tensor:
        """[P or A, H] -> the weighted sums, in the shape that came."""
        return collect(hidden_states, self.weights_A, self.rows).view(self.hidden_shape)


def use_sorted_dispatch(layer: MoELayer) -> None:
    """Give a built MoE layer the sorted dispatcher, and its router's choice to it, where it can."""
    if isinstance(layer.experts, GroupedExperts) and can_sort(layer.config):
        layer.token_dispatcher = SortedDispatcher(layer.token_dispatcher, layer.experts)
        layer.router.hand_on_choice()
