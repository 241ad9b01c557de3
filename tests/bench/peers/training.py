"""The training step of a peer: forward, backward, clipping, AdamW; nothing else.

bf16: weights and gradients in bf16, fp32 masters that the fused AdamW updates, copied back.
fp32: weights, gradients and AdamW in fp32. No logging but the loss. Learning rate, betas, epsilon,
weight decay (matrices only), the limit of the gradient's norm and initial deviations are ours
(tests/bench/recipe.py), so that the curves must agree.
"""

from __future__ import annotations

import math
import re
import sys
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from tests.bench.gate import Gate
from tests.bench.peers.catalogue import PEERS
from tests.bench.shapes import Shape, dtype_of

WRITES = re.compile(r"attention\.out\.weight|down_|down\.|w2|\.proj\.")
"""Names of the second matrices of attention and experts in the layers that sit in decoder.py."""


class MasterAdamW:
    """Clipping and fused AdamW, on fp32 copies of those parameters that are not fp32."""

    def __init__(self, parameters: list[nn.Parameter], recipe: dict[str, Any]) -> None:
        self.low = [p for p in parameters if p.dtype != torch.float32]
        self.masters = [p.detach().float() for p in self.low]
        for master in self.masters:
            master.grad = torch.zeros_like(master)
        whole = [p for p in parameters if p.dtype == torch.float32]
        self.updated = self.masters + whole
        decay = recipe["weight_decay"]
        groups = [
            {"params": [p for p in self.updated if p.dim() > 1], "weight_decay": decay},
            {"params": [p for p in self.updated if p.dim() < 2], "weight_decay": 0.0},
        ]
        self.adam = torch.optim.AdamW(
            groups, lr=recipe["lr"], betas=recipe["betas"], eps=recipe["eps"], fused=True
        )
        self.parameters, self.clip = parameters, recipe["clip"]

    @torch.no_grad()
    def step(self) -> None:
        """Update from .grad and forget it. A parameter without a gradient counts as one of 0."""
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.low]
        if self.low:
            torch._foreach_copy_([master.grad for master in self.masters], grads)
        del grads
        if self.clip:
            torch.nn.utils.clip_grad_norm_(self.updated, self.clip)
        self.adam.step()
        if self.low:
            torch._foreach_copy_(self.low, self.masters)
        for p in self.parameters:
            p.grad = None


def initialise(model: nn.Module, std: float = 0.02) -> nn.Module:
    """The same module with matrices normal(0, std), those that write into the residual stream
    divided by sqrt(2 layers), as ours; vectors stay what they were.
    """
    torch.manual_seed(1234)
    blocks = getattr(model, "blocks", ())
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() > 1:
                is_last = bool(blocks) and WRITES.search(name) is not None
                p.normal_(0.0, std / math.sqrt(2 * len(blocks)) if is_last else std)
    return model


def tune() -> None:
    """What our trainer does to a CPU process before anything else (--tune-peers)."""
    from megatron_ext.device.select import keep_large_blocks, medium_matmul_keeps_float32
    from megatron_ext.native import tensor_memory

    keep_large_blocks()
    tensor_memory.use()
    if medium_matmul_keeps_float32():
        torch.set_float32_matmul_precision("medium")


def run(name: str, spec: dict[str, Any], gate: Gate) -> None:
    """Train the peer with that label for ever, on the batches of spec["data"]."""
    import numpy as np

    torch.set_num_threads(int(spec["threads"]))
    if spec.get("tune"):
        tune()
    shape = Shape(**spec["shape"])
    peer = next(peer for peer in PEERS if peer.label == name)
    module = import_module(f"tests.bench.peers.{peer.module}")
    dtype = dtype_of(spec["dtype"])
    model: nn.Module = module.model(peer.variant, shape, gate, dtype).train()
    loss_of = torch.compile(model) if peer.is_compiled else model
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = MasterAdamW(parameters, spec["recipe"])
    after = getattr(module, "after_step", None)
    gate.facts["parameters"] = sum(p.numel() for p in parameters)
    gate.facts.setdefault("note", module.NOTE)
    batches = torch.from_numpy(np.load(spec["data"]))
    step = 0
    while True:
        gate.step()
        tokens: Tensor = batches[step % len(batches)]
        loss, language = loss_of(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
        loss.backward()
        optimizer.step()
        if after is not None:
            after(model)
        gate.loss(language.item())
        step += 1
        if math.isnan(language):
            sys.exit("the loss is not a number")
