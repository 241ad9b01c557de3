"""Tokenizers that others trained: Hugging Face, GPT-2 BPE, tiktoken, and the null tokenizer of
benchmarks.

Each needs only local files; the library of each is imported when it is asked for.  Special tokens
written out in a document's text (``<|endoftext|>``) are encoded as plain text, so that a document
cannot forge its own end.
"""

from __future__ import annotations

import base64
import binascii
import functools
import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data import piece_bytes
from data.sentencepiece_model import library_errors, read_model_file
from megatron_ext.errors import ConfigError, DataError

EOD_NAMES = ("<|endoftext|>", "<|end_of_text|>", "<eos>", "</s>", "<eod>")
TIKTOKEN_SPECIALS = ("<unk>", "<s>", "</s>", "<mask>", "<pad>", "<cls>", "<sep>")
"""Megatron-LM's first special ids of a JSON vocabulary; the others are called <SPECIAL_i>."""
TIKTOKEN_MAX_VOCAB = 2**17
BYTES_OF_UTF8 = (*range(0xC0), *range(0xC2, 0xF5))
LONGEST_SPACE = 100_000
"""Characters of white space in a row from which tiktoken's own way of cutting is not taken."""
TIKTOKEN_PATTERNS = {
    "v1": r"[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
    "v2": "|".join(
        (
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
            r"\p{N}",
            r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
            r"\s*[\r\n]+",
            r"\s+(?!\S)",
            r"\s+",
        )
    ),
    "cl100k": "|".join(
        (
            r"'(?i:[sdmt]|ll|ve|re)",
            r"[^\r\n\p{L}\p{N}]?+\p{L}+",
            r"\p{N}{1,3}",
            r" ?[^\s\p{L}\p{N}]++[\r\n]*",
            r"\s*[\r\n]",
            r"\s+(?!\S)",
            r"\s+",
        )
    ),
}
"""How text is cut before merging; a vocabulary only works with the pattern it was trained with."""


def missing_package(tokenizer_type: str, package: str, pin: str) -> ConfigError:
    """The error for an optional library that is not installed."""
    return ConfigError(
        f"--tokenizer-type {tokenizer_type} needs the package {package}", do=f"pip install {pin}"
    )


class HuggingFaceTokenizer:
    """A ``tokenizer.json`` through the ``tokenizers`` library (no transformers, no network).

    The file's settings for fine-tuning and inference are off: truncation, padding, sampling (BPE
    dropout and its like), and the template that puts special tokens around a text.  ``eod`` is
    ``eos_token`` of tokenizer_config.json or special_tokens_map.json beside it, else the first of
    `EOD_NAMES` in the vocabulary.

    Args:
        model: ``tokenizer.json`` or a folder that holds it.
    """

    def __init__(self, model: Path):
        try:
            import tokenizers
        except ImportError:
            raise missing_package(
                "HuggingFaceTokenizer", "tokenizers", "tokenizers==0.23.3"
            ) from None
        path = model / "tokenizer.json" if model.is_dir() else model
        content = read_model_file(path)
        do = "name a folder with tokenizer.json (the slow formats are converted by "
        with library_errors("not a tokenizer.json", do + "AutoTokenizer.save_pretrained)", path):
            self.tokenizer = tokenizers.Tokenizer.from_str(content.decode("utf-8"))
            changed = only_the_text(self.tokenizer)
            self._describe(changed + content, beside=path.parent)

    def _describe(self, content: bytes, beside: Path) -> None:
        """Fills the fields of the protocol from ``self.tokenizer``."""
        self.tokenizer.encode_special_tokens = True
        vocabulary = self.tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1
        settings = special_tokens_beside(beside)
        names = [settings["eos_token"]] if settings.get("eos_token") in vocabulary else EOD_NAMES
        self.eod = next((vocabulary[name] for name in names if name in vocabulary), -1)
        self.bos: int | None = vocabulary.get(settings.get("bos_token", "<s>"))
        if self.eod < 0:
            raise DataError(
                f"no end-of-document token: none of {', '.join(EOD_NAMES)} is in the vocabulary",
                do='write {"eos_token": "..."} to tokenizer_config.json',
                path=beside,
            )
        sizes = piece_bytes.of_tokenizers(self.tokenizer, (self.eod,))
        self.pieces = piece_bytes.measured(*sizes, (self.eod, self.bos), self.encode)
        self.fingerprint = hashlib.sha256(
            b"huggingface" + str(self.eod).encode() + content
        ).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``; no eod."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids``, special tokens silent."""
        return self.tokenizer.decode([int(index) for index in ids], skip_special_tokens=True)


class GPT2BPETokenizer(HuggingFaceTokenizer):
    """GPT-2's byte-level BPE from ``vocab.json`` and ``merges.txt``; eod is ``<|endoftext|>``."""

    def __init__(self, vocab_file: Path, merge_file: Path):
        try:
            from tokenizers import Tokenizer, decoders, models, pre_tokenizers
        except ImportError:
            raise missing_package("GPT2BPETokenizer", "tokenizers", "tokenizers==0.23.3") from None
        content = read_model_file(vocab_file) + read_model_file(merge_file)
        do = "name vocab.json and merges.txt"
        with library_errors("not a GPT-2 vocabulary", do, vocab_file):
            self.tokenizer = Tokenizer(models.BPE.from_file(str(vocab_file), str(merge_file)))
            self.tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            self.tokenizer.decoder = decoders.ByteLevel()
            self._describe(content, beside=vocab_file.parent)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids``, eod silent."""
        kept = [int(index) for index in ids if index != self.eod]
        return self.tokenizer.decode(kept, skip_special_tokens=False)


def only_the_text(tokenizer) -> bytes:
    """Turns off what makes ids differ from those of the text alone; b"" where nothing does, so that
    the fingerprint of a clean file is that of its content.
    """
    found = bool(tokenizer.encode("", add_special_tokens=True).ids)
    if tokenizer.truncation is not None or tokenizer.padding is not None:
        found = True
        tokenizer.no_truncation()
        tokenizer.no_padding()
    for sampling in ("dropout", "alpha", "nbest_size"):
        if getattr(tokenizer.model, sampling, None) is not None:
            found = True
            setattr(tokenizer.model, sampling, None)
    return b"text only" if found else b""


def special_tokens_beside(folder: Path) -> dict[str, str]:
    """eos_token and bos_token as the Hugging Face files beside a tokenizer.json name them."""
    found: dict[str, str] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        try:
            settings = json.loads((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            continue  # the files are optional
        for key in ("eos_token", "bos_token"):
            value = settings.get(key)
            value = value.get("content") if isinstance(value, dict) else value
            if isinstance(value, str):
                found[key] = value
    return found


class TikTokenizer:
    """tiktoken over a local vocabulary file.

    - Megatron-LM's JSON list ``[{"rank", "token_bytes" (base64), "token_str"}, ...]``: ids 0 to
      ``num_special_tokens - 1`` are special (``</s>`` = 2 is eod), ranks follow; cut to
      ``vocab_size`` (131,072 by default) as there; pattern v2 by default.
    - tiktoken's text format ``base64 rank`` a line: ranks are ids, eod ``<|endoftext|>`` is the id
      after the last rank; pattern cl100k by default.
    """

    def __init__(
        self,
        model: Path,
        pattern: str | None = None,
        num_special_tokens: int = 1000,
        vocab_size: int | None = None,
    ):
        try:
            import tiktoken
        except ImportError:
            raise missing_package("TikTokenizer", "tiktoken", "tiktoken==0.14.0") from None
        content = read_model_file(model)
        is_json = content.lstrip()[:1] == b"["
        pattern = pattern or ("v2" if is_json else "cl100k")
        if pattern not in TIKTOKEN_PATTERNS:
            raise ConfigError(
                f"--tiktoken-pattern {pattern} is none of {', '.join(TIKTOKEN_PATTERNS)}",
                do="use v2",
            )
        try:
            ranks = json_ranks(content) if is_json else text_ranks(content)
        except (ValueError, KeyError, TypeError, RecursionError, binascii.Error) as error:
            raise DataError(
                f"not a tiktoken vocabulary: {error!r}",
                do='give a JSON list of {"rank", "token_bytes", '
                '"token_str"} or lines of "base64 rank"',
                path=model,
            ) from None
        if is_json:
            ranks, specials = megatron_ids(
                ranks, num_special_tokens, vocab_size or TIKTOKEN_MAX_VOCAB
            )
        else:
            specials = {"<|endoftext|>": max(ranks.values()) + 1}
        self.eod = specials["</s>" if is_json else "<|endoftext|>"]
        self.bos: int | None = specials.get("<s>")
        missing = [byte for byte in BYTES_OF_UTF8 if bytes([byte]) not in ranks]
        if missing:  # tiktoken would panic on a text with one
            raise DataError(
                f"not a tiktoken vocabulary: {len(missing)} of the {len(BYTES_OF_UTF8)} bytes of "
                f"UTF-8 have no rank, 0x{missing[0]:02X} for one",
                do="give one that is whole",
                path=model,
            )
        self._specials = set(specials.values())
        with library_errors("not a tiktoken vocabulary", "give one that is whole", model):
            self.tokenizer = tiktoken.Encoding(
                model.stem,
                pat_str=TIKTOKEN_PATTERNS[pattern],
                mergeable_ranks=ranks,
                special_tokens=specials,
            )
        self.vocab_size = self.tokenizer.n_vocab
        sizes = piece_bytes.of_bytes(ranks, self.vocab_size)
        borders = (self.eod,) if self.bos is None else (self.eod, self.bos)
        self.pieces = piece_bytes.PieceBytes(sizes, sizes, borders)
        settings = f"tiktoken{pattern}{num_special_tokens}{self.vocab_size}".encode()
        self.fingerprint = hashlib.sha256(settings + content).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``; no eod.

        tiktoken's expression engine panics on a run of some 300,000 spaces: then the text is cut by
        another engine and merged piece by piece, which gives the same ids.
        """
        if len(text) < LONGEST_SPACE or not re.search(rf"\s{{{LONGEST_SPACE}}}", text):
            return self.tokenizer.encode_ordinary(text)
        import regex  # tiktoken itself needs it

        ids: list[int] = []
        for piece in regex.finditer(self.tokenizer._pat_str, text):
            ids += self.tokenizer._encode_single_piece(piece.group())
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids``, special tokens silent."""
        return self.tokenizer.decode(
            [int(index) for index in ids if int(index) not in self._specials]
        )


def json_ranks(content: bytes) -> dict[bytes, int]:
    """Ranks of Megatron-LM's JSON vocabulary."""
    ranks = {
        base64.b64decode(entry["token_bytes"]): int(entry["rank"]) for entry in json.loads(content)
    }
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise ValueError("ranks are not 0, 1, 2, ... each once")
    return ranks


def text_ranks(content: bytes) -> dict[bytes, int]:
    """Ranks of tiktoken's own text format."""
    pairs = (line.split() for line in content.splitlines() if line.strip())
    ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
    if not ranks:
        raise ValueError("no line of 'base64 rank'")
    return ranks


def megatron_ids(
    ranks: dict[bytes, int], num_special_tokens: int, vocab_size: int
) -> tuple[dict[bytes, int], dict[str, int]]:
    """(ids of byte strings, ids of special tokens): special ids come first, ranks are moved up."""
    if num_special_tokens < len(TIKTOKEN_SPECIALS):
        raise ConfigError(
            f"--tiktoken-num-special-tokens {num_special_tokens} must be "
            f"{len(TIKTOKEN_SPECIALS)} or more",
            do="use 1000, Megatron-LM's default",
        )
    kept = vocab_size - num_special_tokens
    ids = {token: rank + num_special_tokens for token, rank in ranks.items() if rank < kept}
    fillers = (f"<SPECIAL_{index}>" for index in range(len(TIKTOKEN_SPECIALS), num_special_tokens))
    return ids, {name: index for index, name in enumerate((*TIKTOKEN_SPECIALS, *fillers))}


class NullTokenizer:
    """Texts are numbers: ``"5 17 3"`` is [5, 17, 3].  eod is the id ``vocab_size`` and is added to
    the size.
    """

    def __init__(self, vocab_size: int):
        self.eod = vocab_size
        self.bos: int | None = None
        self.vocab_size = vocab_size + 1
        self.fingerprint = hashlib.sha256(f"null{vocab_size}".encode()).hexdigest()

    @functools.cached_property
    def pieces(self) -> piece_bytes.PieceBytes:
        """The digits of a number, and the space before it inside a text."""
        numbers_V = np.arange(self.vocab_size)
        digits_V = sum((numbers_V >= 10**power).astype(np.int64) for power in range(1, 19)) + 1
        digits_V[self.eod] = 0
        return piece_bytes.PieceBytes(digits_V + (numbers_V != self.eod), digits_V, (self.eod,))

    def encode(self, text: str) -> list[int]:
        """The numbers in ``text``."""
        try:
            return [int(word) for word in text.split()]
        except ValueError as error:
            raise DataError(
                f"NullTokenizer reads numbers only: {error}", do="choose another --tokenizer-type"
            ) from None

    def decode(self, ids: Sequence[int]) -> str:
        """The numbers, with spaces."""
        return " ".join(str(int(index)) for index in ids if index != self.eod)
