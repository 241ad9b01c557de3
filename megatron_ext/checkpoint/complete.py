"""Whether a checkpoint holds the whole model: every layer and every expert, by their names.

That each tensor is filled without gap or overlap is the manifest's own rule; here is what a tensor
table cannot know by itself (megatron-core's issue 1836: a checkpoint with a part of the experts).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")
_EXPERTS = re.compile(r"\.mlp\.experts\.")


def model_of(config: Any) -> dict[str, int | None]:
    """The numbers that `missing` needs, from a TransformerConfig."""
    return {"num_layers": config.num_layers, "num_experts": config.num_moe_experts}


def missing(shapes: Iterable[tuple[str, tuple[int, ...]]], model: Mapping[str, Any]) -> str | None:
    """What the tensors (name, global shape) lack of `model`, in words; None for a whole model."""
    num_layers, num_experts = model.get("num_layers"), model.get("num_experts")
    layers, short = set(), None
    for name, shape in shapes:
        found = _LAYER.match(name)
        layers.update([int(found[1])] if found else [])
        if num_experts and _EXPERTS.search(name) and shape[0] != num_experts:
            short = f"{name} holds {shape[0]} of {num_experts} experts"
    if num_layers and layers != set(range(num_layers)):
        lost = sorted(set(range(num_layers)) ^ layers)
        return f"layers {lost[:8]} of {num_layers} are missing or too many"
    return short
