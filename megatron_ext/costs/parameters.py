"""Parameter counts from the flags: total, active for a token, and on each rank.

Sums over `tensors.py`, which lists every tensor that megatron-core 0.16.1's GPTModel makes.  The
aux-loss-free expert bias is a buffer: not a parameter.  A tied embedding counts once in the total,
but pipelines keep a copy on the last stage, and so do MTP layers: per rank both are counted.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from megatron_ext.config import RunConfig
from megatron_ext.config.stages import Chunk
from megatron_ext.costs.tensors import (
    Share,
    Tensor,
    chunk_tensors,
    layer_tensors,
    moe_pattern,
    padded_vocab_size,
    share_of,
)

__all__ = ["Parameters", "count_parameters", "moe_pattern", "padded_vocab_size"]


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


def count_parameters(cfg: RunConfig, vocab_size: int | None = None) -> Parameters:
    """Counts of a checked configuration.

    Args:
        vocab_size: the tokenizer's number of tokens, where --vocab-size is absent.
    """
    t = cfg.transformer
    experts = t.num_moe_experts or 0
    pattern = moe_pattern(cfg)
    whole, used = Share(1, 1, experts), Share(1, 1, min(t.moe_router_topk, experts))
    rows = padded_vocab_size(cfg, vocab_size)
    everything = Chunk(tuple(range(t.num_layers)), True, t.mtp_num_layers or 0, True)
    total = count(chunk_tensors(cfg, everything, whole, rows))
    sizes = {moe: count(layer_tensors(cfg, moe, used)) for moe in set(pattern)}
    only_mtp = Chunk((), False, t.mtp_num_layers or 0, False)
    mtp = count(x for x in chunk_tensors(cfg, only_mtp, whole, 0) if x.name.startswith("mtp"))
    tables = _tables(cfg, rows)
    norm = t.hidden_size * (2 if t.normalization == "LayerNorm" else 1)
    active = tables + norm + sum(sizes[moe] for moe in pattern)
    share = share_of(cfg)
    stages = tuple(
        sum(count(chunk_tensors(cfg, chunk, share, rows)) for chunk in chunks)
        for chunks in cfg.stages
    )
    return Parameters(total, active, mtp, tables, stages)


def count(tensors: Iterable[Tensor]) -> int:
    """Elements of all tensors."""
    return sum(tensor.count for tensor in tensors)


def _tables(cfg: RunConfig, rows: int) -> int:
    """Embedding, learned positions and output of the whole model, tied tables once."""
    hidden = cfg.transformer.hidden_size
    tables = 2 if cfg.model.untie_embeddings_and_output_weights else 1
    positions = cfg.model.max_position_embeddings or 0
    learned = cfg.model.position_embedding_type == "learned_absolute"
    return tables * rows * hidden + (positions * hidden if learned else 0)
