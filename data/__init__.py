"""Text in, batches of tokens out.

::

    corpus ──► *.jsonl ──► tokenizer (train) ──► *.model
                  │                                 │
                  └──► documents ──► prepare ◄──────┘        once, offline: numpy only, no torch
                                        │
                              PREFIX.bin  PREFIX.idx  PREFIX.report.json
                                        │
         indexed ──► scan ──► pack ──► blend ──► datasets ──► loader      in every training process
         (files)    (ids in  (samples  (domains   (splits)    (TokenBatch)
                   vocabulary) of a      by weight)
                              domain)

``data.executors`` does the work of ``prepare`` on many machines, with filters and deduplication.

From text to batches in five lines::

    python -m data.corpus --out corpus
    python -m data.tokenizer train --input corpus --vocab-size 4096 --model corpus/bpe.model
    python -m data.prepare --input corpus/code.jsonl --output corpus/code --append-eod \\
        --tokenizer-type SentencePieceTokenizer --tokenizer-model corpus/bpe.model
    pretrain_moe.py --data-path 0.5 corpus/code 0.5 corpus/english ...

The words used throughout: a *document* is one sequence of a ``.bin`` file; a *sample* is
``seq_length + 1`` tokens cut from documents in shuffled order; a *domain* is one ``.bin``/``.idx``
pair of a blend; a *sample id* is the position of a sample in its (blended) dataset and does not
depend on how many ranks read it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from megatron_ext import errors  # noqa: F401 - a missing package is one line, before main() too

if TYPE_CHECKING:
    from data.datasets import Splits, open_datasets
    from data.tokenizer import Tokenizer, build_tokenizer

__all__ = ["Splits", "Tokenizer", "build_tokenizer", "open_datasets"]
_HOMES = {
    "Splits": "data.datasets",
    "open_datasets": "data.datasets",
    "Tokenizer": "data.tokenizer",
    "build_tokenizer": "data.tokenizer",
}


def __getattr__(name: str) -> object:
    """Imports a public name when it is first used, so that ``python -m data.prepare`` loads what it
    needs.
    """
    if name not in _HOMES:
        raise AttributeError(f"module 'data' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
