"""Bytes that attention keeps for its backward pass; see activations.py.

Letters: N heads and G key groups of this rank, D head width, V value head; the others as in
micro_batch.py.
"""

from __future__ import annotations

from megatron_ext.config import RunConfig
from megatron_ext.costs.cpu_blocks import KEPT_LENGTH, block_length
from megatron_ext.costs.flops import has_window
from megatron_ext.costs.micro_batch import FP32, Shape, norm_bytes


def attention(cfg: RunConfig, s: Shape, index: int) -> dict[str, int]:
    """Part -> bytes of grouped-query attention in layer `index`."""
    t = cfg.transformer
    D, N = t.kv_channels, t.num_attention_heads // s.tp
    G = max(1, t.num_query_groups // s.tp)
    mixed = s.T * (N + 2 * G) * D * s.w
    is_math = _is_math(cfg, index)
    parts = {"qkv_input": s.t * s.H * s.w}
    in_blocks = _is_blockwise(cfg, index)
    keeps_mixed = (N == G or cfg.parallel.context_parallel_size > 1) and not is_math
    keeps_mixed = keeps_mixed and not in_blocks
    has_rope = cfg.model.position_embedding_type not in ("learned_absolute", "none")
    if t.qk_layernorm and not t.qk_l2_norm:
        copied = not s.te and not s.cpu and t.normalization == "RMSNorm" and s.w == 2
        rows = s.T * (N * norm_bytes(cfg, s, D) + G * norm_bytes(cfg, s, D))
        if cfg.model.qk_layernorm_over_heads:
            rows = s.T * ((N + G) * D * (FP32 + s.w) + 2 * FP32)
            copied = s.w == 2
        views = (G + (N if N == G else 0)) * D * s.w
        parts["qk_norm"] = rows if copied else rows - s.T * views
        keeps_mixed = keeps_mixed or not copied
    if has_rope and not s.te and not in_blocks:
        parts["rope"] = 4 * (s.T // s.B) * D * s.w
    own = has_rope or bool(t.qk_layernorm)
    parts["core_attention"] = _core(s, N, G, D, D, cfg, index, own=own)
    parts["qkv"] = mixed if keeps_mixed and not s.te else 0
    return parts


def _is_blockwise(cfg: RunConfig, index: int) -> bool:
    """Where model/blockwise.py does the attention."""
    t, p = cfg.transformer, cfg.parallel
    has_mask = not t.multi_latent_attention and t.window_size and has_window(cfg, index)
    return (
        p.device == "cpu"
        and cfg.model.transformer_impl != "transformer_engine"
        and p.context_parallel_size == 1
        and not has_mask
        and not t.attention_dropout
        and t.softmax_type == "vanilla"
    )


def kept_score_share(s: int, r: int) -> float:
    """Numbers that model/causal.py keeps of a head's [s, s] probabilities, over s * s: blocks of
    queries meet the keys up to their end. `r` query heads share a key head."""
    if s > KEPT_LENGTH:
        return 0.0
    block = block_length(s, r)
    ends = [min(s, start + block) for start in range(0, s, block)]
    return sum((end - start) * end for start, end in zip([0, *ends], ends)) / s**2


def _is_math(cfg: RunConfig, index: int) -> bool:
    """Where PyTorch's CPU attention falls back to products that keep the [S, S] scores."""
    t = cfg.transformer
    if cfg.model.transformer_impl == "transformer_engine" or cfg.parallel.device != "cpu":
        return False
    if cfg.parallel.context_parallel_size > 1:
        return False
    if _is_blockwise(cfg, index):
        return False
    unequal = t.multi_latent_attention and t.v_head_dim != t.qk_head_dim + t.qk_pos_emb_head_dim
    return bool(unequal or t.attention_dropout or t.softmax_type != "vanilla")


def _core(s: Shape, N: int, G: int, D: int, V: int, cfg: RunConfig, index: int, own: bool) -> int:
    """q, k, v, the output and its log-sum-exp; on a CPU the probabilities of short sequences
    instead; fallback: fp32 copies and the scores.

    Args:
        own: q and k are tensors of their own (rotated or normalised), not views of the projection.
    """
    out = s.T * N * V * s.w
    if _is_blockwise(cfg, index):
        scores = s.T * N * cfg.model.seq_length * kept_score_share(cfg.model.seq_length, N // G)
        return s.T * (N * D + G * (D + V)) * s.w + int(scores) * s.w + out
    if _is_math(cfg, index):
        keys = cfg.model.seq_length
        scores = s.T * N * keys * FP32 * (3 if cfg.transformer.attention_dropout else 1)
        return s.T * N * (2 * D + V) * FP32 + scores + out
    if cfg.parallel.context_parallel_size > 1 and not s.te:
        # the values are a view; outputs of the chunks beside the sum of them that goes on
        values = N * V if cfg.transformer.multi_latent_attention else 0
        return s.T * ((N + G) * D + values) * s.w + 2 * out + s.T * N * FP32
    if s.te:
        return s.T * (N * D + G * (D + V)) * s.w + out + s.T * N * FP32
    window = cfg.transformer.window_size if not cfg.transformer.multi_latent_attention else None
    mask = cfg.model.seq_length**2 * s.w if window and has_window(cfg, index) else 0
    q, k, v = N * D if own else 0, N * D if own else 0, 0 if N == G else N * V
    if N != G:
        q = k = N * D
    return s.T * (q + k + v) * s.w + out + s.T * N * FP32 + mask


def latent_attention(cfg: RunConfig, s: Shape, index: int) -> dict[str, int]:
    """Part -> bytes of multi-latent attention in layer `index`."""
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
    own_values = _is_math(cfg, index) or _is_blockwise(cfg, index)
    if not s.te and not own_values:  # the values are a view of the up projection
        parts["kv_up"] = s.T * N * (t.qk_head_dim + V) * s.w
    return parts


def attention_inputs(cfg: RunConfig, s: Shape, parts: dict[str, int]) -> int:
    """What stays when the core attention is recomputed: q, k, v and the projection's input."""
    t = cfg.transformer
    N, G = t.num_attention_heads // s.tp, max(1, t.num_query_groups // s.tp)
    if t.multi_latent_attention:
        D, V, own_v = t.qk_head_dim + t.qk_pos_emb_head_dim, t.v_head_dim, "kv_up" not in parts
        up = s.T * N * (t.qk_head_dim + V) * s.w if own_v else 0
        return s.T * N * (2 * D + V) * s.w + up
    D = t.kv_channels
    if _is_blockwise(cfg, 0):
        return s.T * 2 * (N + G) * D * s.w
    values = 0 if parts.get("qkv") else s.T * (N + 2 * G) * D * s.w
    own = s.T * (N + G) * D * s.w
    return own + values + s.T * N * D * s.w
