"""Model FLOPs of a token: the work that the model's mathematics needs, whatever the run repeats.

A matrix of m x n costs a token 2*m*n forward and twice that backward: 6*m*n in all. Counted are
the linear layers that the token passes (top-k experts, shared experts, router, output), and
attention over the keys that the mask lets a query see: (S+1)/2 on average for causal attention
over S tokens, fewer with a sliding window. Not counted: recomputation, the embedding's look-up,
norms, softmax, activations, and dropped or padded expert slots. (PaLM, arXiv 2204.02311, appendix
B, but with the causal half of the attention only.)
"""

from __future__ import annotations

from megatron_ext.config import RunConfig
from megatron_ext.costs.parameters import moe_pattern, padded_vocab_size

FORWARD_AND_BACKWARD = 3
"""The backward pass costs two forward passes."""


def model_flops_per_token(cfg: RunConfig, vocab_size: int | None = None) -> float:
    """FLOPs of the forward and backward pass of one token, averaged over the sequence's positions.

    Args:
        vocab_size: the tokenizer's number of tokens, where --vocab-size is absent.
    """
    t = cfg.transformer
    pattern = moe_pattern(cfg)
    output = 2 * t.hidden_size * padded_vocab_size(cfg, vocab_size)
    forward = sum(_layer(cfg, index, moe) for index, moe in enumerate(pattern)) + output
    for _ in range(t.mtp_num_layers or 0):
        forward += _layer(cfg, len(pattern) - 1, pattern[-1]) + output
        forward += 2 * (2 * t.hidden_size) * t.hidden_size
    return float(FORWARD_AND_BACKWARD * forward)


def visible_keys(seq_length: int, window: int | None = None) -> float:
    """Mean number of keys that a causal query sees, its own included.

    Args:
        window: keys to the left that a query may see besides itself; None: all.
    """
    if window is None or window < 0 or window + 1 >= seq_length:
        return (seq_length + 1) / 2
    width = window + 1
    return (width * (width + 1) / 2 + (seq_length - width) * width) / seq_length


def _layer(cfg: RunConfig, index: int, moe: bool) -> float:
    t = cfg.transformer
    linear = _latent_attention(cfg) if t.multi_latent_attention else _attention(cfg)
    if moe:
        inside = t.moe_latent_size or t.hidden_size
        linear += t.hidden_size * t.num_moe_experts
        linear += t.moe_router_topk * _mlp(cfg, inside, t.moe_ffn_hidden_size)
        linear += 2 * t.hidden_size * (t.moe_latent_size or 0)
        linear += _mlp(cfg, t.hidden_size, t.moe_shared_expert_intermediate_size or 0)
        linear += t.hidden_size if t.moe_shared_expert_gate else 0
    else:
        linear += _mlp(cfg, t.hidden_size, t.ffn_hidden_size)
    return 2 * linear + attention_flops(cfg, index)


def attention_flops(cfg: RunConfig, index: int) -> float:
    """Forward q.k and p.v of one query: 2 * A * (Dqk + Dv) for each key that it sees."""
    t = cfg.transformer
    width = 2 * t.kv_channels
    if t.multi_latent_attention:
        width = t.qk_head_dim + t.qk_pos_emb_head_dim + t.v_head_dim
    window = t.window_size[0] if t.window_size and has_window(cfg, index) else None
    return 2 * t.num_attention_heads * width * visible_keys(cfg.model.seq_length, window)


def has_window(cfg: RunConfig, index: int) -> bool:
    """--window-attn-skip-freq N: each N-th layer sees everything; a list says it by layer."""
    skip = cfg.transformer.window_attn_skip_freq
    if skip is None:
        return True
    if isinstance(skip, int):
        return (index + 1) % skip != 0
    return bool(skip[index])


def _attention(cfg: RunConfig) -> int:
    t = cfg.transformer
    queries = t.num_attention_heads * t.kv_channels
    keys = t.num_query_groups * t.kv_channels
    gate = queries if t.attention_output_gate else 0
    return t.hidden_size * (2 * queries + 2 * keys + gate)


def _latent_attention(cfg: RunConfig) -> int:
    t = cfg.transformer
    hidden, heads = t.hidden_size, t.num_attention_heads
    query = heads * (t.qk_head_dim + t.qk_pos_emb_head_dim)
    rank = t.q_lora_rank
    count = hidden * query if rank is None else rank * (hidden + query)
    count += hidden * (t.kv_lora_rank + t.qk_pos_emb_head_dim)
    count += t.kv_lora_rank * heads * (t.qk_head_dim + t.v_head_dim)
    return count + heads * t.v_head_dim * hidden


def _mlp(cfg: RunConfig, hidden: int, width: int) -> int:
    gates = 2 if cfg.model.swiglu or cfg.model.quick_geglu else 1
    return (gates + 1) * hidden * width
