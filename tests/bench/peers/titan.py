"""torchtitan's MoE (router, local token dispatcher, grouped experts) in decoder.py's model.

Adapted to run on a CPU: its module of Triton kernels for an expert-parallel exchange, which the
local dispatcher does not use, is replaced by an empty one. It has no auxiliary loss; it balances
with a bias per expert, which its trainer moves before each optimizer step, and so do we. Its
experts multiply in bf16 whatever their weights are; "whole" leaves the casts out.
"""

from __future__ import annotations

import sys
import types

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.bench.gate import Gate
from tests.bench.peers.decoder import Decoder, grouped_product
from tests.bench.peers.training import initialise
from tests.bench.shapes import Shape

NOTE = "layer in decoder.py; no aux loss in it, expert bias instead"
IN_BF16 = "; its experts multiply in bf16, so in fp32 it does less work than the others"


def _without_kernels() -> None:
    name = "torchtitan.distributed.minimal_async_ep"
    empty = types.ModuleType(name)
    for missing in ("combine_op", "dispatch_op", "init_buffer", "MinimalAsyncEPDispatchMetadata"):
        setattr(empty, missing, object)
    sys.modules.setdefault(name, empty)


class Titan(nn.Module):
    """Their layer; no auxiliary loss."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """x [B, S, H]."""
        return self.inner(x), None


def _without_casts(experts, x_RD: Tensor, counts_E: Tensor) -> Tensor:
    """GroupedExperts.forward in the precision of the weights."""
    ends_E = counts_E.cumsum(0, dtype=torch.int32)
    up, gate, down = (w.transpose(-2, -1) for w in (experts.w3_EFD, experts.w1_EFD, experts.w2_EDF))
    h_RF = F.silu(grouped_product(x_RD, gate, ends_E)) * grouped_product(x_RD, up, ends_E)
    return grouped_product(h_RF, down, ends_E)


def _make(shape: Shape, variant: str) -> nn.Module:
    from torchtitan.models.common import moe
    from torchtitan.models.common.linear import Linear
    from torchtitan.models.common.token_dispatcher import LocalTokenDispatcher

    experts = shape.experts
    config = moe.MoE.Config(
        num_experts=experts,
        routed_experts=moe.RoutedExperts.Config(
            inner_experts=moe.GroupedExperts.Config(
                dim=shape.hidden, hidden_dim=shape.width, num_experts=experts
            ),
            token_dispatcher=LocalTokenDispatcher.Config(num_experts=experts, top_k=shape.topk),
        ),
        router=moe.TokenChoiceTopKRouter.Config(
            num_experts=experts,
            gate=Linear.Config(in_features=shape.hidden, out_features=experts, bias=False),
            top_k=shape.topk,
            score_func="softmax",
            route_norm=True,
        ),
        load_balance_coeff=1e-3,
    )
    made = config.build()
    if variant == "whole":
        inner = made.routed_experts.inner_experts
        inner.forward = types.MethodType(_without_casts, inner)
    return Titan(made)


def _in(made: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Weights in dtype; counts and biases of the experts stay fp32, as in torchtitan."""
    kept = {name: b for name, b in made.named_buffers() if name.endswith("_E")}
    made.to(dtype)
    for name, buffer in kept.items():
        owner, _, leaf = name.rpartition(".")
        setattr(made.get_submodule(owner), leaf, buffer)
    return made


def model(name: str, shape: Shape, gate: Gate, dtype: torch.dtype) -> nn.Module:
    """The whole model; name: "" as it comes, "whole"."""
    _without_kernels()
    from torchtitan.models.common import moe  # noqa: F401

    gate.imported()
    if dtype == torch.float32 and name != "whole":
        gate.facts["note"] = NOTE + IN_BF16
    return _in(initialise(Decoder(shape, lambda shape: _make(shape, name))), dtype)


def layer(name: str, shape: Shape, dtype: torch.dtype) -> nn.Module:
    """One MoE layer."""
    _without_kernels()
    return _in(initialise(_make(shape, name)), dtype)


@torch.no_grad()
def after_step(made: nn.Module) -> None:
    """The bias update of torchtitan's optimizer hook."""
    for block in made.blocks:
        inner = block.moe.inner
        counts = inner.tokens_per_expert_E
        delta = inner.load_balance_coeff * torch.sign(counts.mean() - counts)
        inner.expert_bias_E.add_(delta - delta.mean())
        counts.zero_()
