"""litgpt: its GPT with LLaMAMoE and its chunked cross-entropy. LLaMAMoE has no auxiliary loss."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.bench.gate import Gate
from tests.bench.peers.training import initialise
from tests.bench.shapes import Shape

NOTE = "no aux loss in it; chunked_cross_entropy"


def _config(shape: Shape):
    from litgpt.config import Config

    return Config(
        name="bench",
        block_size=shape.sequence,
        vocab_size=shape.vocabulary,
        padded_vocab_size=shape.vocabulary,
        n_layer=shape.layers,
        n_head=shape.heads,
        n_query_groups=shape.heads,
        head_size=shape.head,
        n_embd=shape.hidden,
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        mlp_class_name="LLaMAMoE",
        intermediate_size=shape.width,
        moe_intermediate_size=shape.width,
        n_expert=shape.experts,
        n_expert_per_token=shape.topk,
    )


class Causal(nn.Module):
    """Their model with our call."""

    def __init__(self, inner: nn.Module, loss) -> None:
        super().__init__()
        self.inner, self.loss = inner, loss

    def forward(self, tokens: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """tokens, labels [B, S]."""
        loss = self.loss(self.inner(tokens), labels)
        return loss, loss.detach()


def model(name: str, shape: Shape, gate: Gate, dtype: torch.dtype) -> nn.Module:
    """The whole model."""
    from litgpt.model import GPT
    from litgpt.utils import chunked_cross_entropy

    gate.imported()
    inner = initialise(GPT(_config(shape))).to(dtype)
    return Causal(inner, chunked_cross_entropy)


def layer(name: str, shape: Shape, dtype: torch.dtype) -> nn.Module:
    """One MoE layer."""
    from litgpt.model import LLaMAMoE

    return initialise(LLaMAMoE(_config(shape))).to(dtype)
