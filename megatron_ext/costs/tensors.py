"""Every parameter tensor of a model chunk, in the order in which megatron-core registers it.

    chunk_tensors(cfg, chunk, share) -> [Tensor("embedding.word_embeddings.weight", 8192), ...]

Elements of ONE rank (``Share`` says how it is cut).  The order decides where DDP pads its
buffers and cuts its buckets (`states.py`), so it is the modules' order, not the mathematics':
an attention registers its output projection before its input.  Source: the named_parameters() of
megatron-core 0.16.1 with local layers; Transformer Engine registers the same tensors with the norms
inside the linear layers, so only the padding can differ there.

Formulas, with H hidden, F feed-forward width, D head width, A heads, G query groups, E experts, V
padded rows::

    attention  H*(A+2G)*D + A*D*H            MLA: H*Rq + Rq*A*(Dn+Dr) + H*(Rkv+Dr) + Rkv*A*(Dn+Dv)
    dense MLP  g*H*F + F*H, g = 2 if gated        + A*Dv*H (without Rq: H*A*(Dn+Dr))
    experts    E * (g*H*Fe + Fe*H), router E*H, shared experts g*H*Fs + Fs*H
    MTP layer  2H*H + three norms + a layer  embedding V*H, output V*H unless tied
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron_ext.config import RunConfig
from megatron_ext.config.stages import Chunk


@dataclass(frozen=True)
class Tensor:
    """One parameter of one rank.

    Attributes:
        count: elements on this rank.
        expert: reduced over the expert data-parallel group instead of dp x cp.
        shared: an embedding that another pipeline stage also holds: DDP gives it its own bucket.
    """

    name: str
    count: int
    expert: bool = False
    shared: bool = False


@dataclass(frozen=True)
class Share:
    """How a rank's part is cut: tp for dense tensors, etp and experts for expert tensors."""

    tp: int
    etp: int
    experts: int


def share_of(cfg: RunConfig) -> Share:
    """The part of one rank of this layout."""
    p = cfg.parallel
    experts = (cfg.transformer.num_moe_experts or 0) // p.expert_model_parallel_size
    return Share(p.tensor_model_parallel_size, p.expert_tensor_parallel_size or 1, experts)


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


def chunk_tensors(cfg: RunConfig, chunk: Chunk, share: Share, rows: int) -> list[Tensor]:
    """The parameters of one model chunk.

    Args:
        rows: padded vocabulary of all tp ranks; 0 where unknown (then without its tables).
    """
    t, model = cfg.transformer, cfg.model
    pattern = moe_pattern(cfg)
    table = rows * t.hidden_size // share.tp
    tied = not model.untie_embeddings_and_output_weights
    pipelined = cfg.parallel.pipeline_model_parallel_size > 1
    copied = pipelined and (tied or bool(t.mtp_num_layers))
    found: list[Tensor] = []
    if chunk.embedding or chunk.mtp_layers:
        own_bucket = copied and not (chunk.embedding and chunk.loss)
        found.append(Tensor("embedding.word_embeddings.weight", table, shared=own_bucket))
        if model.position_embedding_type == "learned_absolute":
            count = model.max_position_embeddings * t.hidden_size
            found.append(Tensor("embedding.position_embeddings.weight", count))
    for number, layer in enumerate(chunk.layers):
        found += _inside(f"decoder.layers.{number}", layer_tensors(cfg, pattern[layer], share))
    # megatron-core: with MTP the final norm follows the last decoder layer, not the loss.
    last = (t.num_layers - 1) in chunk.layers if t.mtp_num_layers else chunk.loss
    found += _norm(cfg, "decoder.final_layernorm", t.hidden_size) if last else []
    for number in range(chunk.mtp_layers):
        found += _inside(f"mtp.layers.{number}", _mtp_layer(cfg, pattern[-1], share))
    has_table = chunk.embedding or chunk.mtp_layers
    if chunk.loss and not (tied and has_table):
        found.append(Tensor("output_layer.weight", table, shared=tied and copied))
    return found


def layer_tensors(cfg: RunConfig, moe: bool, share: Share) -> list[Tensor]:
    """The parameters of one transformer layer."""
    t = cfg.transformer
    attention = _latent_attention if t.multi_latent_attention else _attention
    found = _norm(cfg, "input_layernorm", t.hidden_size)
    found += _inside("self_attention", attention(cfg, share.tp))
    found += _norm(cfg, "pre_mlp_layernorm", t.hidden_size)
    if moe:
        return found + _inside("mlp", _experts(cfg, share))
    return found + _mlp(cfg, "mlp", t.ffn_hidden_size, share.tp)


def _inside(prefix: str, tensors: list[Tensor]) -> list[Tensor]:
    return [replace(tensor, name=f"{prefix}.{tensor.name}") for tensor in tensors]


def _norm(cfg: RunConfig, name: str, width: int) -> list[Tensor]:
    kinds = ("weight", "bias") if cfg.transformer.normalization == "LayerNorm" else ("weight",)
    return [Tensor(f"{name}.{kind}", width) for kind in kinds]


def _mtp_layer(cfg: RunConfig, moe: bool, share: Share) -> list[Tensor]:
    """Two norms, the 2H -> H projection, a layer of the last layer's kind, a final norm."""
    hidden = cfg.transformer.hidden_size
    return [
        *_norm(cfg, "enorm", hidden),
        *_norm(cfg, "hnorm", hidden),
        Tensor("eh_proj.weight", 2 * hidden * hidden // share.tp),
        *_inside("transformer_layer", layer_tensors(cfg, moe, share)),
        *_norm(cfg, "final_layernorm", hidden),
    ]


def _attention(cfg: RunConfig, tp: int) -> list[Tensor]:
    t = cfg.transformer
    queries, keys = t.num_attention_heads * t.kv_channels, t.num_query_groups * t.kv_channels
    out = queries + 2 * keys + (queries if t.attention_output_gate else 0)
    found = []
    if t.softmax_type == "learnable":
        found.append(Tensor("core_attention.softmax_offset", t.num_attention_heads // tp))
    found.append(Tensor("linear_proj.weight", queries * t.hidden_size // tp))
    if t.add_bias_linear:
        found.append(Tensor("linear_proj.bias", t.hidden_size))
    found.append(Tensor("linear_qkv.weight", t.hidden_size * out // tp))
    if t.add_bias_linear or t.add_qkv_bias:
        found.append(Tensor("linear_qkv.bias", out // tp))
    if cfg.model.qk_layernorm_over_heads:
        found += [Tensor("q_layernorm.weight", queries), Tensor("k_layernorm.weight", keys)]
    elif t.qk_layernorm and not t.qk_l2_norm:
        found += _norm(cfg, "q_layernorm", t.kv_channels) + _norm(cfg, "k_layernorm", t.kv_channels)
    return found


def _latent_attention(cfg: RunConfig, tp: int) -> list[Tensor]:
    """DeepSeek-V2 (arXiv 2405.04434) 2.1.  Local layers split the down projections over tp;
    Transformer Engine's keep a copy on each rank."""
    t = cfg.transformer
    hidden, heads, rank = t.hidden_size, t.num_attention_heads, t.kv_lora_rank
    query = heads * (t.qk_head_dim + t.qk_pos_emb_head_dim)
    down = 1 if cfg.model.transformer_impl == "transformer_engine" else tp
    found = [Tensor("linear_proj.weight", heads * t.v_head_dim * hidden // tp)]
    if t.add_bias_linear:
        found.append(Tensor("linear_proj.bias", hidden))
    if t.q_lora_rank is None:
        found.append(Tensor("linear_q_proj.weight", hidden * query // tp))
    else:
        found.append(Tensor("linear_q_down_proj.weight", hidden * t.q_lora_rank // down))
        found.append(Tensor("linear_q_up_proj.weight", t.q_lora_rank * query // tp))
    wide = hidden * (rank + t.qk_pos_emb_head_dim) // down
    found.append(Tensor("linear_kv_down_proj.weight", wide))
    up = rank * heads * (t.qk_head_dim + t.v_head_dim) // tp
    found.append(Tensor("linear_kv_up_proj.weight", up))
    if t.qk_layernorm:
        found += _norm(cfg, "q_layernorm", t.q_lora_rank) if t.q_lora_rank else []
        found += _norm(cfg, "kv_layernorm", rank)
    return found


def _mlp(cfg: RunConfig, name: str, width: int, tp: int) -> list[Tensor]:
    """Two linear layers split over tp by width; the second bias is not split."""
    hidden, gates = cfg.transformer.hidden_size, num_gates(cfg)
    bias = cfg.transformer.add_bias_linear
    found = [Tensor(f"{name}.linear_fc1.weight", gates * hidden * width // tp)]
    found += [Tensor(f"{name}.linear_fc1.bias", gates * width // tp)] if bias else []
    found.append(Tensor(f"{name}.linear_fc2.weight", hidden * width // tp))
    return found + ([Tensor(f"{name}.linear_fc2.bias", hidden)] if bias else [])


def num_gates(cfg: RunConfig) -> int:
    """Matrices of the first linear layer: 2 where the unit is gated."""
    return 2 if cfg.model.swiglu or cfg.model.quick_geglu else 1


def _experts(cfg: RunConfig, share: Share) -> list[Tensor]:
    """Router (a copy on each rank), ``share.experts`` experts, shared experts and their gate."""
    t = cfg.transformer
    bias, inside = t.add_bias_linear, t.moe_latent_size or t.hidden_size
    width, gates = share.experts * t.moe_ffn_hidden_size // share.etp, num_gates(cfg)
    found = [Tensor("router.weight", t.num_moe_experts * t.hidden_size)]
    found += [Tensor("router.bias", t.num_moe_experts)] if bias else []
    if t.moe_latent_size:
        latent = t.hidden_size * t.moe_latent_size
        found += [Tensor(f"{name}_latent_proj.weight", latent) for name in ("fc1", "fc2")]
    found.append(Tensor("experts.fc1_weight", gates * inside * width, expert=True))
    found.append(Tensor("experts.fc2_weight", inside * width, expert=True))
    if bias:
        found.append(Tensor("experts.fc1_bias", gates * width, expert=True))
        found.append(Tensor("experts.fc2_bias", share.experts * inside, expert=True))
    if t.moe_shared_expert_intermediate_size:
        if t.moe_shared_expert_gate:
            found.append(Tensor("shared_experts.gate_weight", t.hidden_size))
        width = t.moe_shared_expert_intermediate_size
        found += _mlp(cfg, "shared_experts", width, share.tp)
    return found
