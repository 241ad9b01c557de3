"""The same initial weights, bit for bit, in every parallel layout.

megatron-core draws each rank's weights from that rank's random stream, so another layout is another
model. Here a weight is a function of the seed, its global name, its layer and expert, and its place
inside the global tensor:

1. while the model is built, `Recorder`'s init methods draw nothing; they note which parameter wants
   which deviation;
2. `initialise` asks the model for its sharded state (the map from local tensors to places in global
   tensors that the checkpoints use) and fills every piece from generators seeded by (seed, name,
   leading indices, block of rows).

Biases are zero and norms one, as their modules made them.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor, nn

ROWS_PER_BLOCK = 64


class Recorder:
    """Init methods that note each parameter's standard deviation instead of drawing numbers."""

    def __init__(self) -> None:
        self._noted: list[tuple[Tensor, float]] = []

    def normal(self, std: float) -> Callable[[Tensor], Tensor]:
        """An `init_method` for weights ~ N(0, std^2)."""

        def note(weight: Tensor) -> Tensor:
            self._noted.append((weight, std))
            return weight

        return note

    def by_storage(self) -> dict[int, float]:
        """Storage address -> deviation. Asked after the model is built: a module may have moved its
        parameter's data.
        """
        return {weight.untyped_storage().data_ptr(): std for weight, std in self._noted}


def _seed(*parts: object) -> int:
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def fill_normal(
    local: Tensor, name: str, offset: tuple[int, ...], shape: tuple[int, ...], std: float, seed: int
) -> None:
    """Fill `local`, the piece at `offset` of the global tensor `name` of `shape`, with N(0, std^2).

    All leading dims but the last two are indices (layer, expert, gate); rows are drawn in blocks of
    ROWS_PER_BLOCK whole rows, so that a piece cut along any dim gets the numbers it has in the
    whole. Drawn in fp32 on the CPU.
    """
    rows, columns = (shape[-2], shape[-1]) if len(shape) > 1 else (1, shape[-1])
    pieces = local.reshape(-1, *local.shape[-2:]) if local.dim() > 1 else local.view(1, 1, -1)
    lead_shape = local.shape[:-2] if local.dim() > 1 else ()
    num_lead = len(shape) - 2 if len(shape) > 1 else 0
    fixed = offset[: num_lead - len(lead_shape)]  # prepended axes: one index each
    row0 = offset[-2] if len(shape) > 1 else 0
    col0, num_cols = offset[-1], local.shape[-1]
    for flat, piece in enumerate(pieces):
        inner = _unravel(flat, lead_shape)
        start = offset[len(fixed) : num_lead]
        index = (*fixed, *(a + b for a, b in zip(start, inner)))
        _fill_rows(piece, (seed, name, index), (row0, rows), (col0, num_cols, columns), std)


def _unravel(flat: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    index = []
    for size in reversed(shape):
        index.append(flat % size)
        flat //= size
    return tuple(reversed(index))


def _fill_rows(
    piece: Tensor,
    key: tuple,
    row_range: tuple[int, int],
    col_range: tuple[int, int, int],
    std: float,
) -> None:
    """Fill piece [r, c] = rows row0.. and columns col0.. of the matrix named by `key`, block of
    rows by block.
    """
    (row0, _), (col0, num_cols, columns) = row_range, col_range
    row, last = row0, row0 + piece.shape[0]
    while row < last:
        block = row // ROWS_PER_BLOCK
        stop = min(last, (block + 1) * ROWS_PER_BLOCK)
        generator = torch.Generator().manual_seed(_seed(*key, block))
        drawn = torch.randn(ROWS_PER_BLOCK, columns, generator=generator)
        first = row - block * ROWS_PER_BLOCK
        drawn = drawn[first : first + stop - row, col0 : col0 + num_cols] * std
        piece[row - row0 : stop - row0].copy_(drawn)
        row = stop


def sharded_pieces(state) -> Iterator[ShardedTensor]:
    """Every ShardedTensor of a (nested) sharded state dict; factories (gate and up in one weight)
    are opened.
    """
    if isinstance(state, ShardedTensorFactory):
        yield from sharded_pieces(state.build())
    elif isinstance(state, ShardedTensor):
        yield state
    elif isinstance(state, dict):
        for value in state.values():
            yield from sharded_pieces(value)
    elif isinstance(state, (list, tuple)):
        for value in state:
            yield from sharded_pieces(value)


def sharding_metadata() -> dict:
    """What megatron-core's sharded_state_dict is asked with: every layer has its own name (not a
    row of a stacked tensor), so that layers may differ; replicas are numbered over dp x cp.
    """
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    return {"non_homogeneous_layers": True, "dp_cp_group": group}


@torch.no_grad()
def initialise(model: nn.Module, recorder: Recorder, *, embedding_std: float, seed: int) -> int:
    """Fill every recorded parameter of a model chunk; returns how many elements were drawn. Call
    before DDP.

    Copies of the word embedding (tied output layer, MTP) are the embedding's own numbers whatever
    module holds them.
    """
    std_of = recorder.by_storage()
    drawn = 0
    for piece in sharded_pieces(model.sharded_state_dict(metadata=sharding_metadata())):
        std = std_of.get(piece.data.untyped_storage().data_ptr())
        if std is None:
            continue
        if piece.key.endswith("embedding.word_embeddings.weight"):
            std = embedding_std
        fill_normal(piece.data, piece.key, piece.global_offset, piece.global_shape, std, seed)
        drawn += piece.data.numel()
    return drawn


def output_std(std: float, num_layers: int) -> float:
    """Deviation of the layers that write into the residual stream: std / sqrt(2 * num_layers)
    (GPT-2).
    """
    return std / math.sqrt(2.0 * num_layers)
