"""From rows of a mapping to entries: one box of one of our tensors, and where it lies in theirs.

    Row("self_attention.linear_qkv.weight", {"self_attn.q_proj.weight": "Q H", ...}, QKV)
      -> for each layer Entry("decoder.layers.3.self_attention.linear_qkv.weight", ...)
    Row("mlp.experts.fc1_weight", {"mlp.experts.{e}.gate_proj.weight": "F H", ...}, ..., "expert")
      -> for each layer and expert the box [e] of a [E, 2, F, H] tensor

Shapes of theirs are written as symbols of `sizes_of`; ours follow from them through the transform.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megatron_ext.config import RunConfig
from megatron_ext.hf.transforms import SAME, QueryKeyValue, Transform

Shape = tuple[int, ...]
Where = Literal["model", "layer", "dense", "moe", "expert", "sliced"]


@dataclass(frozen=True)
class Row:
    """One line of a mapping.

    `theirs`: name -> shape in symbols. `where`: once a model, in every layer, in dense or in expert
    layers, for every expert ({e} in their names), or "sliced": for every expert, which is one slice
    of their tensor's first dim.
    """

    ours: str
    theirs: dict[str, str]
    transform: Transform | Callable[[RunConfig], Transform] = SAME
    where: Where = "layer"


@dataclass(frozen=True)
class Part:
    """One of their tensors of `shape`, or its slice `index` of the first dim."""

    name: str
    shape: Shape
    index: int | None = None


@dataclass(frozen=True)
class Entry:
    """The box `place` + `size` of our tensor `ours` of `shape` = transform of `parts`."""

    ours: str
    shape: Shape
    place: Shape
    size: Shape
    parts: tuple[Part, ...]
    transform: Transform
    is_expert: bool = False

    def join(self, theirs: Sequence[Tensor]) -> Tensor:
        """Values of `parts` -> our box."""
        return self.transform.join(theirs).reshape(self.size)

    def split(self, ours: Tensor) -> list[Tensor]:
        """Our box -> values of `parts`."""
        return self.transform.split(ours.squeeze(0) if self.is_expert else ours)


def QKV(cfg: RunConfig) -> Transform:  # noqa: N802 - stands for a transform in the mappings
    """Query, key and value heads of this model."""
    t = cfg.transformer
    return QueryKeyValue(t.num_query_groups, t.num_attention_heads // t.num_query_groups)


def sizes_of(cfg: RunConfig) -> dict[str, int]:
    """Symbol -> size. H hidden, V tokens, N heads, D head, Q = N*D, K = groups*D, E experts, F
    expert width, I dense width, S shared width, router sizes; latent attention: see the last lines.
    """
    t = cfg.transformer
    sizes = {
        "H": t.hidden_size,
        "V": cfg.model.vocab_size,
        "N": t.num_attention_heads,
        "D": t.kv_channels,
        "Q": t.num_attention_heads * t.kv_channels,
        "K": t.num_query_groups * t.kv_channels,
        "E": t.num_moe_experts or 0,
        "F": t.moe_ffn_hidden_size or 0,
        "I": t.ffn_hidden_size,
        "S": t.moe_shared_expert_intermediate_size or 0,
        "1": 1,
    }
    sizes["2F"] = 2 * sizes["F"]
    if t.multi_latent_attention:
        query = t.qk_head_dim + t.qk_pos_emb_head_dim
        sizes |= {
            "QL": t.q_lora_rank or 0,
            "KL": t.kv_lora_rank,
            "KA": t.kv_lora_rank + t.qk_pos_emb_head_dim,
            "QB": t.num_attention_heads * query,
            "KB": t.num_attention_heads * (t.qk_head_dim + t.v_head_dim),
            "O": t.num_attention_heads * t.v_head_dim,
        }
    return sizes


def moe_layers(cfg: RunConfig) -> list[bool]:
    """Which layers hold experts."""
    t = cfg.transformer
    if t.num_moe_experts is None:
        return [False] * t.num_layers
    if isinstance(t.moe_layer_freq, int):
        return [layer % t.moe_layer_freq == 0 for layer in range(t.num_layers)]
    return [bool(flag) for flag in t.moe_layer_freq]


def _part_shape(part: Part) -> Shape:
    return part.shape if part.index is None else part.shape[1:]


def _joined_shape(transform: Transform, shapes: Sequence[Shape]) -> Shape:
    return tuple(transform.join([torch.empty(shape, device="meta") for shape in shapes]).shape)


def _entry(
    row: Row, cfg: RunConfig, sizes: dict[str, int], layer: int | None, expert: int | None
) -> Entry:
    transform = row.transform(cfg) if callable(row.transform) else row.transform
    ours = row.ours if layer is None else f"decoder.layers.{layer}.{row.ours}"
    prefix = "" if layer is None else f"model.layers.{layer}."
    parts = tuple(
        Part(
            prefix + name.format(e=expert),
            tuple(sizes[symbol] for symbol in shape.split()),
            expert if row.where == "sliced" else None,
        )
        for name, shape in row.theirs.items()
    )
    size = _joined_shape(transform, [_part_shape(part) for part in parts])
    if expert is None:
        return Entry(ours, size, (0,) * len(size), size, parts, transform)
    shape, place = (sizes["E"], *size), (expert, *(0 for _ in size))
    return Entry(ours, shape, place, (1, *size), parts, transform, is_expert=True)


def entries(rows: Sequence[Row], cfg: RunConfig) -> Iterator[Entry]:
    """Every entry of a model, layer by layer."""
    sizes = sizes_of(cfg)
    for row in rows:
        if row.where == "model":
            yield _entry(row, cfg, sizes, None, None)
    for layer, is_moe in enumerate(moe_layers(cfg)):
        for row in rows:
            if row.where in ("layer", "moe" if is_moe else "dense"):
                yield _entry(row, cfg, sizes, layer, None)
            elif is_moe and row.where in ("expert", "sliced"):
                for expert in range(sizes["E"]):
                    yield _entry(row, cfg, sizes, layer, expert)
