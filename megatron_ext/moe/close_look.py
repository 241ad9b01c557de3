"""Which experts are chosen together, and which domain of the data goes to which expert.

    with close_look(chunks, micro_batches, num_domains) as look:   # around one step's schedule
        ...forward and backward passes...
    look.collect(record)                                           # two all-reduces, all ranks

Both tables cost T x E x E and T x D x E operations a layer and a large all-reduce, so they are
taken only in the steps of --log-routing-interval; other steps run no line of this file. A router
counts while its chunk's forward pass runs: that happens once for each micro-batch whatever is
recomputed (recomputation runs in the backward pass, outside of it), and then the samples, hence the
domains, are known. Token t of a router's [S/tp/cp * B] shard is of sample t mod B in every layout.

Suffixes: L layers, D domains, E experts, T tokens, B samples.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from megatron.core import parallel_state
from torch import Tensor, nn
from torch.nn import functional as F

from megatron_ext.moe.experts import GroupedExperts
from megatron_ext.moe.stats import Look, RoutingRecord, tallies


def pairs(map_TE: Tensor) -> Tensor:
    """[E, E] float64: how many tokens chose both experts. Exact: sums of at most 2^24 ones."""
    chosen = map_TE.float()
    return (chosen.t() @ chosen).double()


def by_domain(map_TE: Tensor, domains_B: Tensor, num_domains: int) -> Tensor:
    """[D, E] float64: assignments of the tokens of each domain."""
    domains_T = domains_B.repeat(map_TE.shape[0] // domains_B.shape[0])
    owner_TD = F.one_hot(domains_T, num_domains).float()
    return (owner_TD.t() @ map_TE.float()).double()


def bad_blocks(rows_TH: Tensor, counts_e: Tensor) -> Tensor:
    """[e] float64: 1 where one of an expert's rows is not finite; rows are sorted by expert."""
    bad_T = (~torch.isfinite(rows_TH.detach()).flatten(1).all(dim=1)).double()
    owner_T = torch.arange(len(counts_e), device=counts_e.device).repeat_interleave(counts_e)
    sums_e = bad_T.new_zeros(len(counts_e)).index_add(0, owner_T, bad_T[: len(owner_T)])
    return (sums_e > 0).double()


@dataclass
class RouterLook:
    """What one router gathers in such a step. `domains_B` is set while its chunk runs forward."""

    num_domains: int
    domains_B: Tensor | None = None
    pairs_EE: Tensor | None = None
    domains_DE: Tensor | None = None
    logit_max: Tensor | None = None
    bad_outputs_e: Tensor | None = None

    @torch.no_grad()
    def add_outputs(self, rows_TH: Tensor, counts_e: Tensor) -> None:
        """The local experts' outputs of one micro-batch, sorted by expert: which are not finite."""
        bad_e = bad_blocks(rows_TH, counts_e.to(rows_TH.device))
        before_e = self.bad_outputs_e
        self.bad_outputs_e = bad_e if before_e is None else torch.maximum(before_e, bad_e)

    @torch.no_grad()
    def add(self, logits_TE: Tensor, map_TE: Tensor) -> None:
        """One micro-batch; nothing in a recomputation."""
        if self.domains_B is None:
            return
        chosen = pairs(map_TE), by_domain(map_TE, self.domains_B, self.num_domains)
        peak = logits_TE.detach().abs().amax().double()
        if self.pairs_EE is None:
            self.pairs_EE, self.domains_DE, self.logit_max = *chosen, peak
        else:
            self.pairs_EE = self.pairs_EE + chosen[0]
            self.domains_DE = self.domains_DE + chosen[1]
            self.logit_max = torch.maximum(self.logit_max, peak)


@dataclass
class CloseLook:
    """The looks of this rank's routers, by row of the record."""

    chunks: Sequence[nn.Module]
    num_layers: int
    num_domains: int
    rows: dict[int, RouterLook] = field(default_factory=dict)

    def collect(self, record: RoutingRecord) -> RoutingRecord:
        """The record with its `look`, the same on all ranks. Collective."""
        num_rows, num_experts = record.counts_LE.shape
        device = next(self.chunks[0].parameters()).device
        shape = (num_rows, num_experts + self.num_domains + 2, num_experts)
        sums = torch.zeros(shape, dtype=torch.float64, device=device)
        peaks = torch.zeros(num_rows, dtype=torch.float64, device=device)
        for row, look in self.rows.items():
            if look.pairs_EE is not None:
                sums[row, :num_experts] += look.pairs_EE
                sums[row, num_experts:-2] += look.domains_DE
                peaks[row] = look.logit_max
            if look.bad_outputs_e is not None:
                count = len(look.bad_outputs_e)
                first = parallel_state.get_expert_model_parallel_rank() * count
                sums[row, -2, first : first + count] += look.bad_outputs_e
        for row, bad_e, first in bad_parts(self.chunks, self.num_layers):
            sums[row, -1, first : first + len(bad_e)] += bad_e
        torch.distributed.all_reduce(sums)
        torch.distributed.all_reduce(peaks, op=torch.distributed.ReduceOp.MAX)
        sums, peaks = sums.cpu(), peaks.cpu()
        pairs, domains = sums[:, :num_experts], sums[:, num_experts:-2]
        return replace(record, look=Look(pairs, domains, peaks, sums[:, -1], sums[:, -2]))


def _gradient(weight: nn.Parameter) -> Tensor | None:
    return getattr(weight, "main_grad", weight.grad)


def _bad(experts: GroupedExperts, part: Callable[[nn.Parameter], Tensor | None]) -> Tensor:
    """[e] 1 where `part` of a weight of the local expert is not finite, else 0."""
    parts = (part(one) for one in experts.parameters())
    sums = [g.flatten(1).sum(dim=1, dtype=torch.float64) for g in parts if g is not None]
    if not sums:
        return experts.fc1_weight.new_zeros(experts.num_local_experts, dtype=torch.float64)
    return (~torch.isfinite(torch.stack(sums)).all(dim=0)).double()


def bad_parts(
    chunks: Sequence[nn.Module], num_layers: int, part: Callable = _gradient
) -> Iterator[tuple[int, Tensor, int]]:
    """(row, [e] 1 where `part` (the gradient) of a weight of the expert is not finite, number of
    expert 0) of this rank's experts, between the backward passes and the update. Experts of
    Transformer Engine are left out: they have one parameter for each expert.
    """
    for chunk in chunks:
        experts = [module for module in chunk.modules() if isinstance(module, GroupedExperts)]
        for (row, _), module in zip(tallies([chunk], num_layers), experts):
            first = parallel_state.get_expert_model_parallel_rank() * module.num_local_experts
            yield row, _bad(module, part), first


def bad_weights(chunks: Sequence[nn.Module], num_layers: int, shape_LE: torch.Size) -> Tensor:
    """[L, E]: ranks on which a weight of the expert is not finite. Collective, all ranks."""
    device = next(chunks[0].parameters()).device
    table = torch.zeros(shape_LE, dtype=torch.float64, device=device)
    for row, bad_e, first in bad_parts(chunks, num_layers, lambda weight: weight.detach()):
        table[row, first : first + len(bad_e)] += bad_e
    torch.distributed.all_reduce(table)
    return table.cpu()


@contextlib.contextmanager
def close_look(
    chunks: Sequence[nn.Module], micro_batches: Sequence, num_layers: int, num_domains: int
) -> Iterator[CloseLook | None]:
    """Let the routers of `chunks` gather during one run of the schedule over `micro_batches`, which
    every chunk takes in order; nothing, and None, for 0 domains.
    """
    if not num_domains:
        yield None
        return
    made = CloseLook(chunks, num_layers, num_domains)
    owners, hooks = [], []
    for chunk in chunks:
        looks = []
        for row, tally in tallies([chunk], num_layers):
            made.rows[row] = tally.look = RouterLook(num_domains)
            owners.append(tally)
            looks.append(tally.look)
        hooks += _hooks(chunk, looks, [batch.domain_ids_B for batch in micro_batches])
        experts = [module for module in chunk.modules() if isinstance(module, GroupedExperts)]
        hooks += [
            module.register_forward_hook(
                lambda one, given, out, to=to: to.add_outputs(*one.outputs_by_expert(given, out))
            )
            for to, module in zip(looks, experts)
        ]
    try:
        yield made
    finally:
        for hook in hooks:
            hook.remove()
        for tally in owners:
            tally.look = None


def _hooks(chunk: nn.Module, looks: Sequence[RouterLook], domains: Sequence[Tensor]) -> list:
    """Before each forward pass of the chunk its looks learn the domains, after it they forget."""
    order = iter(domains)

    def begin(*_) -> None:
        now = next(order)
        for look in looks:
            look.domains_B = now

    def end(*_) -> None:
        for look in looks:
            look.domains_B = None

    return [chunk.register_forward_pre_hook(begin), chunk.register_forward_hook(end)]
