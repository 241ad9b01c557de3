"""Words that the data programs share."""

from __future__ import annotations

import argparse

from data.documents import MAX_DOCUMENT_BYTES
from megatron_ext.command import number


def add_document_flags(parser: argparse.ArgumentParser) -> None:
    """What the programs that read documents ask of them."""
    parser.add_argument(
        "--json-keys",
        "--json-key",
        nargs="+",
        default=["text"],
        metavar="KEY",
        help="the key of the text in jsonl lines, or the parquet column (default text)",
    )
    parser.add_argument(
        "--max-document-bytes",
        type=number("Count"),
        default=MAX_DOCUMENT_BYTES,
        metavar="N",
        help="a text file, line or value of more bytes (unpacked) is skipped and counted, which "
        "bounds a worker's memory (default %(default)s)",
    )
