"""Batches for a rank: which samples, in which order, as tensors, read ahead by one thread.

The order is a property of the data, not of the layout.  A global batch is the next run of sample
ids; micro-batch m of
data-parallel rank r takes ``consumed + m*mbs*dp + r*mbs + [0, mbs)``.  On dp = 2, micro-batch size
2, from sample 8::

    micro-batch        0        1          with dp = 4, micro-batch size 1:   0   1
    dp rank 0        8  9    12 13                             dp rank 0      8  12
    dp rank 1       10 11    14 15                             dp rank 1      9  13   ...

so a global batch holds the same samples for every dp, and a resume only needs the number of
consumed samples.  All ranks of one dp coordinate (tp, cp, pp) read the same samples.

Suffixes: B micro-batch, S sequence.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from data.samples import Dataset
from data.skip import replaced

POLL_S = 0.1
DEFAULT_PREFETCH = 2


@dataclass
class TokenBatch:
    """One micro-batch on the CPU."""

    tokens_BS: torch.Tensor
    """int64: inputs."""
    labels_BS: torch.Tensor
    """int64: the token after each input."""
    loss_mask_BS: torch.Tensor
    """float32: 0 where the loss does not count."""
    own_mask_BS: torch.Tensor
    """float32: the loss mask, and 0 where a rule for document ends is on and the label is another
    document's: what a loss that looks further ahead must not cross."""
    position_ids_BS: torch.Tensor
    """int64: 0 to S-1, or from 0 in each document (--reset-position-ids)."""
    document_ids_BS: torch.Tensor | None
    """int64: number of the document in its row, with --reset-attention-mask; else None."""
    sample_ids_B: torch.Tensor
    """int64: positions in the dataset."""
    domain_ids_B: torch.Tensor
    """int64: place in ``dataset.domains``."""


def document_numbers(tokens_BS: np.ndarray, starts: list[np.ndarray], eod: int) -> np.ndarray:
    """int64 [B, S]: 0, 1, ... along each row; a document begins after eod and where the data says
    so.
    """
    begins = np.zeros(tokens_BS.shape, dtype=bool)
    begins[:, 1:] = tokens_BS[:, :-1] == eod
    for row, positions in zip(begins, starts, strict=True):
        row[positions[positions < len(row)]] = True
    begins[:, 0] = False
    return np.cumsum(begins, axis=1, dtype=np.int64)


def positions_in_documents(documents_BS: np.ndarray) -> np.ndarray:
    """int64 [B, S]: distance of each token from the beginning of its document in the row."""
    places = np.arange(documents_BS.shape[1], dtype=np.int64)
    changes = np.zeros(documents_BS.shape, dtype=np.int64)
    changes[:, 1:] = np.where(documents_BS[:, 1:] != documents_BS[:, :-1], places[1:], 0)
    return places - np.maximum.accumulate(changes, axis=1)


def make_batch(dataset: Dataset, sample_ids: Sequence[int]) -> TokenBatch:
    """Reads samples and lays them out as tensors, by the dataset's rules for document ends."""
    rules = dataset.rules
    rows, domains, starts = zip(
        *(dataset.sample_with_starts(index) for index in sample_ids), strict=True
    )
    samples = np.stack(rows)
    tokens, labels = samples[:, :-1], samples[:, 1:]
    mask = (tokens != rules.eod) if rules.eod_mask_loss else np.ones(tokens.shape, dtype=bool)
    own, documents, positions = mask, None, None
    if rules.reset_attention_mask or rules.reset_position_ids or rules.eod_mask_loss:
        of_samples = document_numbers(samples, list(starts), rules.eod)
        documents, own = of_samples[:, :-1], mask & (of_samples[:, 1:] == of_samples[:, :-1])
    if rules.reset_position_ids:
        positions = positions_in_documents(documents)
    else:
        positions = np.tile(np.arange(tokens.shape[1], dtype=np.int64), (len(tokens), 1))
    return TokenBatch(
        tokens_BS=torch.from_numpy(tokens.copy()),
        labels_BS=torch.from_numpy(labels.copy()),
        loss_mask_BS=torch.from_numpy(mask.astype(np.float32)),
        own_mask_BS=torch.from_numpy(own.astype(np.float32)),
        position_ids_BS=torch.from_numpy(positions),
        document_ids_BS=torch.from_numpy(documents) if rules.reset_attention_mask else None,
        sample_ids_B=torch.tensor(list(sample_ids), dtype=torch.int64),
        domain_ids_B=torch.tensor(domains, dtype=torch.int64),
    )


def micro_batch_ids(first: int, micro_batch_size: int, dp_rank: int) -> range:
    """Sample ids of a dp rank in the micro-batch whose first sample over all ranks is ``first``."""
    start = first + dp_rank * micro_batch_size
    return range(start, start + micro_batch_size)


class MicroBatches:
    """Iterator over a rank's micro-batches; ends before the first one that is not whole on all
    ranks.

    Global batches of any size (a multiple of micro_batch_size * dp_size) are just more or fewer
    micro-batches, so a batch-size ramp needs nothing here.

    Args:
        dataset: what `open_datasets` made.
        consumed_samples: samples that all ranks together have taken before; where a resume goes on.
        prefetch: micro-batches read ahead by one thread; 0 reads in the caller.
        skip: samples (first, last) that another takes the place of; see data/skip.py.
    """

    def __init__(
        self,
        dataset: Dataset,
        micro_batch_size: int,
        dp_rank: int,
        dp_size: int,
        consumed_samples: int = 0,
        prefetch: int = DEFAULT_PREFETCH,
        skip: Sequence[tuple[int, int]] = (),
    ):
        assert 0 <= dp_rank < dp_size, f"dp_rank {dp_rank} of {dp_size}"
        self.consumed_samples = consumed_samples
        self._step = micro_batch_size * dp_size
        self._batches = _read(
            dataset, micro_batch_size, dp_rank, self._step, consumed_samples, skip
        )
        self._ahead = _ReadAhead(self._batches, prefetch) if prefetch else None

    def __iter__(self) -> Iterator[TokenBatch]:
        return self

    def __next__(self) -> TokenBatch:
        batch = next(self._ahead or self._batches)
        self.consumed_samples += self._step
        return batch

    def close(self) -> None:
        """Stops the thread; also done when the object is dropped."""
        if self._ahead is not None:
            self._ahead.close()

    def __enter__(self) -> MicroBatches:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_ahead", None) is not None:
            self._ahead.close(wait=False)


def _read(
    dataset: Dataset,
    micro_batch_size: int,
    dp_rank: int,
    step: int,
    first: int,
    skip: Sequence[tuple[int, int]],
) -> Iterator[TokenBatch]:
    """The micro-batches themselves."""
    while first + step <= len(dataset):
        ids = micro_batch_ids(first, micro_batch_size, dp_rank)
        yield make_batch(dataset, [replaced(one, skip, len(dataset)) for one in ids])
        first += step


class _ReadAhead:
    """Runs an iterator in one thread; its end and its errors come out of ``next`` in order."""

    def __init__(self, batches: Iterator[TokenBatch], depth: int):
        self._queue: queue.Queue = queue.Queue(depth)
        self._stop = threading.Event()
        self._ended: BaseException | None = None
        self._thread = threading.Thread(
            target=_fill,
            args=(batches, self._queue, self._stop),
            name="data-read-ahead",
            daemon=True,
        )
        self._thread.start()

    def __next__(self) -> TokenBatch:
        if self._ended is None:
            batch, self._ended = self._queue.get()
            if self._ended is None:
                return batch
        raise self._ended

    def close(self, wait: bool = True) -> None:
        """Ends the thread."""
        self._stop.set()
        self._ended = self._ended or StopIteration()
        if wait:
            self._thread.join()


def _fill(batches: Iterator[TokenBatch], target: queue.Queue, stop: threading.Event) -> None:
    """The thread: puts (batch, None), and at the end (None, what ended it)."""
    ended: BaseException | None = None
    while ended is None and not stop.is_set():
        item: tuple[TokenBatch | None, BaseException | None]
        try:
            item = (next(batches), None)
        except BaseException as error:  # the reader raises it again
            ended = error
            item = (None, error)
        while not stop.is_set():
            try:
                target.put(item, timeout=POLL_S)
                break
            except queue.Full:
                continue
