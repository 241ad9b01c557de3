"""Bytes that a layer keeps from its forward pass for its backward pass, on one rank.

    layer_saved(cfg, moe=True) -> {"input_norm": .., "attention": .., "experts": .., ...}

The formulas are those of the LOCAL layers (--transformer-impl local), tensor by tensor as autograd
saves them and every storage once; ``tests/planner/test_activations.py`` measures the real ones with
saved-tensor hooks.  Transformer Engine keeps less: its norms save one 16-bit input instead of two
fp32 tensors, its experts neither padding nor products of the gate.  ``--transformer-impl
transformer_engine`` therefore uses smaller factors here (`_te_*`), which are read from its sources,
not measured.

Letters: T tokens of this rank's context part, t = T/tp with sequence parallelism, H hidden, N heads
and G key groups of this rank, D head width, w bytes of a number (2 or 4), R rows that reach this
rank's experts, P those rows rounded up to whole blocks on a CPU.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_ext.config import RunConfig
from megatron_ext.config.stages import Chunk
from megatron_ext.costs.flops import has_window
from megatron_ext.costs.tensors import moe_pattern, num_gates, padded_vocab_size

ROW_BLOCK = 32
"""Rows that an expert's block is rounded up to on a CPU (moe/experts.py)."""

ID_BYTES = 8
FP32 = 4


@dataclass(frozen=True)
class Shape:
    """Sizes of one micro-batch on one rank; see the letters above."""

    T: int
    t: int
    w: int
    B: int
    H: int
    tp: int
    te: bool
    cpu: bool


def shape_of(cfg: RunConfig) -> Shape:
    """The micro-batch of a rank."""
    p, t = cfg.parallel, cfg.transformer
    tokens = cfg.model.seq_length * cfg.train.micro_batch_size // p.context_parallel_size
    tp = p.tensor_model_parallel_size
    return Shape(
        T=tokens,
        t=tokens // tp if p.sequence_parallel else tokens,
        w=2 if cfg.train.bf16 or cfg.train.fp16 else 4,
        B=cfg.train.micro_batch_size,
        H=t.hidden_size,
        tp=tp,
        te=cfg.model.transformer_impl == "transformer_engine",
        cpu=p.device == "cpu",
    )


def routed_rows(cfg: RunConfig, imbalance: float = 1.0) -> int:
    """Rows that the experts of one rank get in a micro-batch: T*K tokens of the ep x etp ranks that
    share them, over ep, times `imbalance` (largest rank over mean)."""
    p, t, s = cfg.parallel, cfg.transformer, shape_of(cfg)
    etp = p.expert_tensor_parallel_size or 1
    mean = s.t * t.moe_router_topk * etp
    return int(mean * imbalance)


def layer_saved(
    cfg: RunConfig, moe: bool, imbalance: float = 1.0, index: int = 0
) -> dict[str, int]:
    """Part -> bytes of one layer, without recomputation.

    Args:
        imbalance: rows of the fullest rank over the mean.
    """
    s = shape_of(cfg)
    parts = {"input_norm": s.t * norm_bytes(cfg, s, s.H)}
    attention = _latent_attention if cfg.transformer.multi_latent_attention else _attention
    parts |= attention(cfg, s, index)
    if cfg.transformer.hidden_dropout:
        parts["dropout"] = 2 * s.t * s.H * s.w
    parts["pre_mlp_norm"] = s.t * norm_bytes(cfg, s, s.H)
    parts["mlp_input"] = s.t * s.H * s.w
    if moe:
        return parts | _experts(cfg, s, imbalance)
    return parts | {"mlp": s.T * _mlp(cfg, s, cfg.transformer.ffn_hidden_size)}


def norm_bytes(cfg: RunConfig, s: Shape, width: int) -> int:
    """Of one row of `width`: RMSNorm in plain PyTorch keeps the fp32 input, the normalised fp32 row
    and 1/rms; LayerNorm and Transformer Engine's keep the row itself and the statistics."""
    if s.te:
        return width * s.w + FP32
    if cfg.transformer.normalization == "LayerNorm":
        return width * s.w + 2 * s.w
    return 2 * width * FP32 + FP32


def _attention(cfg: RunConfig, s: Shape, index: int) -> dict[str, int]:
    t = cfg.transformer
    D, N = t.kv_channels, t.num_attention_heads // s.tp
    G = max(1, t.num_query_groups // s.tp)
    mixed = s.T * (N + 2 * G) * D * s.w
    is_math = _is_math(cfg, index)
    parts = {"qkv_input": s.t * s.H * s.w}
    keeps_mixed = (N == G or cfg.parallel.context_parallel_size > 1) and not is_math
    has_rope = cfg.model.position_embedding_type not in ("learned_absolute", "none")
    if t.qk_layernorm and not t.qk_l2_norm:
        copied = not s.te and t.normalization == "RMSNorm" and s.w == 2
        rows = s.T * (N * norm_bytes(cfg, s, D) + G * norm_bytes(cfg, s, D))
        if cfg.model.qk_layernorm_over_heads:
            rows = s.T * ((N + G) * D * (FP32 + s.w) + 2 * FP32)
            copied = s.w == 2
        views = (G + (N if N == G else 0)) * D * s.w
        parts["qk_norm"] = rows if copied else rows - s.T * views
        keeps_mixed = keeps_mixed or not copied
    if has_rope and not s.te:
        parts["rope"] = 4 * (s.T // s.B) * D * s.w
    own = has_rope or bool(t.qk_layernorm)
    parts["core_attention"] = _core(s, N, G, D, D, cfg, index, own=own)
    parts["qkv"] = mixed if keeps_mixed and not s.te else 0
    return parts


def _is_math(cfg: RunConfig, index: int) -> bool:
    """Where PyTorch's CPU attention falls back to products that keep the [S, S] scores."""
    t = cfg.transformer
    if cfg.model.transformer_impl == "transformer_engine" or cfg.parallel.device != "cpu":
        return False
    if cfg.parallel.context_parallel_size > 1:
        return False
    unequal = t.multi_latent_attention and t.v_head_dim != t.qk_head_dim + t.qk_pos_emb_head_dim
    return bool(unequal or t.attention_dropout or t.softmax_type != "vanilla")


def _core(s: Shape, N: int, G: int, D: int, V: int, cfg: RunConfig, index: int, own: bool) -> int:
    """q, k, v, the output and its log-sum-exp; fallback: fp32 copies and the scores.

    Args:
        own: q and k are tensors of their own (rotated or normalised), not views of the projection.
    """
    out = s.T * N * V * s.w
    if _is_math(cfg, index):
        keys = cfg.model.seq_length
        scores = s.T * N * keys * FP32 * (3 if cfg.transformer.attention_dropout else 1)
        return s.T * N * (2 * D + V) * FP32 + scores + out
    if cfg.parallel.context_parallel_size > 1 and not s.te:  # the values are a view
        values = N * V if cfg.transformer.multi_latent_attention else 0
        return s.T * ((N + G) * D + values) * s.w + out + s.T * N * FP32
    if s.te:
        return s.T * (N * D + G * (D + V)) * s.w + out + s.T * N * FP32
    window = cfg.transformer.window_size if not cfg.transformer.multi_latent_attention else None
    mask = cfg.model.seq_length**2 * s.w if window and has_window(cfg, index) else 0
    q, k, v = N * D if own else 0, N * D if own else 0, 0 if N == G else N * V
    if N != G:
        q = k = N * D
    return s.T * (q + k + v) * s.w + out + s.T * N * FP32 + mask


def _latent_attention(cfg: RunConfig, s: Shape, index: int) -> dict[str, int]:
    t = cfg.transformer
    N, rank = t.num_attention_heads // s.tp, t.kv_lora_rank
    D, V = t.qk_head_dim + t.qk_pos_emb_head_dim, t.v_head_dim
    down = s.t * s.H * s.w
    narrow = 0
    for width in (t.q_lora_rank, rank):
        if width:
            norm = norm_bytes(cfg, s, width) if t.qk_layernorm else 0
            narrow += s.t * (norm + width * s.w)
    unnormed = 0 if t.qk_layernorm else s.t * t.qk_pos_emb_head_dim * s.w
    parts = {"down_input": down, "latent": narrow + unnormed}
    if not s.te:
        parts["rope"] = 4 * (s.T // s.B) * t.qk_pos_emb_head_dim * s.w
    parts["core_attention"] = _core(s, N, N, D, V, cfg, index, own=True)
    if not s.te and not _is_math(cfg, index):  # the values are a view of the up projection
        parts["kv_up"] = s.T * N * (t.qk_head_dim + V) * s.w
    return parts


def _mlp(cfg: RunConfig, s: Shape, width: int) -> int:
    """Of one token: gated units keep both halves, the activated gate, the shifted other half and
    the product; plain ones the input and the output of the activation."""
    width //= s.tp
    if num_gates(cfg) == 2:
        return (3 if s.te else 5) * width * s.w
    return (3 if cfg.model.squared_relu else 2) * width * s.w


def expert_rows(cfg: RunConfig, rows: int) -> int:
    """Rows with the padding of a CPU: half a block an expert on average."""
    if cfg.parallel.device != "cpu":
        return rows
    local = cfg.transformer.num_moe_experts // cfg.parallel.expert_model_parallel_size
    return rows + local * (ROW_BLOCK // 2)


def _experts(cfg: RunConfig, s: Shape, imbalance: float) -> dict[str, int]:
    t, p = cfg.transformer, cfg.parallel
    E, K = t.num_moe_experts, t.moe_router_topk
    rows = routed_rows(cfg, imbalance)
    padded = expert_rows(cfg, rows)
    width = t.moe_ffn_hidden_size // (p.expert_tensor_parallel_size or 1)
    router = s.t * (E * (2 * s.w + FP32 + 1) + K * (3 * ID_BYTES + FP32))
    if t.moe_router_dtype in ("fp32", "fp64"):
        wide = FP32 if t.moe_router_dtype == "fp32" else 2 * FP32
        router += s.t * E * (wide - s.w)
    moved = p.expert_model_parallel_size * (p.expert_tensor_parallel_size or 1) > 1
    parts = {"router": router}
    keep = 6 if num_gates(cfg) == 2 else 3
    if s.te:
        parts["dispatch"] = rows * (s.H * s.w + 2 * ID_BYTES)
        parts["experts"] = rows * (keep - 2) * width * s.w
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


def kept(cfg: RunConfig, parts: dict[str, int], modules: tuple[str, ...] | None = None) -> int:
    """Bytes of a layer under selective recomputation of `modules` (default: the flags')."""
    t, s = cfg.transformer, shape_of(cfg)
    if modules is None:
        selective = t.recompute_granularity == "selective"
        modules = tuple(t.recompute_modules or ("core_attn",)) if selective else ()
    total = sum(parts.values())
    gone = {name for module in modules for name in RECOMPUTED.get(module, ())}
    total -= sum(parts.get(name, 0) for name in gone)
    if "layernorm" in modules:  # its output goes as well; its input takes one of their places
        total -= s.t * s.H * s.w
    if "core_attn" in modules and "core_attention" in parts:
        total += _attention_inputs(cfg, s, parts)
    if "moe_act" in modules and "experts" in parts and "moe" not in modules:
        total -= _activated(cfg, s)
    return total


def _attention_inputs(cfg: RunConfig, s: Shape, parts: dict[str, int]) -> int:
    """What stays when the core attention is recomputed: q, k, v and the projection's input."""
    t = cfg.transformer
    N, G = t.num_attention_heads // s.tp, max(1, t.num_query_groups // s.tp)
    if t.multi_latent_attention:
        D, V, own_v = t.qk_head_dim + t.qk_pos_emb_head_dim, t.v_head_dim, "kv_up" not in parts
        up = s.T * N * (t.qk_head_dim + V) * s.w if own_v else 0
        return s.T * N * (2 * D + V) * s.w + up
    D = t.kv_channels
    values = 0 if parts.get("qkv") else s.T * (N + 2 * G) * D * s.w
    own = s.T * (N + G) * D * s.w
    return own + values + s.T * N * D * s.w


def _activated(cfg: RunConfig, s: Shape) -> int:
    """The gate, the other half and the product that --recompute-modules moe_act does not keep."""
    t = cfg.transformer
    rows = expert_rows(cfg, routed_rows(cfg))
    width = t.moe_ffn_hidden_size // (cfg.parallel.expert_tensor_parallel_size or 1)
    return rows * (4 if num_gates(cfg) == 2 else 2) * width * s.w


def chunk_saved(
    cfg: RunConfig, chunk: Chunk, imbalance: float = 1.0, vocab_size: int | None = None
) -> int:
    """Bytes that one micro-batch keeps in one model chunk of one rank."""
    t, s = cfg.transformer, shape_of(cfg)
    pattern = moe_pattern(cfg)
    total = s.T * ID_BYTES if chunk.embedding else 0
    if chunk.embedding and t.hidden_dropout:
        total += s.t * s.H * s.w
    total += layers_saved(cfg, [(i, pattern[i]) for i in chunk.layers], imbalance)
    last = (t.num_layers - 1) in chunk.layers if t.mtp_num_layers else chunk.loss
    total += s.t * norm_bytes(cfg, s, s.H) if last else 0
    head = loss_saved(cfg, vocab_size)
    for _ in range(chunk.mtp_layers):
        total += sum(layer_saved(cfg, pattern[-1], imbalance, t.num_layers - 1).values())
        total += s.t * (3 * norm_bytes(cfg, s, s.H) + 2 * s.H * s.w) + head
    return total + (head if chunk.loss else 0)


def layers_saved(cfg: RunConfig, layers: list[tuple[int, bool]], imbalance: float) -> int:
    """Bytes of consecutive layers (index, has experts) under the flags' recomputation."""
    t, s = cfg.transformer, shape_of(cfg)
    if t.recompute_granularity != "full":
        return sum(kept(cfg, layer_saved(cfg, moe, imbalance, i)) for i, moe in layers)
    each = s.t * s.H * s.w
    group = t.recompute_num_layers or 1
    if t.recompute_method == "uniform":
        return -(-len(layers) // group) * each
    rest = layers[group:]
    return len(layers[:group]) * each + sum(
        sum(layer_saved(cfg, moe, imbalance, i).values()) for i, moe in rest
    )


def loss_saved(cfg: RunConfig, vocab_size: int | None = None) -> int:
    """The output layer's input, the fp32 probabilities of this rank's columns, labels and mask."""
    s = shape_of(cfg)
    columns = padded_vocab_size(cfg, vocab_size) // s.tp
    return s.t * s.H * s.w + s.T * (columns * FP32 + ID_BYTES + 1)
