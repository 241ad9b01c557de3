"""Faster collectives under torch.distributed's functions, for gloo groups (--gloo-collectives).

    shared    (default) what a rank waits for at once goes through memory that the ranks of a host
              share (host_collectives.py), where all ranks of the group are on one host; the rest as
              `messages`
    messages  reduce-scatter and asynchronous all-gather are made of other gloo collectives
              (gloo_messages.py); the rest is gloo's
    plain     gloo's own

`faster` replaces methods of `ProcessGroup`, where all of torch.distributed's functions end, whoever
bound them when, and puts them back on the way out. Recorders and listeners (mesh/calls.py) come on
top of it: they see one call, not what it is made of. Handles of asynchronous calls keep their
meaning: nothing waits for another rank before `wait`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._distributed_c10d import AllgatherOptions, ProcessGroup, ReduceOp

from megatron_ext.mesh import gloo_messages as messages
from megatron_ext.mesh import host_collectives as host
from megatron_ext.mesh.calls import Pending, is_heard, patched
from megatron_ext.mesh.same_host import MAX_RANKS, Channel, open_channel

NAMES = {
    "allreduce": ("allreduce",),
    "allreduce_coalesced": ("allreduce_coalesced",),
    "all_gather": ("all_gather_single", "_allgather_base"),
    "all_gather_coalesced": ("all_gather_single_coalesced", "allgather_into_tensor_coalesced"),
    "reduce_scatter": ("reduce_scatter_single", "_reduce_scatter_base"),
    "reduce_scatter_coalesced": (
        "reduce_scatter_single_coalesced",
        "reduce_scatter_tensor_coalesced",
    ),
    "all_to_all_single": ("all_to_all_single", "alltoall_base"),
    "broadcast": ("broadcast",),
}
"""Our names -> those of ProcessGroup's methods, which differ between versions of torch."""
LARGE_GATHER_BYTES, LARGE_BROADCAST_BYTES = 8 << 20, 4 << 20
"""From where on an all-gather of messages and a broadcast through memory were measured faster."""
SUMMED = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32)


def flat(tensor: Tensor) -> Tensor:
    """The same memory as one dimension, outside of autograd."""
    return tensor.data.view(-1)


def can_share(*tensors: Tensor) -> bool:
    """True where `flat` works: whole tensors on a CPU."""
    return all(one.device.type == "cpu" and one.is_contiguous() for one in tensors)


def divisor_of(op: Any, dtype: torch.dtype, size: int) -> int | None:
    """By what the sum of `size` ranks is divided, None where `op` is no sum or mean of ours."""
    if dtype in SUMMED and op == ReduceOp.SUM:
        return 1
    return size if dtype in SUMMED[:4] and op == ReduceOp.AVG else None


class Collectives:
    """The replaced methods; each takes what ProcessGroup's takes and falls back to it where the
    faster form does not apply, by what all ranks of the group know alike.
    """

    def __init__(self, kind: str, stock: dict[str, Callable], wait_s: float) -> None:
        self._has_memory, self._wait_s = kind == "shared", wait_s
        self._stock = stock
        self._channels: dict[tuple[int, ...], Channel | None] = {}
        self._groups: dict[int, tuple[ProcessGroup, tuple[int, ...]]] = {}

    def close(self) -> None:
        """Hang up on all channels."""
        for channel in self._channels.values():
            if channel is not None:
                channel.close()

    def _ranks(self, group: ProcessGroup) -> tuple[int, ...]:
        """Global ranks of a gloo group of several ranks, () of others."""
        known = self._groups.get(id(group))
        if known is None:
            is_ours = group.size() > 1 and torch.distributed.get_backend(group) == "gloo"
            ranks = tuple(torch.distributed.get_process_group_ranks(group)) if is_ours else ()
            known = self._groups[id(group)] = group, ranks
        return known[1]

    def _channel(self, group: ProcessGroup, options: Any) -> Channel | None:
        """The memory for a call that is waited for at once. Collective at a group's first call."""
        ranks = self._ranks(group)
        if not self._has_memory or not ranks or len(ranks) > MAX_RANKS or options.asyncOp:
            return None
        if ranks not in self._channels:

            def gather(mine: bytes) -> list[bytes]:
                row = torch.frombuffer(bytearray(mine), dtype=torch.uint8)
                whole = row.new_empty(len(ranks) * len(mine))
                self._stock["all_gather"](group, whole, row, AllgatherOptions()).wait()
                return [bytes(one.tolist()) for one in whole.chunk(len(ranks))]

            self._channels[ranks] = open_channel(group.rank(), len(ranks), gather, self._wait_s)
        channel = self._channels[ranks]
        if channel is not None:
            channel.group = group.group_name
        return channel

    def allreduce(self, group: ProcessGroup, tensors: Sequence[Tensor], options: Any):
        """Sum or mean of each of `tensors` over the ranks, in place."""
        divisor = divisor_of(options.reduceOp, tensors[0].dtype, group.size())
        channel = self._channel(group, options) if divisor and can_share(*tensors) else None
        if channel is None:
            return NotImplemented
        for tensor in tensors:
            host.all_reduce(channel, flat(tensor), divisor)
        return None

    allreduce_coalesced = allreduce

    def all_gather(self, group: ProcessGroup, output: Tensor, mine: Tensor, options: Any):
        """output = every rank's `mine`, one after the other."""
        return self.all_gather_coalesced(group, [output], [mine], options)

    def all_gather_coalesced(self, group, outputs, inputs, options):
        """`all_gather` of each pair of tensors."""
        if not can_share(*outputs, *inputs) or not self._ranks(group):
            return NotImplemented
        pairs = [(flat(output), flat(mine)) for output, mine in zip(outputs, inputs)]
        channel = self._channel(group, options)
        if channel is not None:
            for output, mine in pairs:
                host.all_gather(channel, output.chunk(channel.size), mine)
            return None
        if sum(output.nbytes for output in outputs) < LARGE_GATHER_BYTES:
            return NotImplemented
        made = [messages.all_gather(self._stock, group, *pair) for pair in pairs]
        return Pending.of(made, options.asyncOp)

    def reduce_scatter(self, group: ProcessGroup, output: Tensor, whole: Tensor, options: Any):
        """output = the sum or mean over ranks of their `whole`, this rank's piece of it."""
        return self.reduce_scatter_coalesced(group, [output], [whole], options)

    def reduce_scatter_coalesced(self, group, outputs, inputs, options):
        """`reduce_scatter` of each pair of tensors."""
        divisor = divisor_of(options.reduceOp, outputs[0].dtype, group.size())
        if not divisor or not can_share(*outputs, *inputs) or not self._ranks(group):
            return NotImplemented
        pairs = [(flat(output), flat(whole)) for output, whole in zip(outputs, inputs)]
        channel = self._channel(group, options)
        if channel is not None:
            for output, whole in pairs:
                host.reduce_scatter(channel, output, whole.chunk(channel.size), divisor)
            return None
        made = [messages.reduce_scatter(self._stock, group, *pair, divisor) for pair in pairs]
        return Pending.of(made, options.asyncOp)

    def all_to_all_single(self, group, output, whole, output_splits, input_splits, options):
        """Piece j of `whole` to rank j; splits are rows, [] for equal ones."""
        channel = self._channel(group, options) if can_share(output, whole) else None
        if channel is None:
            return NotImplemented
        outs, ins = (
            rows(output, output_splits, channel.size),
            rows(whole, input_splits, channel.size),
        )
        host.all_to_all(channel, outs, ins)
        return None

    def broadcast(self, group: ProcessGroup, tensors: Sequence[Tensor], options: Any):
        """The root's tensor on all ranks."""
        is_large = len(tensors) == 1 and tensors[0].nbytes >= LARGE_BROADCAST_BYTES
        channel = self._channel(group, options) if is_large and can_share(*tensors) else None
        if channel is None:
            return NotImplemented
        host.broadcast(channel, flat(tensors[0]), options.rootRank)
        return None


def rows(tensor: Tensor, splits: Sequence[int], size: int) -> list[Tensor]:
    """The pieces of `splits` rows ([]: equal ones for `size` ranks), each `flat`."""
    width = tensor.numel() // max(1, tensor.shape[0])
    sizes = [int(one) * width for one in splits] or [tensor.numel() // size] * size
    return list(flat(tensor).split(sizes))


def _method(ours: Callable, stock: Callable) -> Callable:
    def call(self, *args, **kwargs):
        if kwargs or not is_heard() or not hasattr(args[-1], "asyncOp"):
            return stock(self, *args, **kwargs)
        made = ours(self, *args)
        return stock(self, *args) if made is NotImplemented else made

    return call


@contextlib.contextmanager
def faster(kind: str, wait_s: float) -> Iterator[None]:
    """Within it, gloo groups use the collectives of `kind`; `wait_s`: how long one may take."""
    if kind == "plain":
        yield
        return
    methods = vars(ProcessGroup)
    found = {ours: [name for name in names if name in methods] for ours, names in NAMES.items()}
    stock = {ours: methods[names[0]] for ours, names in found.items()}
    stock |= {name: methods[name] for name in ("send", "recv")}
    collectives = Collectives(kind, stock, wait_s)
    made = {
        (ProcessGroup, name): _method(getattr(collectives, ours), methods[name])
        for ours, names in found.items()
        for name in names
    }
    with contextlib.closing(collectives), patched(made):
        yield
