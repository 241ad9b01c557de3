"""Stock megatron-core: GPTModel of its local layer specification with SequentialMLP.

Adapted to run on a CPU: the words "cuda" in it are rewritten on import and its errors on a CPU
corrected (megatron_ext.device); no layer of ours is in it; the optimizer is training.py's, without
DDP. Auxiliary loss 0.01.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.bench.gate import Gate
from tests.bench.shapes import Shape

NOTE = "adapted: rewritten for the CPU on import; no DDP, optimizer of the other peers; aux 0.01"


class Causal(nn.Module):
    """Their model with our call."""

    def __init__(self, inner: nn.Module, sequence: int) -> None:
        super().__init__()
        self.inner = inner
        hidden = torch.ones(1, 1, sequence, sequence).tril() < 0.5
        self.register_buffer("mask", hidden, persistent=False)

    def forward(self, tokens: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """tokens, labels [B, S]."""
        positions = torch.arange(tokens.shape[1]).expand_as(tokens)
        loss = self.inner(tokens, positions, self.mask, labels=labels).float().mean()
        return loss, loss.detach()


def _config(shape: Shape, dtype: torch.dtype):
    from megatron.core.transformer.transformer_config import TransformerConfig

    return TransformerConfig(
        num_layers=shape.layers,
        hidden_size=shape.hidden,
        num_attention_heads=shape.heads,
        ffn_hidden_size=shape.width,
        moe_ffn_hidden_size=shape.width,
        num_moe_experts=shape.experts,
        moe_router_topk=shape.topk,
        moe_router_load_balancing_type="aux_loss",
        moe_aux_loss_coeff=shape.aux,
        moe_token_dispatcher_type="alltoall",
        moe_grouped_gemm=False,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        use_cpu_initialization=True,
    )


def _groups() -> None:
    from megatron_ext.device import lift

    lift.lift()
    from megatron_ext.device import corrections

    corrections.apply("cpu")
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    torch.distributed.init_process_group("gloo")
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1234)


def model(name: str, shape: Shape, gate: Gate, dtype: torch.dtype) -> nn.Module:
    """The whole model."""
    _groups()
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    gate.imported()
    inner = GPTModel(
        _config(shape, dtype),
        get_gpt_layer_local_spec(shape.experts, moe_grouped_gemm=False, normalization="RMSNorm"),
        vocab_size=shape.vocabulary,
        max_sequence_length=shape.sequence,
        share_embeddings_and_output_weights=False,
        position_embedding_type="rope",
    )
    return Causal(inner, shape.sequence)


def layer(name: str, shape: Shape, dtype: torch.dtype) -> nn.Module:
    """One MoE layer; its call gives (output, bias)."""
    _groups()
    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
    from megatron.core.transformer.spec_utils import build_module

    spec = get_moe_module_spec(False, shape.experts, moe_grouped_gemm=False)
    return build_module(spec, config=_config(shape, dtype))
