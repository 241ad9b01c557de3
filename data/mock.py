"""Data from nowhere (--mock-data): pseudo-documents whose structure a small model can learn.

A document repeats one of `MOTIFS` short phrases and ends with eod.  The next token is nearly always
decided by the last two, so the loss falls quickly, and a wrong position or mask shows.  Sample i is
a pure function of (seed, split, i).
"""

from __future__ import annotations

import numpy as np

from data.rules import Rules

MOTIFS = 64
SHORTEST_MOTIF, LONGEST_MOTIF = 4, 12
SHORTEST_DOCUMENT, LONGEST_DOCUMENT = 32, 256
DISTINCT_TOKENS = 256


class MockDataset:
    """Samples made when they are asked for.

    Args:
        split: 0 train, 1 valid, 2 test: other documents of the same phrases.
    """

    domains = ("mock",)

    def __init__(
        self,
        num_samples: int,
        seq_length: int,
        vocab_size: int,
        rules: Rules,
        seed: int,
        split: int,
    ):
        self.num_samples, self.seq_length, self.rules = num_samples, seq_length, rules
        self._seed, self._split = seed % 2**32, split
        state = np.random.RandomState([self._seed, 0])
        usable = np.array(
            [index for index in range(min(vocab_size, DISTINCT_TOKENS + 1)) if index != rules.eod]
        )
        sizes = state.randint(SHORTEST_MOTIF, LONGEST_MOTIF + 1, MOTIFS)
        self._motifs = [usable[state.randint(0, len(usable), size)] for size in sizes]

    def __len__(self) -> int:
        return self.num_samples

    def lengthen(self, num_samples: int) -> None:
        """From now on `num_samples` long."""
        self.num_samples = num_samples

    def sample(self, index: int) -> tuple[np.ndarray, int]:
        """(int64 [seq_length + 1], domain 0)."""
        tokens, domain, _ = self.sample_with_starts(index)
        return tokens, domain

    def sample_with_starts(self, index: int) -> tuple[np.ndarray, int, np.ndarray]:
        """As `sample`, and the positions at which documents begin."""
        if not 0 <= index < self.num_samples:
            raise IndexError(f"sample {index} of {self.num_samples}")
        state = np.random.RandomState([self._seed, self._split + 1, index % 2**32, index // 2**32])
        tokens, starts, filled = [], [], 0
        while filled <= self.seq_length:
            motif = self._motifs[state.randint(MOTIFS)]
            length = state.randint(SHORTEST_DOCUMENT, LONGEST_DOCUMENT + 1)
            tokens.append(np.append(motif[np.arange(length) % len(motif)], self.rules.eod))
            starts.append(filled)
            filled += length + 1
        return np.concatenate(tokens)[: self.seq_length + 1].astype(np.int64), 0, np.array(starts)
