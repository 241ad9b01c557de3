"""Which layers, embedding, MTP and loss each pipeline chunk holds: a pure function.

Eight layers on pp=2 with vpp=2 (each cell is one model chunk, layers counted from 0)::

              chunk 0      chunk 1
    pp rank 0 E 0 1        4 5
    pp rank 1   2 3        6 7 L

The rules are megatron-core's (`get_num_layers_to_build`, `PipelineParallelLayerLayout`); the cost
model and the checks read this table, and the built model's layers are compared with it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Chunk:
    """One model chunk: layer numbers from 0, and what else it holds."""

    layers: tuple[int, ...]
    embedding: bool = False
    mtp_layers: int = 0
    loss: bool = False


@dataclass(frozen=True)
class Split:
    """What the flags say about the split of ``num_layers`` over ``pp`` x ``vpp`` chunks."""

    num_layers: int
    pp: int = 1
    vpp: int = 1
    first: int | None = None
    last: int | None = None
    account_for_embedding: bool = False
    account_for_loss: bool = False
    layout: str | None = None
    mtp_layers: int = 0


def parse_layout(text: str) -> list[str]:
    """Expands ``Et*3|(tt|)*29,m|L`` into one word a stage, letters E (embedding), t (transformer
    layer), m (MTP layer) and L (loss).

    Raises:
        ValueError: another letter, or brackets that do not match.
    """
    flat = re.sub(r"[\s,]", "", text)
    group = re.compile(r"\(([^()]*)\)(?:\*(\d+))?")
    while group.search(flat):
        flat = group.sub(lambda m: _single(m[1]) * int(m[2] or 1), flat)
    flat = _single(flat)
    if re.fullmatch(r"[EtmL|]*", flat) is None:
        raise ValueError("may hold only E, t, m, L, |, brackets, commas and *N")
    return flat.split("|")


def _single(text: str) -> str:
    return re.sub(r"([EtmL|])\*(\d+)", lambda m: m[1] * int(m[2]), text)


def split_layers(split: Split) -> list[list[Chunk]]:
    """``table[pp_rank][chunk]``.

    Raises:
        ValueError: the layers cannot be split so; the text names the rule with its numbers.
    """
    words = _layout_words(split) if split.layout else _counted_words(split)
    table: list[list[Chunk]] = [[] for _ in range(split.pp)]
    next_layer = 0
    for index, word in enumerate(words):
        layers = tuple(range(next_layer, next_layer + word.count("t")))
        next_layer += len(layers)
        chunk = Chunk(layers, "E" in word, word.count("m"), "L" in word)
        table[index % split.pp].append(chunk)
    return table


def _layout_words(split: Split) -> list[str]:
    words = parse_layout(split.layout or "")
    flat = "".join(words)
    if len(words) % split.pp:
        raise ValueError(f"has {len(words)} stages, not a multiple of pp = {split.pp}")
    if flat.count("t") != split.num_layers:
        raise ValueError(f"holds {flat.count('t')} layers, but --num-layers is {split.num_layers}")
    if flat.count("m") != split.mtp_layers:
        raise ValueError(
            f"holds {flat.count('m')} MTP layers, but --mtp-num-layers is {split.mtp_layers}"
        )
    if not re.fullmatch(r"Et*m*L", flat):
        raise ValueError("must be in the order E, t..., m..., L, with one E and one L")
    if sum("m" in w for w in words) > 1:
        raise ValueError("must hold all MTP layers in one stage")
    if any("m" in w for w in words[: -split.pp]):
        raise ValueError("must hold the MTP layers in a rank's last model chunk")
    if len(words) > split.pp and "m" in words[-split.pp] and split.pp > 1:
        raise ValueError("must not hold MTP layers on the first pipeline rank")
    return words


def _counted_words(split: Split) -> list[str]:
    per_chunk = [n // split.vpp for n in rank_counts(split)]
    words = ["t" * per_chunk[i % split.pp] for i in range(split.pp * split.vpp)]
    words[0] = "E" + _minus(words[0], split.account_for_embedding, "embedding")
    words[-1] = _minus(words[-1], split.account_for_loss, "loss") + "m" * split.mtp_layers + "L"
    return words


def _minus(word: str, take: bool, what: str) -> str:
    if not take:
        return word
    if "t" not in word:
        raise ValueError(f"leaves no room for the {what} in its stage")
    return word.replace("t", "", 1)


def rank_counts(split: Split) -> list[int]:
    """Layers of each pipeline rank, the embedding and the loss counted where they are accounted.

    Raises:
        ValueError: the rule that the numbers break.
    """
    total = split.num_layers + split.account_for_embedding + split.account_for_loss
    counts: list[int | None] = [None] * split.pp
    if split.first is not None:
        counts[0] = split.first
    if split.last is not None:
        counts[-1] = split.last
    middle = counts.count(None)
    left = total - sum(c for c in counts if c is not None)
    if left < 0 or (middle == 0 and left) or (middle and left % middle):
        raise ValueError(f"leaves {left} layers for {middle} pipeline ranks: must divide evenly")
    filled = [left // middle if c is None else c for c in counts]
    odd = [c for c in filled if c % split.vpp]
    if odd:
        raise ValueError(f"gives a rank {odd[0]} layers, not a multiple of vpp = {split.vpp}")
    if min(filled) <= 0:
        raise ValueError("leaves a pipeline rank without a layer")
    return filled
