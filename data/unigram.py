"""The unigram baseline: how well the validation split is predicted by how often each token occurs.

    python -m data.unigram --data-path 0.5 tokens/code 0.5 tokens/english --split 95,5,0 \\
        --tokenizer-type SentencePieceTokenizer --tokenizer-model bpe.model --out unigram.json

    p(token) = (n(token) + 1) / (N + V)      add-one smoothing; n, N: training split, V: vocabulary
    nats a token = mean of -ln p over the validation split
    bits a byte  = nats a token / ln 2 / (UTF-8 bytes of text of a validation token)

Domains of a blend count by their weights, in both splits.  A language model that learned anything
beyond the frequency of tokens is below this number; it depends on the tokenizer very little.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data.blend import parse_blend
from data.indexed import IndexedFile
from data.pack import split_ranges
from data.storage import make_folder, write_json
from data.text_bytes import TextBytes
from data.tokenizer import Tokenizer, add_tokenizer_flags, tokenizer_of
from megatron_ext.command import CommandLine
from megatron_ext.errors import ConfigError, DataError, exit_on_fatal

UNKNOWN_BYTES = "unknown (the tokenizer's pieces do not tell; python -m data.prepare counts them)"


def count_tokens(file: IndexedFile, first: int, stop: int, vocab_size: int) -> np.ndarray:
    """float64 [V]: how often each id occurs in documents [first, stop) of a file."""
    start = file.first_token(first) if first < len(file) else file.num_tokens
    tokens = file.read(start, int(file.lengths[first:stop].sum(dtype=np.int64)))
    counts = np.bincount(tokens, minlength=vocab_size).astype(np.float64)
    if len(counts) > vocab_size:
        raise DataError(
            f"token id {len(counts) - 1} is outside the vocabulary of {vocab_size}",
            do="give the tokenizer that the data was made with",
            path=file.bin_path,
        )
    return counts


def blended(counts: Sequence[np.ndarray], weights: Sequence[float | None]) -> np.ndarray:
    """[V]: the counts of all domains with their total kept and each domain's share its weight.

    Weights of None: by size, which is the plain sum.
    """
    shares = factors([c.sum() for c in counts], weights)
    return np.sum([c * share for c, share in zip(counts, shares, strict=True)], axis=0)


def factors(totals: Sequence[float], weights: Sequence[float | None]) -> list[float]:
    """What each domain is multiplied with so that its share of the total is its weight."""
    if any(weight is None for weight in weights):
        return [1.0] * len(totals)
    given = sum(w for w, total in zip(weights, totals, strict=True) if total)
    scale = sum(totals) / given if given else 0.0
    return [scale * w / total if total else 0.0 for w, total in zip(weights, totals, strict=True)]


def nats_per_token(train_V: np.ndarray, valid_V: np.ndarray) -> float:
    """Cross-entropy of the validation counts under the smoothed training counts."""
    log_p = np.log(train_V + 1) - math.log(train_V.sum() + len(train_V))
    return float(-(valid_V * log_p).sum() / valid_V.sum())


def count_bytes(file: IndexedFile, first: int, stop: int, text_bytes: TextBytes) -> float | None:
    """Bytes of text of documents [first, stop) of a file; None where nothing tells."""
    scale = text_bytes.scale(file)
    if scale is None or first >= stop:
        return scale and 0.0
    tokens = file.read(file.first_token(first), int(file.lengths[first:stop].sum(dtype=np.int64)))
    before = np.concatenate((text_bytes.pieces.borders[:1], tokens))[:-1]
    return scale * float(text_bytes.count(before, tokens).sum())


def measure(data_path: Sequence[str], split: str, tokenizer: Tokenizer) -> dict[str, float]:
    """The baseline of a blend, as `--out` keeps it; no bits per byte where nothing tells bytes."""
    entries = parse_blend(data_path)
    weights = [None if entry.weight is None else float(entry.weight) for entry in entries]
    train, valid, valid_bytes = [], [], []
    for entry in entries:
        file = IndexedFile(entry.prefix)
        (first, stop), (_, end) = _ranges(split, len(file))[:2]
        train.append(count_tokens(file, first, stop, tokenizer.vocab_size))
        valid.append(count_tokens(file, stop, end, tokenizer.vocab_size))
        valid_bytes.append(count_bytes(file, stop, end, TextBytes.of(tokenizer)))
    if not sum(c.sum() for c in train) or not sum(c.sum() for c in valid):
        raise DataError(
            f"--split {split} leaves training or validation without tokens", do="95,5,0"
        )
    shares = factors([c.sum() for c in valid], weights)
    valid_V = np.sum([c * share for c, share in zip(valid, shares, strict=True)], axis=0)
    nats = nats_per_token(blended(train, weights), valid_V)
    bits = {}
    num_bytes = sum((x or 0.0) * share for x, share in zip(valid_bytes, shares, strict=True))
    if num_bytes and None not in valid_bytes:
        bits["bits_per_byte"] = nats * valid_V.sum() / math.log(2) / num_bytes
    return {
        "nats_per_token": nats,
        **bits,
        "train_tokens": int(sum(c.sum() for c in train)),
        "valid_tokens": int(sum(c.sum() for c in valid)),
        "vocab_size": tokenizer.vocab_size,
    }


def _ranges(split: str, documents: int) -> list[tuple[int, int]]:
    try:
        return split_ranges(split, documents)
    except ValueError:
        raise ConfigError(f"--split {split} is not up to three numbers", do="95,5,0") from None


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = CommandLine("python -m data.unigram", __doc__)
    made.add_argument(
        "--data-path",
        nargs="+",
        required=True,
        metavar="WORD",
        help="prefixes, or weight prefix ...",
    )
    made.add_argument("--split", default="969,30,1", help="as for training (default %(default)s)")
    made.add_argument("--out", type=Path, required=True, metavar="PATH", help="the JSON to write")
    add_tokenizer_flags(made)
    return made


def main(argv: list[str] | None = None) -> None:
    """Entry point of ``python -m data.unigram``."""
    args = parser().parse_args(argv)
    found = measure(args.data_path, args.split, tokenizer_of(args))
    make_folder(args.out.absolute().parent)
    write_json(args.out, found)
    bits = f"{found['bits_per_byte']:.4f}" if "bits_per_byte" in found else UNKNOWN_BYTES
    print(f"{args.out} bits_per_byte={bits} nats_per_token={found['nats_per_token']:.4f}")


if __name__ == "__main__":
    with exit_on_fatal():
        main()
