"""A small corpus, its tokenizer and its tokens, made once by the programs of data/."""

from __future__ import annotations

from pathlib import Path

import pytest

from data import corpus, prepare, tokenizer


@pytest.fixture(scope="session")
def tokens(tmp_path_factory) -> Path:
    """Folder with code.bin/.idx, english.bin/.idx and bpe.model (400 ids)."""
    folder = tmp_path_factory.mktemp("tokens")
    corpus.main(["--out", str(folder), "--max-bytes", "400000"])
    model = str(folder / "bpe.model")
    tokenizer.main(["train", "--input", str(folder), "--vocab-size", "400", "--model", model])
    for domain in ("code", "english"):
        words = f"--input {folder}/{domain}.jsonl --output {folder}/{domain} --append-eod"
        kind = f"--tokenizer-type SentencePieceTokenizer --tokenizer-model {model}"
        prepare.main([*words.split(), *kind.split()])
    return folder
