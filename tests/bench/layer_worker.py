"""The candidates of layer.py: forward and backward of one layer, timed apart."""

from __future__ import annotations

import contextlib
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.bench.gate import Gate
from tests.bench.peers.catalogue import PEERS
from tests.bench.peers.training import tune
from tests.bench.shapes import Shape, dtype_of


def _sync(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _output(result: Any) -> Tensor:
    return result[0] if isinstance(result, tuple) else result


class Dense(nn.Module):
    """The experts' products with one weight for all rows: no routing, no activation."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate, self.up = (
            nn.Parameter(torch.randn(shape.hidden, shape.width) * 0.02) for _ in range(2)
        )
        self.down = nn.Parameter(torch.randn(shape.width, shape.hidden) * 0.02)

    def forward(self, rows: Tensor) -> Tensor:
        """rows [T * K, H]; gate and up are only added, so that products alone are timed."""
        return torch.addmm(rows @ self.gate, rows, self.up) @ self.down


class Grouped(nn.Module):
    """The same through grouped_mm with as many equal groups as experts."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        experts = shape.experts
        self.gate, self.up = (
            nn.Parameter(torch.randn(experts, shape.hidden, shape.width) * 0.02) for _ in range(2)
        )
        self.down = nn.Parameter(torch.randn(experts, shape.width, shape.hidden) * 0.02)
        ends = torch.arange(1, experts + 1) * (shape.tokens * shape.topk) // experts
        self.register_buffer("ends", ends.to(torch.int32), persistent=False)

    def forward(self, rows: Tensor) -> Tensor:
        """rows [T * K, H]."""
        gate, up = (F.grouped_mm(rows, w, offs=self.ends) for w in (self.gate, self.up))
        return F.grouped_mm(gate + up, self.down, offs=self.ends)


def _ours(
    shape: Shape, spec: dict[str, Any], gate: Gate, stack: contextlib.ExitStack
) -> tuple[nn.Module, Callable]:
    """The MoE layer that a run builds from these flags."""
    from megatron_ext.config import parse
    from megatron_ext.device import start

    device = start(spec["device"])
    from megatron_ext.mesh.groups import process_groups
    from megatron_ext.model.gpt import Vocabulary, build_chunks

    gate.imported()
    flags = (
        f"--mock-data --tokenizer-type NullTokenizer --vocab-size {shape.vocabulary - 1}"
        f" --device {spec['device']} --num-layers 1 --hidden-size {shape.hidden}"
        f" --num-attention-heads {shape.heads} --ffn-hidden-size {shape.width}"
        f" --moe-ffn-hidden-size {shape.width} --num-experts {shape.experts}"
        f" --moe-router-topk {shape.topk} --moe-router-load-balancing-type aux_loss"
        f" --moe-aux-loss-coeff {shape.aux} --moe-token-dispatcher-type alltoall"
        " --moe-grouped-gemm --normalization RMSNorm --swiglu --disable-bias-linear"
        " --position-embedding-type rope --untie-embeddings-and-output-weights"
        f" --hidden-dropout 0 --attention-dropout 0 --seq-length {shape.sequence}"
        f" --max-position-embeddings {shape.sequence} --micro-batch-size {shape.batch}"
        f" --global-batch-size {shape.batch} --train-iters 1 --lr 1e-3 --eval-iters 0"
        f" --{'bf16' if spec['dtype'] == 'bf16' else 'no-bf16'}"
        f" --moe-kernels {spec.get('kernels', 'torch')}"
    ).split()
    cfg = parse([*flags, "--run-dir", tempfile.mkdtemp(dir=spec["folder"])])
    stack.enter_context(process_groups(cfg.parallel, device, cfg.train.seed))
    chunk = build_chunks(cfg, Vocabulary(shape.vocabulary, shape.vocabulary))[0]
    inner = next(
        m for m in chunk.modules() if type(m).__name__ == "MoELayer" or hasattr(m, "router")
    )
    inner.train()
    return inner, lambda x: inner(x.view(shape.sequence, shape.batch, shape.hidden))


def _peer(name: str, shape: Shape, spec: dict[str, Any], gate: Gate) -> tuple[nn.Module, Callable]:
    peer = next(peer for peer in PEERS if peer.label == name)
    module = import_module(f"tests.bench.peers.{peer.module}")
    made = module.layer(peer.variant, shape, dtype_of(spec["dtype"])).to(spec["device"]).train()
    gate.imported()
    gate.facts["note"] = module.NOTE
    return made, torch.compile(made) if peer.is_compiled else made


def _floor(name: str, shape: Shape, spec: dict[str, Any], gate: Gate) -> tuple[nn.Module, Callable]:
    gate.imported()
    made = (Dense if name == "dense" else Grouped)(shape)
    made.to(spec["device"])
    for p in made.parameters():
        p.data = p.data.to(dtype_of(spec["dtype"]))
    return made, made


def run(name: str, spec: dict[str, Any], gate: Gate) -> None:
    """Repeat a forward and backward pass for ever."""
    device, shape, stack = spec["device"], Shape(**spec["shape"]), contextlib.ExitStack()
    torch.set_num_threads(int(spec["threads"]))
    torch.manual_seed(1234)
    is_floor = name in ("dense", "grouped")
    if device == "cpu" and (is_floor or spec["tune"]):
        tune()
    if name == "ours":
        made, call = _ours(shape, spec, gate, stack)
    elif name == "ours triton":
        made, call = _ours(shape, spec | {"kernels": "triton"}, gate, stack)
    elif is_floor:
        made, call = _floor(name, shape, spec, gate)
    else:
        made, call = _peer(name, shape, spec, gate)
    gate.facts["parameters"] = sum(p.numel() for p in made.parameters())
    dtype = dtype_of(spec["dtype"])
    size = (shape.batch, shape.sequence, shape.hidden)
    if is_floor:
        size = (shape.tokens * shape.topk, shape.hidden)
    x = torch.randn(size).to(dtype).to(device).requires_grad_()
    weights = torch.randn(size).to(dtype).to(device)
    forward: list[float] = []
    backward: list[float] = []

    def parts() -> dict[str, Any]:
        times = {
            "forward_s": statistics.median(forward or [0.0]),
            "backward_s": statistics.median(backward or [0.0]),
        }
        forward.clear()
        backward.clear()
        return times

    gate.parts = parts
    while True:
        gate.step()
        x.grad = None
        for p in made.parameters():
            p.grad = None
        _sync(device)
        begin = time.perf_counter()
        y = _output(call(x))
        _sync(device)
        middle = time.perf_counter()
        y.backward(weights.view_as(y))
        _sync(device)
        backward.append(time.perf_counter() - middle)
        forward.append(middle - begin)
