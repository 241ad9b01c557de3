"""Sentencepiece: a BPE model that can say any text, and the reader of anybody's model.

A model trained here has no unknown token (byte fallback) and changes nothing of the text: no
normalisation, no prefix space, runs of spaces kept, newlines inside pieces (``":\\n"``).
``decode(encode(text)) == text`` for every Unicode text.  One character needs care: sentencepiece
writes a space as U+2581, so a text's own U+2581 is sent through its three byte tokens.

Training is deterministic: one thread, no sampling, and the model is written to memory, so that its
bytes do not hold a path.  BPE: arXiv 1508.07909; sentencepiece: arXiv 1808.06226.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from data import piece_bytes
from data.piece_bytes import SPACE_MARK
from data.storage import atomic_file
from megatron_ext.errors import ConfigError, DataError, Fatal

RESERVED_IN_TRAINING = re.compile("[\t\u2581\u2585]")
"""Sentencepiece drops training lines with its own marks (tab, space, unknown): cut the lines there
instead.
"""
TRAINING_LINE_CHARACTERS = 2000
EOD_PIECES = ("<eod>", "<EOD>", "<|endoftext|>")
BYTE_VALUES = 256
CONTROL_PIECES = 3
UNIT = re.compile(" *[^ ]+| +")
UNITS_KEPT = 1 << 18
LONGEST_UNIT_KEPT = 64


def require_sentencepiece():
    """The module, or the line that installs it."""
    try:
        import sentencepiece
    except ImportError:
        raise ConfigError(
            "--tokenizer-type SentencePieceTokenizer needs the package sentencepiece",
            do="pip install sentencepiece==0.2.3",
        ) from None
    return sentencepiece


def training_lines(texts: Iterable[str]) -> Iterator[str]:
    """Cuts texts into lines that sentencepiece accepts; newlines stay inside."""
    for text in texts:
        for part in RESERVED_IN_TRAINING.split(text):
            for start in range(0, len(part), TRAINING_LINE_CHARACTERS):
                yield part[start : start + TRAINING_LINE_CHARACTERS]


def train(texts: Iterable[str], vocab_size: int, model: Path) -> None:
    """Trains a BPE model of exactly ``vocab_size`` pieces: 3 control pieces, 256 bytes, the rest
    merges.
    """
    least = BYTE_VALUES + CONTROL_PIECES + 1
    if vocab_size < least:
        raise ConfigError(
            f"--vocab-size {vocab_size} is less than {least} = 256 bytes + 3 control pieces + 1",
            do=f"use at least {least}; 4096 suits the quickstart",
        )
    trained = io.BytesIO()
    try:
        require_sentencepiece().SentencePieceTrainer.train(
            sentence_iterator=training_lines(texts),
            model_writer=trained,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            character_coverage=0.9995,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            max_sentence_length=TRAINING_LINE_CHARACTERS * 4 + 1,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            num_threads=1,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        raise DataError(
            f"sentencepiece cannot train --vocab-size {vocab_size}: {error}",
            do="give more text or a smaller --vocab-size",
        ) from None
    with atomic_file(model) as stream:
        stream.write(trained.getvalue())


class SentencePieceTokenizer:
    """Reads a sentencepiece model.

    ``eod`` is the piece ``<eod>``, ``<EOD>`` or ``<|endoftext|>`` where the model has one, else
    ``</s>``. No id is added to the model's own (Megatron-LM appends ``<EOD>`` where it is missing).

    Args:
        model: the ``.model`` file.
        add_bos: each text begins with ``<s>`` (Megatron-LM's Llama2Tokenizer does so).
    """

    def __init__(self, model: Path, add_bos: bool = False):
        content = read_model_file(model)
        do = "name a .model file that python -m data.tokenizer train or sentencepiece wrote"
        with library_errors("not a sentencepiece model", do, model):
            self.processor = require_sentencepiece().SentencePieceProcessor(model_proto=content)
            self._describe(content, model, add_bos)

    def _describe(self, content: bytes, model: Path, add_bos: bool) -> None:
        """Fills the fields of the protocol from ``self.processor``."""
        self.vocab_size: int = self.processor.vocab_size()
        bos = self.processor.bos_id()
        self.bos: int | None = bos if bos >= 0 else None
        self.add_bos = add_bos and self.bos is not None
        self.eod = self._find_eod(model)
        self.fingerprint = hashlib.sha256(
            b"sentencepiece" + bytes([self.add_bos]) + content
        ).hexdigest()
        self._mark_ids = self._space_mark_ids()
        self._units: dict[str, list[int]] | None = {} if self._encodes_by_units(content) else None
        sizes = piece_bytes.of_sentencepiece(self.processor)
        self.pieces = piece_bytes.measured(*sizes, (self.eod, self.bos), self.encode)

    def _find_eod(self, model: Path) -> int:
        for piece in EOD_PIECES:
            if self.processor.id_to_piece(self.processor.piece_to_id(piece)) == piece:
                return self.processor.piece_to_id(piece)
        if self.processor.eos_id() < 0:
            raise DataError(
                "the model has none of <eod>, <EOD>, <|endoftext|>, </s> to end a document",
                do="use a model with an end-of-sentence piece",
                path=model,
            )
        return self.processor.eos_id()

    def _space_mark_ids(self) -> list[int] | None:
        """Byte ids of U+2581, or None for a foreign model in which they cannot be said without
        loss.
        """
        ids = [self.processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_MARK.encode("utf-8")]
        adds_prefix = self.processor.encode_as_pieces("a")[0].startswith(SPACE_MARK)
        return None if adds_prefix or not all(map(self.processor.is_byte, ids)) else ids

    def _encodes_by_units(self, content: bytes) -> bool:
        """True where spaces with the word after them are encoded alone, whatever is around them.

        So it is for a BPE model that normalises nothing and has no piece with a space after
        another character: no merge crosses from one unit into the next.
        """
        try:
            from sentencepiece import sentencepiece_model_pb2
        except ImportError:
            return False  # no protobuf: slower, the same ids
        model = sentencepiece_model_pb2.ModelProto.FromString(content)
        return (
            self._mark_ids is not None
            and model.trainer_spec.model_type == model.trainer_spec.BPE
            and model.normalizer_spec.name == "identity"
            and not model.normalizer_spec.remove_extra_whitespaces
            and not any(SPACE_MARK in piece.piece.lstrip(SPACE_MARK) for piece in model.pieces)
        )

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``; no eod."""
        ids = [self.bos] if self.add_bos else []
        if self._mark_ids is None or SPACE_MARK not in text:
            return ids + self._encode_part(text)
        for number, part in enumerate(text.split(SPACE_MARK)):
            ids += (self._mark_ids if number else []) + self._encode_part(part)
        return ids

    def _encode_part(self, text: str) -> list[int]:
        if self._units is None:
            return self.processor.encode(text)
        ids: list[int] = []
        known = self._units
        for unit in UNIT.findall(text):
            found = known.get(unit)
            if found is None:
                found = self.processor.encode(unit)
                if len(known) < UNITS_KEPT and len(unit) <= LONGEST_UNIT_KEPT:
                    known[unit] = found
            ids += found
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids``; control pieces are silent, ids beyond the vocabulary show as U+FFFD."""
        text, run = "", []
        for index in map(int, ids):
            if 0 <= index < self.vocab_size:
                run.append(index)
            else:
                text, run = text + self.processor.decode(run) + "\ufffd", []
        return text + self.processor.decode(run)


def read_model_file(path: Path) -> bytes:
    """Bytes of a tokenizer file, with the errors a user can act on."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"--tokenizer-model cannot be read: {error.strerror}",
            do="name the tokenizer's file",
            path=path,
        ) from None
    if not content:
        raise DataError(
            "--tokenizer-model is an empty file", do="name the tokenizer's file", path=path
        )
    return content


@contextmanager
def library_errors(what: str, do: str, path: Path) -> Iterator[None]:
    """Turns what a library raises on a file into a `DataError`: the Rust side raises a bare
    Exception, and where it panics no Exception at all.
    """
    try:
        yield
    except (Fatal, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise DataError(f"{what}: {error}", do=do, path=path) from None
