"""Samples of ``seq_length + 1`` tokens cut from shuffled documents: pure functions, seekable, any
epoch at once.

The stream of a domain is all its documents in a new order each epoch, one epoch after the other.
Sample ``i`` of the uncut stream is tokens ``[i*S, i*S + S]``, so neighbours share one token: it is
the last label of one and the first input of the next.  A sample belongs to the epoch in which it
begins (the last one runs on into the next epoch), and inside an
epoch samples are served in shuffled order::

    documents   A A A B B | C C C C | A A A ...        T = 9 tokens an epoch, S = 4
    samples     0 0 0 0 0                              begins in epoch 0
                        1 1   1 1 1                    begins in epoch 0
                                  2   2 2 2 2          begins in epoch 0, ends in epoch 1

The order of an epoch depends on (documents, seq_length, seed, epoch) alone: a longer training run,
another number of ranks or a resume cannot change it.  (Megatron-LM's GPTDataset shuffles all epochs
but the last together, so its order changes with --train-iters.)  Shuffles use numpy's RandomState,
whose stream is frozen for all numpy versions.

Letters: S seq_length, T tokens an epoch, D documents, n samples that begin in an epoch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

DOCUMENT_ORDER, SAMPLE_ORDER = 1, 2
"""Last word of the seed of the two shuffles of an epoch."""
SEED_WORD = 2**32


def shuffled(count: int, seed: int, epoch: int, purpose: int) -> np.ndarray:
    """int32 or int64 [count]: a permutation that (seed, epoch, purpose) decide."""
    words = [seed % SEED_WORD, seed // SEED_WORD % SEED_WORD, epoch, purpose]
    dtype = np.int32 if count < 2**31 else np.int64
    order = np.arange(count, dtype=dtype)
    np.random.RandomState(words).shuffle(order)
    return order


def samples_before(epoch: int, tokens: int, seq_length: int) -> int:
    """How many samples begin before ``epoch``: ceil(epoch * T / S)."""
    return -(-epoch * tokens // seq_length)


def epoch_of(sample: int, tokens: int, seq_length: int) -> int:
    """The epoch in which a sample begins: floor(i * S / T)."""
    return sample * seq_length // tokens


@dataclass(frozen=True)
class EpochIndex:
    """Where each sample of one epoch begins."""

    documents: np.ndarray
    """int32|int64 [D]: documents in the order of this epoch."""
    entries: np.ndarray
    """int32|int64 [n]: for each sample in stream order, the place in ``documents`` where it begins.
    """
    offsets: np.ndarray
    """int32 [n]: tokens of that document before it begins."""
    order: np.ndarray
    """int32|int64 [n]: the k-th sample served is the order[k]-th of the stream."""


def build_epoch(lengths: np.ndarray, seq_length: int, seed: int, epoch: int) -> EpochIndex:
    """The index of one epoch.

    Args:
        lengths: int [D], tokens of each document; zeros are allowed, at least one is not.
    """
    lengths = np.asarray(lengths)
    documents = shuffled(len(lengths), seed, epoch, DOCUMENT_ORDER)
    ends = np.cumsum(lengths[documents], dtype=np.int64)
    tokens = int(ends[-1])
    first, stop = (samples_before(e, tokens, seq_length) for e in (epoch, epoch + 1))
    begins = np.arange(first, stop, dtype=np.int64) * seq_length - epoch * tokens
    entries = np.searchsorted(ends, begins, side="right")
    offsets = begins - (ends[entries] - lengths[documents[entries]])
    return EpochIndex(
        documents,
        entries.astype(documents.dtype),
        offsets.astype(np.int32),
        shuffled(stop - first, seed, epoch, SAMPLE_ORDER),
    )


def fragments(
    sample: int,
    lengths: np.ndarray,
    tokens: int,
    seq_length: int,
    epoch_index: Callable[[int], EpochIndex],
) -> Iterator[tuple[int, int, int]]:
    """(document, first token in it, count) of the pieces of a sample; counts sum to ``seq_length +
    1``.

    Args:
        sample: position in the order of serving.
        lengths: int [D].
        tokens: sum of ``lengths``.
        epoch_index: the index of an epoch by number.
    """
    epoch = epoch_of(sample, tokens, seq_length)
    index = epoch_index(epoch)
    begin = index.order[sample - samples_before(epoch, tokens, seq_length)]
    entry, offset = int(index.entries[begin]), int(index.offsets[begin])
    wanted = seq_length + 1
    while wanted:
        if entry == len(index.documents):
            epoch, entry = epoch + 1, 0
            index = epoch_index(epoch)
        document = int(index.documents[entry])
        count = min(wanted, int(lengths[document]) - offset)
        if count:
            yield document, offset, count
        wanted -= count
        entry, offset = entry + 1, 0


def split_ranges(split: str, documents: int) -> list[tuple[int, int]]:
    """[first, stop) of the documents of train, valid and test, by Megatron-LM's arithmetic.

    "969,30,1" is normalised to shares, whose running sums times the number of documents are
    rounded.
    """
    shares = split_shares(split)
    sums = [0.0]
    for share in shares:
        sums.append(sums[-1] + share)
    marks = [int(round(value * float(documents))) for value in sums]
    return list(zip(marks[:-1], marks[1:], strict=True))


def split_shares(split: str) -> list[float]:
    """Three shares that sum to 1.

    Raises:
        ValueError: not one to three numbers of at least 0, one of them above 0.
    """
    numbers = [float(word) for word in split.replace("/", ",").split(",") if word.strip()]
    if not 1 <= len(numbers) <= 3 or min(numbers) < 0 or not 0 < sum(numbers) < float("inf"):
        raise ValueError(split)
    total = sum(numbers)
    return [number / total for number in numbers] + [0.0] * (3 - len(numbers))
