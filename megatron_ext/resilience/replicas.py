"""Replicas that must be equal, compared by hash: a flipped bit is found and its rank named (77).

    data parallel      dense weights over dp x cp, expert weights over the expert dp group
    tensor parallel    weights that tp does not split (norms, routers), over tp
    optimizer          masters and moments over the same dp groups, where the distributed optimizer
                       does not shard them

One number of 64 bits a tensor; the hashes of a group are gathered in one collective. Any single
flipped bit changes the hash, whichever it is. What has no replica (shards of the distributed
optimizer, expert weights with one expert-data-parallel rank) is not covered: docs/resilience.md has
the table.

Worked example, dp 4: the hashes of `decoder.layers.2.mlp.router.weight` are a a b a, so the third
rank of the group is the odd one. With dp 2 nobody knows which of the two is right: both are named.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from megatron.core import parallel_state
from torch import Tensor, nn

from megatron_ext.errors import CorruptionError, Fatal
from megatron_ext.mesh.agree import FailedElsewhere
from megatron_ext.resilience.blame import global_names
from megatron_ext.resilience.samples import mix

ROW = 512


def weights_of(rows: int) -> Tensor:
    """Odd 64-bit numbers [rows], one for each row of a tensor."""
    return torch.tensor([(mix(row) | 1) - 2**63 for row in range(rows)], dtype=torch.int64) | 1


def hash_of(tensor: Tensor, weights: Tensor) -> Tensor:
    """int64 scalar on the tensor's device: a weighted sum of its bits, modulo 2^64.

    A flip changes one word by a power of two and the sum by that times an odd number, which is
    never 0.
    """
    raw = tensor.detach().contiguous().view(-1).view(torch.uint8)
    rest = raw.numel() % 8
    words = raw[: raw.numel() - rest].view(torch.int64)
    whole = words[: words.numel() // ROW * ROW].view(-1, ROW).sum(dim=1)
    tail = words[words.numel() // ROW * ROW :]
    factors = weights.to(raw.device)
    rows = whole * factors[torch.arange(len(whole), device=raw.device) % len(factors)]
    places = torch.arange(len(tail), device=raw.device)
    last = raw[raw.numel() - rest :].to(torch.int64) * factors[:rest]
    return rows.sum() + (tail * factors[places % len(factors)]).sum() * 3 + last.sum() * 5


@dataclass(frozen=True)
class Odd:
    """A tensor whose replicas differ: the ranks that are not with the majority."""

    tensor: str
    ranks: list[int]
    is_certain: bool

    def __str__(self) -> str:
        who = "rank" if len(self.ranks) == 1 else "one of ranks" if not self.is_certain else "ranks"
        return f"{self.tensor} differs on {who} {', '.join(map(str, self.ranks))}"


def odd_ones(names: Sequence[str], hashes_RN: Tensor, ranks: Sequence[int]) -> list[Odd]:
    """Tensors that differ between the R ranks of a group, by majority; without one, all ranks."""
    found = []
    for column in (hashes_RN != hashes_RN[:1]).any(dim=0).nonzero().flatten().tolist():
        values = hashes_RN[:, column].tolist()
        (common, count), *others = Counter(values).most_common()
        is_certain = count > len(values) / 2 and all(other < count for _, other in others)
        odd = [r for r, value in zip(ranks, values) if value != common or not is_certain]
        found.append(Odd(names[column], odd, is_certain))
    return found


def _weights(chunks: Sequence[nn.Module]) -> Iterator[tuple[str, Tensor, bool, bool]]:
    """(global name, weight, belongs to experts, split over tp)."""
    for chunk in chunks:
        names = global_names(chunk)
        for module_name, module in chunk.named_modules():
            for name, weight in module.named_parameters(recurse=False):
                is_expert = not getattr(weight, "allreduce", True)
                is_split = is_expert or getattr(weight, "tensor_model_parallel", False)
                yield f"{names[module_name]}.{name}", weight, is_expert, is_split


def _states(optimizer, named: dict[int, tuple[str, bool]]) -> Iterator[tuple[str, Tensor, bool]]:
    """(name, master or moment, belongs to experts) of optimizers that hold whole tensors."""
    for leaf in getattr(optimizer, "chained_optimizers", [optimizer]):
        if hasattr(leaf, "gbuf_ranges") or leaf.optimizer is None:
            continue  # the distributed optimizer's shards have no replica
        masters = {
            id(main): weight
            for weights, mains in zip(
                getattr(leaf, "float16_groups", []), getattr(leaf, "fp32_from_float16_groups", [])
            )
            for weight, main in zip(weights, mains)
        }
        for main, values in leaf.optimizer.state.items():
            name, is_expert = named[id(masters.get(id(main), main))]
            if id(main) in masters:
                yield f"master of {name}", main, is_expert
            for key, value in values.items():
                if torch.is_tensor(value) and value.numel() > 1:
                    yield f"{key} of {name}", value, is_expert


def _compared(group, entries: list[tuple[str, Tensor]], weights: Tensor) -> list[Odd]:
    """Compare over one group; collective of its ranks."""
    if group.size() < 2 or not entries:
        return []
    mine = torch.stack([hash_of(tensor, weights) for _, tensor in entries])
    everyone = [torch.empty_like(mine) for _ in range(group.size())]
    torch.distributed.all_gather(everyone, mine, group=group)
    ranks = torch.distributed.get_process_group_ranks(group)
    return odd_ones([name for name, _ in entries], torch.stack(everyone).cpu(), ranks)


def differences(chunks: Sequence[nn.Module], optimizer) -> list[Odd]:
    """What differs in the groups of this rank. Collective."""
    weights = weights_of(4096)
    dense, expert, over_tp, named = [], [], [], {}
    for name, weight, is_expert, is_split in _weights(chunks):
        named[id(weight)] = (name, is_expert)
        (expert if is_expert else dense).append((name, weight))
        if not is_split:
            over_tp.append((name, weight))
    for name, value, is_expert in _states(optimizer, named):
        (expert if is_expert else dense).append((name, value))
    return [
        *_compared(
            parallel_state.get_data_parallel_group(with_context_parallel=True), dense, weights
        ),
        *_compared(parallel_state.get_expert_data_parallel_group(), expert, weights),
        *_compared(parallel_state.get_tensor_model_parallel_group(), over_tp, weights),
    ]


def check(chunks: Sequence[nn.Module], optimizer, step: int) -> None:
    """Raise CorruptionError on the odd rank and FailedElsewhere on the others where replicas
    differ. Collective of all ranks.
    """
    everyone: list = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, differences(chunks, optimizer))
    found = [odd for part in everyone for odd in part]
    if not found:
        return
    worst = min(found, key=lambda odd: (not odd.is_certain, len(odd.ranks)))
    raise _error(worst, len({odd.tensor for odd in found}), step)


def _error(odd: Odd, count: int, step: int) -> Fatal:
    more = f" and {count - 1} more tensors" if count > 1 else ""
    text = f"replicas are not equal after step {step}: {odd}{more}"
    if torch.distributed.get_rank() != odd.ranks[0]:
        return FailedElsewhere(CorruptionError.code, text)
    return CorruptionError(
        text,
        do="start again from the last checkpoint without this rank's node, and test its memory",
    )
