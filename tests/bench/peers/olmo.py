"""OLMo-core's DroplessMoE in decoder.py's model.

Adapted to run on a CPU: its gather and scatter are Triton kernels, here indexing and a sum over the
top-k; its grouped product without the grouped_gemm package is its own loop over experts, as it
comes. Auxiliary loss 0.01, attached to the output by OLMo-core itself.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor, nn

from tests.bench.gate import Gate
from tests.bench.peers.decoder import Decoder
from tests.bench.peers.training import initialise
from tests.bench.shapes import Shape

NOTE = "layer in decoder.py, adapted: gather and scatter without Triton; aux loss 0.01"


def _gather(x, indices, bin_ids, weights, bins, top_k: int) -> Tensor:
    """x [T, H] -> [T * K, H] in the experts' order, times the weights."""
    rows = x[indices.long() // top_k]
    return rows if weights is None else rows * weights[indices.long()].unsqueeze(-1).to(x.dtype)


def _scatter(x, indices, bin_ids, weights, bins, top_k: int) -> Tensor:
    """x [T * K, H] in the experts' order -> [T, H]."""
    back = torch.empty_like(x)
    back[indices.long()] = x
    if weights is not None:
        back = back * weights.unsqueeze(-1).to(x.dtype)
    return back.view(-1, top_k, x.shape[-1]).sum(dim=1)


def _scatter_wgrad(x, grad, indices, bin_ids, bins, top_k: int) -> Tensor:
    """Gradient of the weights [T * K]."""
    order = indices.long()
    out = torch.empty(order.numel(), dtype=x.dtype)
    out[order] = (x * grad[order // top_k]).sum(dim=-1)
    return out


class Olmo(nn.Module):
    """Their layer; its auxiliary loss is in its gradient already."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """x [B, S, H]."""
        return self.inner(x), None


def _make(shape: Shape) -> nn.Module:
    import olmo_core.ops.moe as ops
    from olmo_core.nn.moe import MoEConfig, MoERouterConfig, MoEType

    ops.kernels = SimpleNamespace(gather=_gather, scatter=_scatter, scatter_wgrad=_scatter_wgrad)
    config = MoEConfig(
        name=MoEType.dropless,
        num_experts=shape.experts,
        hidden_size=shape.width,
        router=MoERouterConfig(top_k=shape.topk, normalize_expert_weights=1.0),
        lb_loss_weight=shape.aux,
        scale_loss_by_num_layers=False,
    )
    return Olmo(config.build(shape.hidden))


def model(name: str, shape: Shape, gate: Gate, dtype: torch.dtype) -> nn.Module:
    """The whole model."""
    import olmo_core.nn.moe  # noqa: F401

    gate.imported()
    return _initialise(Decoder(shape, _make)).to(dtype)


def _initialise(made: nn.Module) -> nn.Module:
    initialise(made)
    for name, p in made.named_parameters():  # its router's matrix is a flat vector
        if p.dim() == 1 and "norm" not in name:
            nn.init.normal_(p, 0.0, 0.02)
    return made


def layer(name: str, shape: Shape, dtype: torch.dtype) -> nn.Module:
    """One MoE layer."""
    return _initialise(_make(shape)).to(dtype)
