"""Bytes of the text that tokens of a dataset stand for, whatever the tokenizer throws away.

    bytes = sum over the tokens of their piece's size (`data.piece_bytes`) x the scale of their file

The scale of a file is 1 where the pieces are exact.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from data import piece_bytes
from data.indexed import IndexedFile
from data.piece_bytes import PieceBytes
from data.samples import Dataset
from data.tokenizer import Tokenizer

WORTH_SAYING = 1e-3


@dataclass(frozen=True)
class TextBytes:
    """Counts for one tokenizer."""

    pieces: PieceBytes
    fingerprint: str

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> TextBytes:
        """For the ids of ``tokenizer``."""
        return cls(tokenizer.pieces, tokenizer.fingerprint)

    def scale(self, file: IndexedFile) -> float | None:
        """Bytes of text for one byte of the pieces of a file; None where nothing tells."""
        return piece_bytes.scale(file.prefix, file.num_tokens, self.pieces, self.fingerprint)

    def scales(self, dataset: Dataset) -> np.ndarray | None:
        """float64 [domains]; None where that of one is not known."""
        members = getattr(dataset, "members", None)
        if members is None:  # made up, from no file
            return np.ones(len(dataset.domains)) if self.pieces.is_exact else None
        found = [self.scale(member.file) for member in members]
        return None if None in found else np.array(found, dtype=np.float64)

    def count(self, before_BS: np.ndarray, ids_BS: np.ndarray) -> np.ndarray:
        """int64 [B, S]: bytes of the pieces of ``ids``, each behind the token ``before``."""
        last = len(self.pieces.inside_V) - 1
        return self.pieces.count(before_BS, np.minimum(ids_BS, last))

    def notes(self, datasets: Iterable[Dataset | None]) -> list[str]:
        """A line for each file whose bytes are not those of the pieces."""
        files = {m.file.prefix: m.file for d in datasets for m in getattr(d, "members", ())}
        lines = []
        for prefix, file in files.items():
            scale = self.scale(file)
            if scale is None:
                lines.append(
                    f"warning: no bits per byte: pieces of this tokenizer do not tell the bytes of "
                    f"a text, and {prefix}.report.json does not either; python -m data.prepare "
                    "counts them"
                )
            elif abs(scale - 1) > WORTH_SAYING:
                lines.append(
                    f"bits per byte: the bytes of {prefix} by its report, {scale:.4f} times those "
                    "of the tokenizer's pieces"
                )
        return lines
