"""Collectives of the ranks of one host through the memory of a `Channel`.

Every byte is copied twice, in chunks that stay in the processor's cache: from the sender's tensor
to a slot and from the slot to the receiver's, where gloo's TCP copies it five times. Sums are in
the order of ranks, so that they do not depend on sizes or timing, and those of 16-bit tensors are
accumulated in fp32 and rounded once; two ranks give bit for bit what gloo gives.

Tensors are one-dimensional, contiguous and on the CPU. All ranks call the same function in the same
order, with pieces that fit each other.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_ext.mesh.same_host import Channel

SMALL_BYTES = 32 << 10
"""All-reduces up to this size are summed whole by every rank: one step instead of two."""
HALVES = (torch.bfloat16, torch.float16)


def sum_in_order(out: Tensor, terms: Sequence[Tensor], divisor: int = 1) -> None:
    """out = (((terms[0] + terms[1]) + ...) / divisor; `out` may be one of the terms."""
    wide = torch.float32 if out.dtype in HALVES else out.dtype
    first, *between, last = terms
    if between:
        first = first.to(wide, copy=True)
        for term in between:
            first.add_(term)
    if divisor == 1 and first.dtype == out.dtype:
        torch.add(first, last, out=out)
        return
    total = torch.add(first, last)
    out.copy_(total if divisor == 1 else total.div_(divisor))


def portions(numel: int, size: int) -> list[int]:
    """How many of `numel` elements each of `size` ranks sums: equal but for the last, and multiples
    of 64 where there are enough.
    """
    each = -(-numel // size)
    each = -(-each // 64) * 64
    return [max(0, min(each, numel - rank * each)) for rank in range(size)]


def _steps(channel: Channel, *num_bytes: int) -> int:
    return -(-max(num_bytes) // channel.chunk_bytes)


def _write(channel: Channel, slot: Tensor, source: Tensor, step: int) -> None:
    piece = source[step * channel.chunk_bytes : (step + 1) * channel.chunk_bytes]
    if piece.numel():
        slot[: piece.numel()].copy_(piece)


def _read(channel: Channel, slot: Tensor, target: Tensor, step: int) -> None:
    piece = target[step * channel.chunk_bytes : (step + 1) * channel.chunk_bytes]
    if piece.numel():
        piece.copy_(slot[: piece.numel()])


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.view(torch.uint8)


def all_to_all(channel: Channel, outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> None:
    """outputs[i] of rank j = inputs[j] of rank i; pieces may be empty."""
    me, peers = channel.rank, channel.peers
    outs, ins = [_bytes(one) for one in outputs], [_bytes(one) for one in inputs]
    steps = {peer: _steps(channel, ins[peer].numel(), outs[peer].numel()) for peer in peers}
    told = {peer: channel.token("all_to_all", ins[peer].numel()) for peer in peers}
    heard = {peer: channel.token("all_to_all", outs[peer].numel()) for peer in peers}
    for step in range(max(steps.values()) + 1):
        for peer in peers:
            if step < steps[peer]:
                _write(channel, channel.slot(me, peer), ins[peer], step)
                channel.tell(peer, told[peer])
        if step == 0:
            outs[me].copy_(ins[me])
        for peer in peers:
            if 0 < step <= steps[peer]:
                channel.hear(peer, heard[peer])
                _read(channel, channel.slot(peer, me), outs[peer], step - 1)


def reduce_scatter(
    channel: Channel, output: Tensor, inputs: Sequence[Tensor], divisor: int = 1
) -> None:
    """output of rank j = sum over ranks of their inputs[j], / divisor; `output` may be this rank's
    inputs[rank].
    """
    me, peers = channel.rank, channel.peers
    ins = [_bytes(one) for one in inputs]
    steps = _steps(channel, *(one.numel() for one in ins))
    token = channel.token("reduce_scatter", sum(one.numel() for one in ins))
    per_step = channel.chunk_bytes // output.element_size()
    for step in range(steps + 1):
        for peer in peers if step < steps else ():
            _write(channel, channel.slot(me, peer), ins[peer], step)
            channel.tell(peer, token)
        if step == 0:
            continue
        mine = slice((step - 1) * per_step, step * per_step)
        target, terms = output[mine], {me: inputs[me][mine]}
        for peer in peers:
            channel.hear(peer, token)
            terms[peer] = channel.slot(peer, me).view(output.dtype)[: target.numel()]
        sum_in_order(target, [terms[rank] for rank in range(channel.size)], divisor)


def all_gather(channel: Channel, outputs: Sequence[Tensor], mine: Tensor) -> None:
    """outputs[i] = what rank i has as `mine`, which may be this rank's outputs[rank]."""
    me, peers = channel.rank, channel.peers
    source, outs = _bytes(mine), [_bytes(one) for one in outputs]
    token = channel.token("all_gather", sum(one.numel() for one in outs))
    steps = _steps(channel, *(one.numel() for one in outs))
    for step in range(steps + 1):
        if step < steps:
            _write(channel, channel.slot(me, me), source, step)
            for peer in peers:
                channel.tell(peer, token)
        if step == 0:
            if outs[me].data_ptr() != source.data_ptr():
                outs[me].copy_(source)
            continue
        for peer in peers:
            channel.hear(peer, token)
            _read(channel, channel.slot(peer, peer), outs[peer], step - 1)


def all_reduce(channel: Channel, tensor: Tensor, divisor: int = 1) -> None:
    """tensor = sum over ranks, / divisor."""
    if tensor.numel() * tensor.element_size() <= min(SMALL_BYTES, channel.chunk_bytes):
        _all_reduce_small(channel, tensor, divisor)
        return
    pieces = list(tensor.split(portions(tensor.numel(), channel.size)))
    mine = pieces[channel.rank]
    reduce_scatter(channel, mine, pieces, divisor)
    all_gather(channel, pieces, mine)


def _all_reduce_small(channel: Channel, tensor: Tensor, divisor: int) -> None:
    me, num_bytes = channel.rank, tensor.numel() * tensor.element_size()
    token = channel.token("all_reduce", num_bytes)
    _write(channel, channel.slot(me, me), _bytes(tensor), 0)
    for peer in channel.peers:
        channel.tell(peer, token)
    terms = {me: tensor}
    for peer in channel.peers:
        channel.hear(peer, token)
        terms[peer] = channel.slot(peer, peer)[:num_bytes].view(tensor.dtype)
    sum_in_order(tensor, [terms[rank] for rank in range(channel.size)], divisor)


def broadcast(channel: Channel, tensor: Tensor, root: int) -> None:
    """tensor = that of rank `root`."""
    me, whole = channel.rank, _bytes(tensor)
    others = channel.peers if me == root else [root]
    token, steps = channel.token("broadcast", whole.numel()), _steps(channel, whole.numel())
    for step in range(steps + 1):
        if step < steps:
            if me == root:
                _write(channel, channel.slot(me, me), whole, step)
            for peer in others:
                channel.tell(peer, token)
        if step > 0:
            for peer in others:
                channel.hear(peer, token)
            if me != root:
                _read(channel, channel.slot(root, root), whole, step - 1)
