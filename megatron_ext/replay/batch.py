"""One global batch in words: losses, sample ids, their documents and a piece of their text."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron.core import parallel_state
from torch import Tensor

from data.origin import Piece, pieces

EXCERPT_TOKENS, EXCERPT_CHARACTERS = 48, 160


@dataclass(frozen=True)
class Share:
    """One rank's part of a step: [micro-batch] -> (loss sum, tokens), empty before the last
    pipeline stage, and [micro-batch][B] sample ids.
    """

    dp: int
    sums: list[tuple[float, float]]
    samples: list[list[int]]


def share(reports: Sequence[Tensor], micro_batches: Sequence) -> Share:
    """This rank's."""
    return Share(
        parallel_state.get_data_parallel_rank(),
        [tuple(report.tolist()[:2]) for report in reports],
        [one.sample_ids_B.tolist() for one in micro_batches],
    )


def losses(shares: Sequence[Share]) -> dict[tuple[int, int], float]:
    """(dp rank, micro-batch) -> mean loss over its tokens, cp ranks added up."""
    sums: dict[tuple[int, int], list[float]] = defaultdict(lambda: [0.0, 0.0])
    for one in shares:
        for number, (total, count) in enumerate(one.sums):
            sums[one.dp, number][0] += total
            sums[one.dp, number][1] += count
    return {key: total / max(count, 1.0) for key, (total, count) in sums.items()}


def describe(shares: Sequence[Share], dataset: Any, tokenizer: Any) -> list[str]:
    """The lines of a batch, by data-parallel rank and micro-batch."""
    mean = losses(shares)
    samples = {one.dp: one.samples for one in shares}
    lines = []
    for dp in sorted(samples):
        for number, ids in enumerate(samples[dp]):
            loss = mean.get((dp, number))
            lines.append(f"  dp {dp} micro-batch {number}: lm_loss {loss!r} samples {ids}")
            lines += [line for one in ids for line in _sample(one, dataset, tokenizer)]
    return lines


def _sample(sample: int, dataset: Any, tokenizer: Any) -> list[str]:
    tokens, domain = dataset.sample(sample)
    found = pieces(dataset, sample) or [Piece(dataset.domains[domain], -1, 0, len(tokens), 0)]
    lines = []
    for piece in found:
        where = f"document {piece.document} tokens {piece.first} to {piece.first + piece.count - 1}"
        where = where if piece.document >= 0 else "in no file"
        ids = tokens[piece.start : piece.start + min(piece.count, EXCERPT_TOKENS)].tolist()
        lines.append(f"    sample {sample}: {piece.prefix} {where}: {_excerpt(ids, tokenizer)}")
    return lines


def _excerpt(ids: list[int], tokenizer: Any) -> str:
    text = tokenizer.decode(ids)
    return repr(text if len(text) <= EXCERPT_CHARACTERS else f"{text[:EXCERPT_CHARACTERS]}...")
