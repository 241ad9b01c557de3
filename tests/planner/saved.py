"""Bytes that autograd really keeps of one micro-batch on this rank: every storage once, without the
weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn


def saved_bytes(chunk: nn.Module, run) -> int:
    """Bytes of the distinct storages that `run()` saves for backward and that are not `chunk`'s."""
    own = {x.untyped_storage().data_ptr() for x in (*chunk.parameters(), *chunk.buffers())}
    found: dict[int, Tensor] = {}

    def pack(x):
        storage = x.untyped_storage()
        if storage.nbytes() and storage.data_ptr() not in own:
            found.setdefault(storage._cdata, x)  # an address may be used again
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = run()
    total = sum(x.untyped_storage().nbytes() for x in found.values())
    out.float().mean().backward()
    return total


@contextlib.contextmanager
def blocks_seen() -> Iterator[list[int]]:
    """Fills with the rows of the experts' blocks, layer by layer."""
    from megatron_ext.moe.experts import GroupedExperts

    seen: list[int] = []
    stock = GroupedExperts.forward

    def forward(self, rows, *args):
        if torch.is_grad_enabled():  # else it runs again in the backward pass, which keeps it
            seen.append(rows.shape[0])
        return stock(self, rows, *args)

    GroupedExperts.forward = forward
    try:
        yield seen
    finally:
        GroupedExperts.forward = stock


def one_micro_batch(cfg, chunk: nn.Module, has_input: bool = False) -> tuple[int, float | None]:
    """`saved_bytes` of a random micro-batch through one model chunk, and the mean rows of the
    experts' blocks in its layers (None without such).

    Args:
        has_input: the chunk gets hidden states from a stage before it.
    """
    size, seq = cfg.train.micro_batch_size, cfg.model.seq_length
    local = seq // cfg.parallel.context_parallel_size
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, cfg.model.vocab_size, (size, local), generator=generator)
    positions = torch.arange(local).repeat(size, 1)
    inputs = {"input_ids": tokens, "position_ids": positions, "attention_mask": None}
    labels = {"labels": tokens, "loss_mask": torch.ones(size, local)}
    if has_input:
        dtype = next(chunk.parameters()).dtype
        hidden = torch.randn(local, size, cfg.transformer.hidden_size, dtype=dtype)
        inner = chunk.module if hasattr(chunk, "module") else chunk
        inner.set_input_tensor([hidden.requires_grad_()])
    chunk.train()

    def forward() -> Tensor:
        with blocks_seen() as seen:
            out = chunk(**inputs, **labels)
        rows.extend(seen)
        return out

    rows: list[int] = []
    saved = saved_bytes(chunk, forward)
    return saved, sum(rows) / len(rows) if rows else None
