"""Bytes that a layer keeps from its forward pass for its backward pass, on one rank.

    layer_saved(cfg, moe=True) -> {"input_norm": .., "attention": .., "experts": .., ...}

The formulas are those of the LOCAL layers (--transformer-impl local), tensor by tensor as autograd
saves them and every storage once; ``tests/planner/test_activations.py`` measures the real ones with
saved-tensor hooks.  Transformer Engine keeps less: its experts neither padding nor products of the
gate.  ``--transformer-impl transformer_engine`` therefore uses smaller factors here (`Shape.te`),
which are read from its sources, not measured.

Letters: those of micro_batch.py, R rows that reach this rank's experts, P those rows rounded up to
whole blocks on a CPU.
"""

from __future__ import annotations

import math

from megatron_ext.config import RunConfig
from megatron_ext.config.stages import Chunk
from megatron_ext.costs.attention_activations import (
    attention,
    attention_inputs,
    latent_attention,
)
from megatron_ext.costs.cpu_blocks import KEPT_SOFTMAX, KEPT_SOFTMAX_CPU, expected_rows
from megatron_ext.costs.micro_batch import FP32, ID_BYTES, Shape, norm_bytes, shape_of
from megatron_ext.costs.roads import can_fuse, can_sort
from megatron_ext.costs.tensors import moe_pattern, num_gates, padded_vocab_size


def routed_rows(cfg: RunConfig, imbalance: float = 1.0) -> int:
    """Rows that the experts of one rank get in a micro-batch: T*K tokens of the ep x etp ranks that
    share them, over ep, times `imbalance` (largest rank over mean)."""
    p, t, s = cfg.parallel, cfg.transformer, shape_of(cfg)
    etp = p.expert_tensor_parallel_size or 1
    mean = s.t * t.moe_router_topk * etp
    return int(mean * imbalance)


def layer_saved(
    cfg: RunConfig, moe: bool, imbalance: float = 1.0, index: int = 0, blocks: float | None = None
) -> dict[str, int]:
    """Part -> bytes of one layer, without recomputation.

    Args:
        imbalance: rows of the fullest rank over the mean.
        blocks: rows of the experts' blocks, padding included, where they are known.
    """
    s = shape_of(cfg)
    parts = {"input_norm": s.t * norm_bytes(cfg, s, s.H)}
    attend = latent_attention if cfg.transformer.multi_latent_attention else attention
    parts |= attend(cfg, s, index)
    if cfg.transformer.hidden_dropout:
        parts["dropout"] = 2 * s.t * s.H * s.w
    parts["pre_mlp_norm"] = s.t * norm_bytes(cfg, s, s.H)
    parts["mlp_input"] = s.t * s.H * s.w
    if moe:
        return parts | _experts(cfg, s, imbalance, blocks)
    return parts | {"mlp": s.T * _mlp(cfg, s, cfg.transformer.ffn_hidden_size)}


def _mlp(cfg: RunConfig, s: Shape, width: int) -> int:
    """Of one token: gated units keep both halves, the activated gate, the shifted other half and
    the product; plain ones the input and the output of the activation."""
    width //= s.tp
    if num_gates(cfg) == 2:
        return (3 if s.te else 5) * width * s.w
    return (3 if cfg.model.squared_relu else 2) * width * s.w


def expert_rows(cfg: RunConfig, rows: int) -> int:
    """Rows of the blocks that a rank's experts multiply (cpu_blocks.py on a CPU)."""
    t, p = cfg.transformer, cfg.parallel
    if p.device != "cpu" or cfg.model.transformer_impl == "transformer_engine":
        return rows
    width = t.moe_ffn_hidden_size // (p.expert_tensor_parallel_size or 1)
    flops = 2.0 * (num_gates(cfg) + 1) * width * t.hidden_size
    local = t.num_moe_experts // p.expert_model_parallel_size
    return expected_rows(rows, local, flops if can_sort(cfg.transformer) else math.inf)


def _is_by_hand(cfg: RunConfig) -> bool:
    """SwiGLU experts that keep nothing after fc1 (moe/feed_forward.py)."""
    t = cfg.transformer
    plain = t.activation_func_clamp_value is None and t.glu_linear_offset == 0
    return cfg.model.swiglu and plain and not t.add_bias_linear


def _kept_widths(cfg: RunConfig) -> int:
    """Expert widths of one row that sorted experts keep on a CPU."""
    if _is_by_hand(cfg):
        return 2
    return 5 if num_gates(cfg) == 2 else 2


def _experts(cfg: RunConfig, s: Shape, imbalance: float, blocks: float | None) -> dict[str, int]:
    t, p = cfg.transformer, cfg.parallel
    E, K = t.num_moe_experts, t.moe_router_topk
    rows = routed_rows(cfg, imbalance)
    padded = expert_rows(cfg, rows) if blocks is None else blocks
    width = t.moe_ffn_hidden_size // (p.expert_tensor_parallel_size or 1)
    router = s.t * (E * FP32 + K * (ID_BYTES + FP32) + FP32)
    moved = p.expert_model_parallel_size * (p.expert_tensor_parallel_size or 1) > 1
    parts = {"router": router}
    keep = 6 if num_gates(cfg) == 2 else 3
    if s.te:
        parts["dispatch"] = rows * (s.H * s.w + 2 * ID_BYTES)
        parts["experts"] = rows * (keep - 2) * width * s.w
    elif s.cpu and can_sort(cfg.transformer):
        parts["dispatch"] = (s.t * K if moved else padded) * s.H * s.w
        parts["dispatch"] += s.t * K * s.w
        parts["experts"] = padded * (s.H + _kept_widths(cfg) * width) * s.w
    else:
        parts["dispatch"] = rows * (ID_BYTES + s.H * s.w * (1 if s.cpu else 0) + s.w)
        parts["dispatch"] += rows * ID_BYTES if moved else 0
        parts["experts"] = padded * (s.H * s.w + keep * width * s.w + s.w)
    if t.moe_shared_expert_intermediate_size:
        parts["shared_experts"] = s.T * _mlp(cfg, s, t.moe_shared_expert_intermediate_size)
    return parts


RECOMPUTED = {
    "core_attn": ("core_attention",),
    "moe_act": (),
    "layernorm": ("input_norm", "pre_mlp_norm"),
    "mlp": ("mlp",),
    "moe": ("router", "dispatch", "experts", "shared_experts"),
    "shared_experts": ("shared_experts",),
    "mla_up_proj": ("kv_up", "rope"),
}
"""Module of --recompute-modules -> parts of `layer_saved` that are not kept."""


def kept(
    cfg: RunConfig,
    parts: dict[str, int],
    modules: tuple[str, ...] | None = None,
    blocks: float | None = None,
) -> int:
    """Bytes of a layer under selective recomputation of `modules` (default: the flags')."""
    t, s = cfg.transformer, shape_of(cfg)
    if modules is None:
        selective = t.recompute_granularity == "selective"
        modules = tuple(t.recompute_modules or ("core_attn",)) if selective else ()
    total = sum(parts.values())
    gone = {name for module in modules for name in RECOMPUTED.get(module, ())}
    total -= sum(parts.get(name, 0) for name in gone)
    if "layernorm" in modules and (s.te or not s.cpu):
        # its output goes as well; its input takes one of their places. Ours on a CPU keeps no more
        # than its input, which stays where the output was
        total -= s.t * s.H * s.w
    if "core_attn" in modules and "core_attention" in parts:
        total += attention_inputs(cfg, s, parts)
    if "moe_act" in modules and "experts" in parts and "moe" not in modules:
        total -= _activated(cfg, s, blocks)
    return total


def _activated(cfg: RunConfig, s: Shape, blocks: float | None) -> int:
    """The gate, the other half and the product that --recompute-modules moe_act does not keep."""
    t = cfg.transformer
    rows = expert_rows(cfg, routed_rows(cfg)) if blocks is None else blocks
    width = t.moe_ffn_hidden_size // (cfg.parallel.expert_tensor_parallel_size or 1)
    widths = 4 if num_gates(cfg) == 2 else 2
    if s.cpu and not s.te and can_sort(cfg.transformer):
        widths = 0 if _is_by_hand(cfg) else widths - 1
    return rows * widths * width * s.w


def chunk_saved(
    cfg: RunConfig,
    chunk: Chunk,
    imbalance: float = 1.0,
    vocab_size: int | None = None,
    blocks: float | None = None,
) -> int:
    """Bytes that one micro-batch keeps in one model chunk of one rank; `blocks` as in
    `layer_saved`, the mean of the layers.
    """
    t, s = cfg.transformer, shape_of(cfg)
    pattern = moe_pattern(cfg)
    total = s.T * ID_BYTES if chunk.embedding else 0
    if chunk.embedding and t.hidden_dropout:
        total += s.t * s.H * s.w
    total += layers_saved(cfg, [(i, pattern[i]) for i in chunk.layers], imbalance, blocks)
    last = (t.num_layers - 1) in chunk.layers if t.mtp_num_layers else chunk.loss
    total += s.t * norm_bytes(cfg, s, s.H) if last else 0
    head = loss_saved(cfg, vocab_size)
    for _ in range(chunk.mtp_layers):
        total += sum(layer_saved(cfg, pattern[-1], imbalance, t.num_layers - 1, blocks).values())
        total += s.t * (3 * norm_bytes(cfg, s, s.H) + 2 * s.H * s.w) + head
    return total + (head if chunk.loss else 0)


def layers_saved(
    cfg: RunConfig, layers: list[tuple[int, bool]], imbalance: float, blocks: float | None = None
) -> int:
    """Bytes of consecutive layers (index, has experts) under the flags' recomputation."""
    t, s = cfg.transformer, shape_of(cfg)
    if t.recompute_granularity != "full":
        parts = (layer_saved(cfg, moe, imbalance, i, blocks) for i, moe in layers)
        return sum(kept(cfg, one, None, blocks) for one in parts)
    each = s.t * s.H * s.w
    group = t.recompute_num_layers or 1
    if t.recompute_method == "uniform":
        return -(-len(layers) // group) * each
    rest = layers[group:]
    return len(layers[:group]) * each + sum(
        sum(layer_saved(cfg, moe, imbalance, i, blocks).values()) for i, moe in rest
    )


def loss_saved(cfg: RunConfig, vocab_size: int | None = None) -> int:
    """Of the output layer and its loss: the hidden states of all tokens and, up to a limit, a
    softmax over this rank's columns in 16 bits (model/cross_entropy.py), else what is needed to
    make it again; fp32 probabilities where megatron-core's loss is used.
    """
    s = shape_of(cfg)
    columns = padded_vocab_size(cfg, vocab_size) // s.tp
    if not can_fuse(cfg.transformer):
        return s.t * s.H * s.w + s.T * (columns * FP32 + ID_BYTES + 1)
    hidden, kept_softmax = s.T * s.H * s.w, s.T * columns * s.w
    if kept_softmax > (KEPT_SOFTMAX_CPU if s.cpu else KEPT_SOFTMAX):
        return hidden + s.T * (3 * FP32 + ID_BYTES + 1)
    return hidden + kept_softmax + (s.T * FP32 if s.tp > 1 else 0)
