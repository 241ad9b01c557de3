"""Hugging Face transformers: MixtralForCausalLM and Qwen3MoeForCausalLM with each of their experts
implementations; attention through scaled_dot_product_attention; auxiliary loss 0.01.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.bench.gate import Gate
from tests.bench.shapes import Shape

NOTE = "aux loss 0.01"


def _config(kind: str, shape: Shape):
    from transformers import MixtralConfig, Qwen3MoeConfig

    common = {
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.heads,
        "head_dim": shape.head,
        "vocab_size": shape.vocabulary,
        "max_position_embeddings": shape.sequence,
        "num_experts_per_tok": shape.topk,
        "output_router_logits": True,
        "router_aux_loss_coef": shape.aux,
        "tie_word_embeddings": False,
        "use_cache": False,
        "rms_norm_eps": 1e-5,
    }
    if kind == "mixtral":
        return MixtralConfig(
            **common,
            intermediate_size=shape.width,
            num_local_experts=shape.experts,
            sliding_window=None,
        )
    return Qwen3MoeConfig(
        **common,
        intermediate_size=shape.width,
        moe_intermediate_size=shape.width,
        num_experts=shape.experts,
        norm_topk_prob=True,
        decoder_sparse_step=1,
    )


class Causal(nn.Module):
    """Their model with our call."""

    def __init__(self, inner: nn.Module, aux: float) -> None:
        super().__init__()
        self.inner, self.aux = inner, aux

    def forward(self, tokens: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """tokens, labels [B, S] (labels are shifted already)."""
        out = self.inner(input_ids=tokens, labels=labels, shift_labels=labels)
        return out.loss, (out.loss - self.aux * out.aux_loss).detach()


def model(name: str, shape: Shape, gate: Gate, dtype: torch.dtype) -> nn.Module:
    """kind:experts -> the whole model."""
    from transformers import AutoModelForCausalLM
    from transformers.models.mixtral import modeling_mixtral  # noqa: F401
    from transformers.models.qwen3_moe import modeling_qwen3_moe  # noqa: F401

    gate.imported()
    kind, experts = name.split(":")
    if kind == "qwen3":
        gate.facts["note"] = f"{NOTE}; norms of q and k besides"
    torch.manual_seed(1234)
    inner = AutoModelForCausalLM.from_config(
        _config(kind, shape),
        attn_implementation="sdpa",
        experts_implementation=experts,
        dtype=dtype,
    )
    return Causal(inner, shape.aux)


def layer(name: str, shape: Shape, dtype: torch.dtype) -> nn.Module:
    """kind:experts -> one MoE layer (its output alone)."""
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    from tests.bench.peers.training import initialise

    kind, experts = name.split(":")
    config = _config(kind, shape)
    config._experts_implementation = experts
    made = {"mixtral": MixtralSparseMoeBlock, "qwen3": Qwen3MoeSparseMoeBlock}[kind](config)
    return initialise(made).to(dtype)
