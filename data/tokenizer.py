"""Tokenizers by Megatron-LM's names, and the command that trains one.

| --tokenizer-type          | --tokenizer-model                        | eod                    |
| ------------------------- | ---------------------------------------- | ---------------------- |
| SentencePieceTokenizer    | .model                                   | `<eod>` ..., or `</s>` |
| GPTSentencePieceTokenizer | .model                                   | the same               |
| Llama2Tokenizer           | .model; documents begin with `<s>`       | the same               |
| HuggingFaceTokenizer      | tokenizer.json or its folder             | its eos_token          |
| TikTokenizer              | .json (Megatron-LM)                      | `</s>`                 |
| TikTokenizer              | lines of "base64 rank"                   | the id after the last  |
| GPT2BPETokenizer          | none: --vocab-file and --merge-file      | `<|endoftext|>`        |
| NullTokenizer             | none: --vocab-size N                     | N                      |

A training command::

    python -m data.tokenizer train --input corpus --vocab-size 4096 --model corpus/bpe.model
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from data import documents, foreign_tokenizers, sentencepiece_model
from data.command import add_document_flags
from data.piece_bytes import PieceBytes
from data.storage import make_folder
from megatron_ext.command import CommandLine, number
from megatron_ext.errors import ConfigError, exit_on_fatal

DEFAULT_TRAINING_BYTES = 50_000_000


class Tokenizer(Protocol):
    """What the data part needs of a tokenizer."""

    vocab_size: int
    """Number of ids: every id is in [0, vocab_size)."""
    eod: int
    """Id that ends a document."""
    bos: int | None
    """Id that begins a text, where the tokenizer has one."""
    fingerprint: str
    """SHA-256 over its files and settings."""
    pieces: PieceBytes
    """UTF-8 bytes of each id."""

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``, without eod."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids``."""
        ...


def build_tokenizer(
    tokenizer_type: str,
    tokenizer_model: str | Path | None,
    vocab_size: int | None = None,
    vocab_file: str | Path | None = None,
    merge_file: str | Path | None = None,
    *,
    tiktoken_pattern: str | None = None,
    tiktoken_num_special_tokens: int = 1000,
) -> Tokenizer:
    """The tokenizer of one name.

    Args:
        tokenizer_type: a name of the table above.
        tokenizer_model: its file or folder.
        vocab_size: NullTokenizer: its size without eod; TikTokenizer: where a JSON vocabulary is
            cut.
        vocab_file, merge_file: GPT2BPETokenizer's two files.

    Raises:
        ConfigError: unknown name, a missing flag, or a library that is not installed.
        DataError: a file that is missing, or is not what the name says.
    """

    check_flags(tokenizer_type, tokenizer_model, vocab_size, vocab_file, merge_file)

    def model() -> Path:
        return Path(tokenizer_model)

    builders: dict[str, Callable[[], Tokenizer]] = {
        "SentencePieceTokenizer": lambda: sentencepiece_model.SentencePieceTokenizer(model()),
        "GPTSentencePieceTokenizer": lambda: sentencepiece_model.SentencePieceTokenizer(model()),
        "Llama2Tokenizer": lambda: sentencepiece_model.SentencePieceTokenizer(
            model(), add_bos=True
        ),
        "HuggingFaceTokenizer": lambda: foreign_tokenizers.HuggingFaceTokenizer(model()),
        "TikTokenizer": lambda: foreign_tokenizers.TikTokenizer(
            model(), tiktoken_pattern, tiktoken_num_special_tokens, vocab_size
        ),
        "GPT2BPETokenizer": lambda: foreign_tokenizers.GPT2BPETokenizer(
            Path(vocab_file), Path(merge_file)
        ),
        "NullTokenizer": lambda: foreign_tokenizers.NullTokenizer(int(vocab_size)),
    }
    return builders[tokenizer_type]()


NEEDS = {
    **dict.fromkeys(
        (
            "SentencePieceTokenizer",
            "GPTSentencePieceTokenizer",
            "Llama2Tokenizer",
            "HuggingFaceTokenizer",
            "TikTokenizer",
        ),
        ("--tokenizer-model",),
    ),
    "GPT2BPETokenizer": ("--vocab-file", "--merge-file"),
    "NullTokenizer": ("--vocab-size",),
}
"""The flags without which a tokenizer cannot be made."""


def check_flags(
    tokenizer_type: str | None,
    tokenizer_model: str | Path | None,
    vocab_size: int | None = None,
    vocab_file: str | Path | None = None,
    merge_file: str | Path | None = None,
) -> None:
    """Raises ConfigError for an unknown name and for a missing flag."""
    if tokenizer_type not in NEEDS:
        raise ConfigError(
            f"--tokenizer-type {tokenizer_type} is not known here",
            do=f"use one of {', '.join(NEEDS)}",
        )
    given = {
        "--tokenizer-model": tokenizer_model,
        "--vocab-size": vocab_size,
        "--vocab-file": vocab_file,
        "--merge-file": merge_file,
    }
    for flag in NEEDS[tokenizer_type]:
        if given[flag] is None:
            raise ConfigError(
                f"--tokenizer-type {tokenizer_type} needs {flag}", do=f"add {flag} ..."
            )


def files_of(
    tokenizer_type: str | None,
    tokenizer_model: str | Path | None,
    vocab_file: str | Path | None = None,
    merge_file: str | Path | None = None,
) -> list[Path]:
    """The files from which `build_tokenizer` makes ids of text."""
    if tokenizer_type in (None, "NullTokenizer"):
        return []
    if tokenizer_type == "GPT2BPETokenizer":
        return [Path(file) for file in (vocab_file, merge_file) if file]
    model = Path(tokenizer_model) if tokenizer_model else None
    if model is not None and model.is_dir():
        model = model / "tokenizer.json"
    return [model] if model is not None else []


def add_tokenizer_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that choose a tokenizer, for the data commands (the training program has its own
    parser).
    """
    parser.add_argument(
        "--tokenizer-type",
        required=True,
        metavar="NAME",
        help="SentencePieceTokenizer, GPTSentencePieceTokenizer, Llama2Tokenizer, "
        "HuggingFaceTokenizer, TikTokenizer, GPT2BPETokenizer or NullTokenizer",
    )
    parser.add_argument(
        "--tokenizer-model", metavar="PATH", help="the tokenizer's file or folder; never downloaded"
    )
    parser.add_argument(
        "--vocab-size", type=number("Size"), metavar="N", help="NullTokenizer: ids without eod"
    )
    parser.add_argument("--vocab-file", metavar="PATH", help="GPT2BPETokenizer: vocab.json")
    parser.add_argument("--merge-file", metavar="PATH", help="GPT2BPETokenizer: merges.txt")
    parser.add_argument(
        "--tiktoken-pattern",
        choices=tuple(foreign_tokenizers.TIKTOKEN_PATTERNS),
        default=None,
        help="TikTokenizer: how text is cut before merging",
    )
    parser.add_argument(
        "--tiktoken-num-special-tokens",
        type=number("Whole"),
        default=1000,
        metavar="N",
        help="TikTokenizer: special ids before the first rank (default %(default)s)",
    )


def tokenizer_of(args: argparse.Namespace) -> Tokenizer:
    """The tokenizer that `add_tokenizer_flags` chose."""
    return build_tokenizer(
        args.tokenizer_type,
        args.tokenizer_model,
        args.vocab_size,
        args.vocab_file,
        args.merge_file,
        tiktoken_pattern=args.tiktoken_pattern,
        tiktoken_num_special_tokens=args.tiktoken_num_special_tokens,
    )


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = CommandLine("python -m data.tokenizer", __doc__)
    commands = made.add_subparsers(dest="command", required=True)
    train = commands.add_parser(
        "train",
        help="train a lossless sentencepiece BPE model with byte fallback",
    )
    train.add_argument(
        "--input",
        nargs="+",
        required=True,
        type=Path,
        metavar="PATH",
        help="files and folders of text, as for python -m data.prepare",
    )
    train.add_argument(
        "--vocab-size", type=number("Size"), required=True, help="number of ids, 260 at least"
    )
    train.add_argument(
        "--model", type=Path, required=True, metavar="PATH", help="the .model file to write"
    )
    add_document_flags(train)
    train.add_argument(
        "--max-bytes",
        type=number("Count"),
        default=DEFAULT_TRAINING_BYTES,
        help="most bytes of text to learn from, taken in order (default %(default)s)",
    )
    return made


def main(argv: list[str] | None = None) -> None:
    """Entry point of ``python -m data.tokenizer``."""
    args = parser().parse_args(argv)
    key = documents.single_key(args.json_keys)
    make_folder(args.model.absolute().parent)
    texts = documents.first_texts(args.input, key, args.max_bytes, args.max_document_bytes)
    sentencepiece_model.train(texts, args.vocab_size, args.model)
    trained = sentencepiece_model.SentencePieceTokenizer(args.model)
    print(
        f"{args.model} vocab_size={trained.vocab_size} eod={trained.eod} "
        f"fingerprint={trained.fingerprint[:16]}"
    )


if __name__ == "__main__":
    with exit_on_fatal():
        main(sys.argv[1:])
