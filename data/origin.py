"""Where a sample comes from: its dataset, its documents, and which of their tokens."""

from __future__ import annotations

from dataclasses import dataclass

from data import blend, pack
from data.samples import BlendedDataset, Dataset


@dataclass(frozen=True)
class Piece:
    """Tokens [first, first + count) of a document, at `start` of the sample."""

    prefix: str
    document: int
    first: int
    count: int
    start: int


def pieces(dataset: Dataset, sample: int) -> list[Piece]:
    """The documents of a sample in order; none for data that is in no file (--mock-data)."""
    if not isinstance(dataset, BlendedDataset):
        return []
    domain, inner = blend.locate(sample, dataset.parts, dataset.period)
    member = dataset.members[domain]
    found, start = [], 0
    for document, first, count in pack.fragments(
        inner, member.lengths, member.num_tokens, member.seq_length, member.epoch_index
    ):
        found.append(Piece(str(member.file.prefix), member.first + document, first, count, start))
        start += count
    return found
