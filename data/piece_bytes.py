"""How many UTF-8 bytes of text each token stands for: what turns nats a token into bits a byte.

The sizes come from the tokenizer's own pieces and not from decoding tokens one by one, which strips
the space before a word and turns a part of a character into U+FFFD.  Over the ids of a text they
sum to the bytes of the text::

    byte-level BPE   each character of a piece is a byte      "Ġhi" 3, "ä½ł" 3 (all of 你)
    sentencepiece    U+2581 is a space, <0xE4> is one byte    "▁hi" 3, "<0xE4>" 1
    WordPiece        "##" is not of the text                  "##ing" 3
    special tokens   nothing                                  "</s>" 0

A space that the tokenizer puts before each text is left out of the first token behind an eod (where
it puts one only before texts that begin with none, one space at the beginning of a text is, too).
Where the pieces cannot tell (a normalizer, an unknown token, white space that is thrown away),
`PieceBytes.is_exact` is false, and `scale` takes the bytes that the preparation counted.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from data.storage import read_json

SPACE_MARK = "\u2581"
BYTE_SPACE = "\u0120"
"""How byte-level BPE writes a space."""
BYTE_PIECE = re.compile("<0x[0-9A-F]{2}>")
COUNTED_BY = "pieces"
"""Of `represented_by` in a report whose `represented_bytes` are sums of these sizes."""
SAMPLES = (
    "The quick  brown fox\tjumps.\n\n    def f(x):\n\treturn x*2  # it's 1,000\n",
    "Größe, naïve cafe\u0301, ﬁne ½ ™ “quotes” — A\u00a0B",
    "你好，世界！１２３ｋｍ 「テスト」한국어",
    "😀👨\u200d👩\u200d👧 Привет мир العربية",
)
"""Whether pieces are exact is tried on these: what normalizers change and vocabularies lack."""


@dataclass(frozen=True)
class PieceBytes:
    """The sizes of one tokenizer's ids."""

    inside_V: np.ndarray
    """int64 [V]: bytes of each id."""
    first_V: np.ndarray
    """int64 [V]: as the first of a text, without the space that the tokenizer puts there."""
    borders: tuple[int, ...]
    """Ids behind which a text begins: eod, bos."""
    is_exact: bool = True
    """False where the sizes of a text's ids do not sum to the bytes of the text."""

    def count(self, before: np.ndarray, ids: np.ndarray) -> np.ndarray:
        """int64 like ``ids``: bytes of each, by the id before it."""
        begins = np.isin(before, self.borders)
        return np.where(begins, self.first_V[ids], self.inside_V[ids])

    def of_text(self, ids: Sequence[int] | np.ndarray, behind_border: bool = True) -> int:
        """Bytes of the ids of a text; ``behind_border``: as they are counted behind an eod."""
        ids = np.asarray(ids, dtype=np.int64)
        before = np.concatenate(([self.borders[0] if behind_border else -1], ids))[:-1]
        return int(self.count(before, ids).sum())


def measured(
    inside_V: np.ndarray,
    spaces_V: np.ndarray,
    borders: Sequence[int | None],
    encode: Callable[[str], list[int]],
) -> PieceBytes:
    """The sizes with what is seen by encoding: a space before a text, and whether they are exact.

    Args:
        spaces_V: int64, spaces at the beginning of each piece.
    """
    known = tuple(border for border in borders if border is not None)
    try:
        start, behind_space, *samples = (encode(text) for text in ("a", " a", *SAMPLES))
    except Exception:  # bare, from a library without a token for what the vocabulary lacks
        return PieceBytes(inside_V, inside_V, known, is_exact=False)
    first = next((index for index in start if index not in known), None)
    put_V = np.zeros(len(inside_V), dtype=bool)
    if first is not None and spaces_V[first]:  # put there always, or only where the text has none
        put_V = spaces_V == 1 if start == behind_space else spaces_V >= 1
    made = PieceBytes(inside_V, inside_V - put_V, known)
    sums = [made.of_text(ids) for ids in samples]
    return replace(made, is_exact=sums == [len(text.encode("utf-8")) for text in SAMPLES])


def scale(
    prefix: str | Path, num_tokens: int, pieces: PieceBytes, fingerprint: str
) -> float | None:
    """Bytes of the texts of a pair for one byte of its pieces: 1 where the pieces are exact.

    By the report of `data.prepare` where it is of this pair and this tokenizer; None where neither
    the report nor the pieces tell.
    """
    report = read_json(Path(f"{prefix}.report.json")) or {}
    its = {"tokenizer_fingerprint": fingerprint, "tokens": num_tokens, "represented_by": COUNTED_BY}
    text, represented = report.get("bytes"), report.get("represented_bytes")
    is_counted = all(isinstance(count, int) and count > 0 for count in (text, represented))
    if is_counted and all(report.get(key) == value for key, value in its.items()):
        return text / represented
    return 1.0 if pieces.is_exact else None


def of_sentencepiece(processor) -> tuple[np.ndarray, np.ndarray]:
    """int64 [V] twice: bytes of each id, spaces at its beginning; of a sentencepiece model."""
    size = processor.vocab_size()
    inside_V, spaces_V = np.zeros((2, size), dtype=np.int64)
    for index in range(size):
        if processor.is_byte(index):
            inside_V[index] = 1
        elif not (processor.is_control(index) or processor.is_unknown(index)):
            piece = processor.id_to_piece(index)
            spaces_V[index] = len(piece) - len(piece.lstrip(SPACE_MARK))
            inside_V[index] = len(piece.replace(SPACE_MARK, " ").encode("utf-8"))
    return inside_V, spaces_V


def of_bytes(ids: Mapping[bytes, int], size: int) -> np.ndarray:
    """Bytes of each id of a vocabulary of byte strings; ids that it lacks have 0."""
    inside_V = np.zeros(size, dtype=np.int64)
    inside_V[list(ids.values())] = [len(token) for token in ids]
    return inside_V


@dataclass(frozen=True)
class Spelling:
    """How the pieces of a tokenizer.json are written."""

    alphabet: frozenset[str] = frozenset()
    """Of byte-level pieces, a character a byte; empty for pieces of text."""
    mark: str = ""
    """In the place of a space."""
    prefix: str = ""
    """Of a piece inside a word."""
    suffix: str = ""
    """Of a word's last piece."""
    has_bytes: bool = False
    """Whether <0x41> is a byte."""
    as_written: Mapping[str, int] = field(default_factory=dict)
    """Sizes of added tokens, which are matched in the text before it is cut; 0 for special ones."""

    def size(self, piece: str) -> int:
        """Bytes of text of a piece."""
        if piece in self.as_written:
            return self.as_written[piece]
        if self.has_bytes and BYTE_PIECE.fullmatch(piece):
            return 1
        if self.alphabet and self.alphabet.issuperset(piece):
            return len(piece)
        if self.prefix and piece != self.prefix:
            piece = piece.removeprefix(self.prefix)
        if self.suffix:
            piece = piece.removesuffix(self.suffix)
        return len((piece.replace(self.mark, " ") if self.mark else piece).encode("utf-8"))

    def spaces(self, piece: str) -> int:
        """Spaces at the beginning of a piece."""
        space = BYTE_SPACE if self.alphabet else self.mark or " "
        return 0 if piece in self.as_written else len(piece) - len(piece.lstrip(space))


def _nodes(tree: object) -> Iterator[dict]:
    """All objects in a tree of JSON."""
    if isinstance(tree, dict):
        yield tree
    for part in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ():
        yield from _nodes(part)


def spelling_of(settings: dict, alphabet: Sequence[str]) -> Spelling:
    """How a tokenizer.json spells.

    Args:
        alphabet: the characters of its library's byte-level pieces.
    """
    model = settings["model"]
    steps = list(_nodes([settings["normalizer"], settings["pre_tokenizer"]]))
    marks = [step["replacement"] for step in steps if step.get("type") == "Metaspace"]
    spaces = [step for step in steps if step.get("pattern") == {"String": " "}]
    marks += [step["content"] for step in spaces if step.get("type") == "Replace"]
    added = {
        token["content"]: 0 if token["special"] else len(token["content"].encode("utf-8"))
        for token in settings["added_tokens"]
    }
    unknown = model.get("unk_token")
    if model.get("unk_id") is not None:
        unknown = model["vocab"][model["unk_id"]][0]
    return Spelling(
        alphabet=frozenset(alphabet if any(s.get("type") == "ByteLevel" for s in steps) else ()),
        mark=marks[0] if marks else "",
        prefix=model.get("continuing_subword_prefix") or "",
        suffix=model.get("end_of_word_suffix") or "",
        has_bytes=bool(model.get("byte_fallback")),
        as_written={**added, **({unknown: 0} if unknown else {})},
    )


def of_tokenizers(tokenizer, silent: Sequence[int | None]) -> tuple[np.ndarray, np.ndarray]:
    """int64 [V] twice: bytes of each id, spaces at its beginning; of a Hugging Face tokenizer.

    Args:
        silent: ids that end or begin a text and stand for none of it.
    """
    from tokenizers.pre_tokenizers import ByteLevel

    spelling = spelling_of(json.loads(tokenizer.to_str()), ByteLevel.alphabet())
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    inside_V, spaces_V = np.zeros((2, max(vocabulary.values()) + 1), dtype=np.int64)
    for piece, index in vocabulary.items():
        if index not in silent:
            inside_V[index], spaces_V[index] = spelling.size(piece), spelling.spaces(piece)
    return inside_V, spaces_V
