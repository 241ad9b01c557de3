"""The command lines of the data programs: a usage error is one FATAL line and code 64."""

from __future__ import annotations

import argparse
from typing import NoReturn

from data.documents import MAX_DOCUMENT_BYTES
from megatron_ext.command import number
from megatron_ext.errors import ConfigError


class CommandLine(argparse.ArgumentParser):
    """An argparse parser in the house's manners: no abbreviations, help as written."""

    def __init__(self, prog: str, description: str | None = None, **settings):
        settings.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(prog, description=description, allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        """Raises the usage error that argparse found."""
        raise ConfigError(message, do=f"{self.prog} --help")


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
