"""Parameter counts from the flags: total, active for a token, and on each rank.

Counted are the tensors that megatron-core 0.16.1's GPTModel makes (its modules are the source),
with H hidden, F feed-forward width, D head width, A heads, G query groups, E experts, V padded
rows::

    attention  H*(A+2G)*D + A*D*H            MLA: H*Rq + Rq*A*(Dn+Dr) + H*(Rkv+Dr) + Rkv*A*(Dn+Dv)
    dense MLP  g*H*F + F*H, g = 2 if gated        + A*Dv*H (without Rq: H*A*(Dn+Dr))
    experts    E * (g*H*Fe + Fe*H), router E*H, shared experts g*H*Fs + Fs*H
    MTP layer  2H*H + three norms + a layer  embedding V*H, output V*H unless tied

The aux-loss-free expert bias is a buffer: not a parameter.  A tied embedding counts once in the
total, but pipelines keep a copy on the last stage, and so do MTP layers: per rank both are counted.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_ext.config import RunConfig
from megatron_ext.config.stages import Chunk


@dataclass(frozen=True)
class Parameters:
    """Counts of parameters (numbers, not bytes).

    Attributes:
        total: of the model, each tensor once, multi-token-prediction layers included.
        active: used by the forward pass of one token: top-k of the experts, without MTP layers.
        mtp: of the multi-token-prediction layers (included in total).
        embedding: of the embedding and output tables (included in total and active).
        per_stage: largest rank of each pipeline stage.
    """

    total: int
    active: int
    mtp: int
    embedding: int
    per_stage: tuple[int, ...]

    @property
    def per_rank(self) -> int:
        """Of the largest rank."""
        return max(self.per_stage)


@dataclass(frozen=True)
class Share:
    """How a rank's part is cut: tp for dense tensors, etp and experts for expert tensors."""

    tp: int
    etp: int
    experts: int


def padded_vocab_size(cfg: RunConfig, vocab_size: int | None = None) -> int:
    """Rows of the embedding table over all tp ranks: --padded-vocab-size exactly, else the
    vocabulary rounded up to a multiple of --make-vocab-size-divisible-by * tp; 0 where unknown.

    Args:
        vocab_size: the tokenizer's number of tokens, where --vocab-size is absent.
    """
    if cfg.model.padded_vocab_size is not None:
        return cfg.model.padded_vocab_size
    size = cfg.model.vocab_size or vocab_size or 0
    multiple = cfg.model.make_vocab_size_divisible_by * cfg.parallel.tensor_model_parallel_size
    return -(-size // multiple) * multiple


def moe_pattern(cfg: RunConfig) -> list[bool]:
    """For each decoder layer whether it has experts (--moe-layer-freq N: every N-th, from 0)."""
    t = cfg.transformer
    if t.num_moe_experts is None:
        return [False] * t.num_layers
    if isinstance(t.moe_layer_freq, int):
        return [layer % t.moe_layer_freq == 0 for layer in range(t.num_layers)]
    return [entry == 1 for entry in t.moe_layer_freq]


def count_parameters(cfg: RunConfig, vocab_size: int | None = None) -> Parameters:
    """Counts of a checked configuration.

    Args:
        vocab_size: the tokenizer's number of tokens, where --vocab-size is absent.
    """
    t, p = cfg.transformer, cfg.parallel
    experts = t.num_moe_experts or 0
    pattern = moe_pattern(cfg)
    whole = Share(1, 1, experts)
    rank = Share(
        p.tensor_model_parallel_size,
        p.expert_tensor_parallel_size or 1,
        experts // p.expert_model_parallel_size,
    )
    rows = padded_vocab_size(cfg, vocab_size)
    tables = _tables(cfg, rows)
    mtp = (t.mtp_num_layers or 0) * _mtp_layer(cfg, pattern, whole)
    trunk = tables + _norm(cfg, t.hidden_size)
    decoder = sum(_layer(cfg, moe, whole) for moe in pattern)
    used = Share(1, 1, min(t.moe_router_topk, experts))
    active = trunk + sum(_layer(cfg, moe, used) for moe in pattern)
    stages = tuple(
        sum(_chunk(cfg, chunk, pattern, rank, rows) for chunk in chunks) for chunks in cfg.stages
    )
    return Parameters(trunk + decoder + mtp, active, mtp, tables, stages)


def _tables(cfg: RunConfig, rows: int) -> int:
    """Embedding, learned positions and output of the whole model, tied tables once."""
    hidden = cfg.transformer.hidden_size
    tables = 2 if cfg.model.untie_embeddings_and_output_weights else 1
    return tables * rows * hidden + _positions(cfg)


def _positions(cfg: RunConfig) -> int:
    if cfg.model.position_embedding_type != "learned_absolute":
        return 0
    return cfg.model.max_position_embeddings * cfg.transformer.hidden_size


def _chunk(cfg: RunConfig, chunk: Chunk, pattern: list[bool], share: Share, rows: int) -> int:
    """One model chunk of one rank."""
    t = cfg.transformer
    table = rows * t.hidden_size // share.tp
    count = sum(_layer(cfg, pattern[layer], share) for layer in chunk.layers)
    count += chunk.mtp_layers * _mtp_layer(cfg, pattern, share)
    if chunk.embedding or chunk.mtp_layers:
        count += table + _positions(cfg)
    if chunk.loss and (cfg.model.untie_embeddings_and_output_weights or not chunk.embedding):
        count += table
    # megatron-core: with MTP the final norm follows the last decoder layer, not the loss.
    last = (t.num_layers - 1) in chunk.layers if t.mtp_num_layers else chunk.loss
    return count + (_norm(cfg, t.hidden_size) if last else 0)


def _norm(cfg: RunConfig, width: int) -> int:
    return width * (2 if cfg.transformer.normalization == "LayerNorm" else 1)


def _layer(cfg: RunConfig, moe: bool, share: Share) -> int:
    t = cfg.transformer
    attention = _latent_attention if t.multi_latent_attention else _attention
    count = 2 * _norm(cfg, t.hidden_size) + attention(cfg, share.tp)
    if moe:
        return count + _experts(cfg, share)
    return count + _mlp(cfg, t.hidden_size, t.ffn_hidden_size, share.tp)


def _mtp_layer(cfg: RunConfig, pattern: list[bool], share: Share) -> int:
    """Two norms, the 2H -> H projection, a layer of the last layer's kind, a final norm."""
    hidden = cfg.transformer.hidden_size
    projection = 2 * hidden * hidden // share.tp
    return projection + 3 * _norm(cfg, hidden) + _layer(cfg, pattern[-1], share)


def _attention(cfg: RunConfig, tp: int) -> int:
    t = cfg.transformer
    queries, keys = t.num_attention_heads * t.kv_channels, t.num_query_groups * t.kv_channels
    out = queries + 2 * keys + (queries if t.attention_output_gate else 0)
    count = t.hidden_size * out // tp + queries * t.hidden_size // tp
    if t.add_bias_linear or t.add_qkv_bias:
        count += out // tp
    if t.add_bias_linear:
        count += t.hidden_size
    if cfg.model.qk_layernorm_over_heads:
        count += queries + keys
    elif t.qk_layernorm and not t.qk_l2_norm:
        count += 2 * _norm(cfg, t.kv_channels)
    if t.softmax_type == "learnable":
        count += t.num_attention_heads // tp
    return count


def _latent_attention(cfg: RunConfig, tp: int) -> int:
    """DeepSeek-V2 (arXiv 2405.04434) 2.1.  Local layers split the down projections over tp;
    Transformer Engine's keep a copy on each rank."""
    t = cfg.transformer
    hidden, heads = t.hidden_size, t.num_attention_heads
    query = heads * (t.qk_head_dim + t.qk_pos_emb_head_dim)
    down = 1 if cfg.model.transformer_impl == "transformer_engine" else tp
    if t.q_lora_rank is None:
        count = hidden * query // tp
    else:
        count = hidden * t.q_lora_rank // down + t.q_lora_rank * query // tp
        count += _norm(cfg, t.q_lora_rank) if t.qk_layernorm else 0
    count += hidden * (t.kv_lora_rank + t.qk_pos_emb_head_dim) // down
    count += t.kv_lora_rank * heads * (t.qk_head_dim + t.v_head_dim) // tp
    count += _norm(cfg, t.kv_lora_rank) if t.qk_layernorm else 0
    return count + heads * t.v_head_dim * hidden // tp + (hidden if t.add_bias_linear else 0)


def _mlp(cfg: RunConfig, hidden: int, width: int, split: int) -> int:
    """Two linear layers split over ``split`` ranks by width; the second bias is not split."""
    gates = 2 if cfg.model.swiglu or cfg.model.quick_geglu else 1
    count = (gates + 1) * hidden * width // split
    return count + (gates * width // split + hidden if cfg.transformer.add_bias_linear else 0)


def _experts(cfg: RunConfig, share: Share) -> int:
    """Router (a copy on each rank), ``share.experts`` experts, shared experts and their gate."""
    t = cfg.transformer
    inside = t.moe_latent_size or t.hidden_size
    count = t.num_moe_experts * (t.hidden_size + (1 if t.add_bias_linear else 0))
    count += share.experts * _mlp(cfg, inside, t.moe_ffn_hidden_size, share.etp)
    if t.moe_latent_size:
        count += 2 * t.hidden_size * t.moe_latent_size
    if t.moe_shared_expert_intermediate_size:
        count += _mlp(cfg, t.hidden_size, t.moe_shared_expert_intermediate_size, share.tp)
        count += t.hidden_size if t.moe_shared_expert_gate else 0
    return count
