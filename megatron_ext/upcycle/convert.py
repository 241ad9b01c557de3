"""The pieces of a mixture's checkpoint, made from a dense one's tensors when they are written."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from megatron_ext.checkpoint.stream import Piece, StoredTensors
from megatron_ext.config import RunConfig
from megatron_ext.model.initialise import fill_normal
from megatron_ext.upcycle.split import Split

_LINEAR = re.compile(r"(?P<mlp>.+\.mlp)\.linear_fc(?P<number>[12])\.(?P<kind>weight|bias)")
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")


def is_moe_layer(name: str, moe: RunConfig) -> bool:
    """Whether the layer of a weight becomes experts; layers for multi-token prediction are of the
    last decoder layer's kind.
    """
    t, found = moe.transformer, _LAYER.match(name)
    layer = int(found[1]) if found else t.num_layers - 1
    freq = t.moe_layer_freq
    return layer % freq == 0 if isinstance(freq, int) else bool(freq[layer])


class Converter:
    """Pieces in the order of the dense checkpoint; routers stand before their experts."""

    def __init__(self, stored: StoredTensors, split: Split, moe: RunConfig) -> None:
        self.stored, self.split, self.moe = stored, split, moe
        self.hidden = moe.transformer.hidden_size

    def pieces(self) -> Iterator[Piece]:
        """Every weight of the mixture."""
        for name in self.stored.names():
            if name.startswith(("optimizer.", "rng.")):
                continue
            linear = _LINEAR.fullmatch(name)
            if linear is None or not is_moe_layer(name, self.moe):
                yield self._copy(name)
                continue
            part = f"fc{linear['number']}_{linear['kind']}"
            if part == "fc1_weight":
                yield from self._router(f"{linear['mlp']}.router", self.stored.dtype(name))
            for expert in range(self.split.num_experts):
                yield self._expert(f"{linear['mlp']}.experts.{part}", name, expert)

    def _copy(self, name: str) -> Piece:
        shape, dtype = self.stored.shape(name), self.stored.dtype(name)
        return Piece(name, shape, (0,) * len(shape), shape, dtype, lambda: self.stored.read(name))

    def _expert(self, ours: str, dense: str, expert: int) -> Piece:
        """Expert `expert`'s box of the tensor `ours`, from the dense tensor."""
        gates, width = 2 if self.split.is_gated else 1, self.split.width
        size, make = {
            "fc1_weight": ((gates, width, self.hidden), self._rows),
            "fc1_bias": ((gates, width), self._rows),
            "fc2_weight": ((self.hidden, width), self._columns),
            "fc2_bias": ((self.hidden,), self._output_bias),
        }[ours.rpartition(".")[2]]
        first = (expert % self.split.granularity) * width
        return Piece(
            ours,
            (self.split.num_experts, *size),
            (expert, *(0 for _ in size)),
            (1, *size),
            self.stored.dtype(dense),
            lambda: make(dense, first),
        )

    def _rows(self, name: str, first: int) -> Tensor:
        """Rows [first, first + width) of each gate, the linear one scaled: [g, F] or [g, F, H]."""
        inner = self.stored.shape(name)[1:]
        starts = [first, first + self.split.dense_width] if self.split.is_gated else [first]
        blocks = [
            self.stored.read(name, (s, *(0 for _ in inner)), (self.split.width, *inner))
            for s in starts
        ]
        blocks[-1] = _times(blocks[-1], self.split.up_scale)
        return torch.stack(blocks)

    def _columns(self, name: str, first: int) -> Tensor:
        """Columns [first, first + width) of the down projection, scaled: [H, F]."""
        columns = self.stored.read(name, (0, first), (self.hidden, self.split.width))
        return _times(columns, self.split.down_scale)

    def _output_bias(self, name: str, first: int) -> Tensor:
        return _times(self.stored.read(name), self.split.bias_scale)

    def _router(self, name: str, dtype: torch.dtype) -> Iterator[Piece]:
        """Random rows as a new run draws them, each for all slices of one copy; biases of zero."""
        t = self.moe.transformer
        experts, one = self.split.num_experts, (self.split.num_experts,)
        shape = (experts, self.hidden)

        def draw() -> Tensor:
            rows = torch.empty(shape, dtype=dtype)
            seed = self.moe.train.seed
            fill_normal(rows, f"{name}.weight", (0, 0), shape, t.init_method_std, seed)
            copies = rows[: experts // self.split.granularity]
            return copies.repeat_interleave(self.split.granularity, dim=0)

        def zeros(part: str, kind: torch.dtype) -> Piece:
            make: Callable[[], Any] = lambda: torch.zeros(experts, dtype=kind)  # noqa: E731
            return Piece(f"{name}.{part}", one, (0,), one, kind, make)

        yield Piece(f"{name}.weight", shape, (0, 0), shape, dtype, draw)
        if t.add_bias_linear:
            yield zeros("bias", dtype)
        if t.moe_router_enable_expert_bias:
            yield zeros("expert_bias", torch.float32)


def _times(tensor: Tensor, factor: float) -> Tensor:
    return tensor if factor == 1.0 else (tensor.float() * factor).to(tensor.dtype)
