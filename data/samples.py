"""Datasets of samples: one domain cut from its documents, and several domains by weight."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Protocol

import numpy as np

from data import blend, pack, scan
from data.cache import IndexCache, key_of
from data.indexed import IndexedFile
from data.rules import Rules

PREBUILT_EPOCHS = 4
EPOCHS_IN_MEMORY = 3


class Dataset(Protocol):
    """What the loader reads."""

    domains: tuple[str, ...]
    rules: Rules

    def __len__(self) -> int: ...

    def lengthen(self, num_samples: int) -> None:
        """From now on `num_samples` long, more or fewer: no sample changes."""
        ...

    def sample(self, index: int) -> tuple[np.ndarray, int]:
        """(int64 [seq_length + 1], domain id) of a sample id."""
        ...

    def sample_with_starts(self, index: int) -> tuple[np.ndarray, int, np.ndarray]:
        """As `sample`, and int [documents]: positions in the sample at which documents begin."""
        ...


class PackedDataset:
    """Samples of one domain: documents [first, stop) of one file (see `data.pack`)."""

    def __init__(
        self,
        file: IndexedFile,
        first: int,
        stop: int,
        *,
        seq_length: int,
        seed: int,
        vocab_size: int,
        cache: IndexCache,
    ):
        self.file, self.first, self.seq_length, self.seed = file, first, seq_length, seed
        self.vocab_size, self._cache = vocab_size, cache
        self.lengths = file.lengths[first:stop]
        self.num_tokens = int(self.lengths.sum(dtype=np.int64))
        self.domains = (file.domain,)
        self.num_samples = pack.samples_before(1, self.num_tokens, seq_length)
        self.epoch_index = functools.lru_cache(EPOCHS_IN_MEMORY)(self._epoch_index)

    def __len__(self) -> int:
        return self.num_samples

    def epochs(self, num_samples: int) -> int:
        """Epochs in which the first ``num_samples`` samples begin."""
        return 1 + pack.epoch_of(max(0, num_samples - 1), self.num_tokens, self.seq_length)

    def build(self, num_samples: int) -> None:
        """Writes the indices of the first epochs to the cache (the builder's part)."""
        for epoch in range(min(self.epochs(num_samples) + 1, PREBUILT_EPOCHS)):
            self._cache.ensure(*self._entry(epoch))

    def sample(self, index: int) -> tuple[np.ndarray, int]:
        """(int64 [seq_length + 1], domain 0).

        Raises:
            DataError: an id outside the vocabulary.
        """
        tokens, domain, _ = self.sample_with_starts(index)
        return tokens, domain

    def sample_with_starts(self, index: int) -> tuple[np.ndarray, int, np.ndarray]:
        """As `sample`, and the positions at which documents begin."""
        if not 0 <= index < self.num_samples:
            raise IndexError(f"sample {index} of {self.num_samples}")
        tokens = np.empty(self.seq_length + 1, dtype=np.int64)
        starts, filled = [], 0
        for document, offset, count in pack.fragments(
            index, self.lengths, self.num_tokens, self.seq_length, self.epoch_index
        ):
            piece = self.file.read(self.file.first_token(self.first + document) + offset, count)
            bad = scan.first_outside(piece, self.vocab_size)
            if bad is not None:
                raise scan.outside(
                    self.file, int(piece[bad]), self.first + document, offset + bad, self.vocab_size
                )
            tokens[filled : filled + count] = piece
            if offset == 0:
                starts.append(filled)
            filled += count
        return tokens, 0, np.array(starts, dtype=np.int64)

    def _entry(self, epoch: int) -> tuple[str, Callable[[], dict[str, np.ndarray]]]:
        """(key, builder) of the index of an epoch in the cache."""
        key = key_of(
            "epoch",
            path=self.file.idx_path.resolve(),
            stamp=scan.stamp(self.file.idx_path),
            first=self.first,
            documents=len(self.lengths),
            tokens=self.num_tokens,
            seq_length=self.seq_length,
            seed=self.seed,
            epoch=epoch,
        )
        return key, lambda: vars(pack.build_epoch(self.lengths, self.seq_length, self.seed, epoch))

    def _epoch_index(self, epoch: int) -> pack.EpochIndex:
        return pack.EpochIndex(**self._cache.load_or_make(*self._entry(epoch)))


class BlendedDataset:
    """Samples of several domains by weight (see `data.blend`)."""

    def __init__(
        self,
        members: Sequence[PackedDataset],
        weights: Sequence[Fraction | int],
        num_samples: int,
        cache: IndexCache,
        rules: Rules,
    ):
        self.members, self.num_samples, self._cache, self.rules = (
            list(members),
            num_samples,
            cache,
            rules,
        )
        self.domains = unique_names([member.file.prefix for member in members])
        self.parts = blend.parts_of(weights)

    def __len__(self) -> int:
        return self.num_samples

    @functools.cached_property
    def period(self) -> dict[str, np.ndarray]:
        """The stored period of the blend."""
        return self._cache.load_or_make(*self._entry())

    def build(self) -> None:
        """Writes the period and the members' indices to the cache (the builder's part)."""
        self._cache.ensure(*self._entry())
        self.spread(lambda member, count: member.build(count))

    def open(self) -> None:
        """Gives each member the number of samples that it serves."""
        self.spread(lambda member, count: setattr(member, "num_samples", max(1, count)))

    def lengthen(self, num_samples: int) -> None:
        """From now on `num_samples` long, and its members with it."""
        if num_samples != self.num_samples:
            self.num_samples = num_samples
            self.__dict__.pop("period", None)  # cut to the length
            self.open()

    def spread(self, action: Callable[[PackedDataset, int], None]) -> None:
        """Calls ``action(member, samples it gives)`` for each member."""
        counts = blend.samples_of(self.parts, self.num_samples, self.period)
        for member, count in zip(self.members, counts, strict=True):
            action(member, count)

    def sample(self, index: int) -> tuple[np.ndarray, int]:
        """(int64 [seq_length + 1], domain id)."""
        tokens, domain, _ = self.sample_with_starts(index)
        return tokens, domain

    def sample_with_starts(self, index: int) -> tuple[np.ndarray, int, np.ndarray]:
        """As `sample`, and the positions at which documents begin."""
        if not 0 <= index < self.num_samples:
            raise IndexError(f"sample {index} of {self.num_samples}")
        domain, inner = blend.locate(index, self.parts, self.period)
        tokens, _, starts = self.members[domain].sample_with_starts(inner)
        return tokens, domain, starts

    def _entry(self) -> tuple[str, Callable[[], dict[str, np.ndarray]]]:
        stored = min(sum(self.parts), self.num_samples)
        return key_of("blend", parts=self.parts, stored=stored), lambda: blend.build_period(
            self.parts, stored
        )


def given(dataset: Dataset, first: int, stop: int) -> list[int]:
    """How many of samples [first, stop) each of `dataset.domains` gives."""
    if not isinstance(dataset, BlendedDataset):
        return [stop - first] + [0] * (len(dataset.domains) - 1)
    if first == 0:
        return blend.samples_of(dataset.parts, stop, dataset.period)
    places = np.arange(first, stop) % sum(dataset.parts)
    chosen = dataset.period["domains"][places]
    return np.bincount(chosen, minlength=len(dataset.domains)).tolist()


def unique_names(prefixes: Sequence[str]) -> tuple[str, ...]:
    """Short names of domains: the last part of each prefix, with as many folders as make them
    different.
    """
    parts = [Path(prefix).parts for prefix in prefixes]
    for depth in range(1, 1 + max(map(len, parts))):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            return tuple(names)
    return tuple(f"{prefix}#{place}" for place, prefix in enumerate(prefixes))
