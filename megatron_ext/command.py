"""The command lines of the programs beside training: one FATAL line and code 64 for a wrong word.

    parser = CommandLine("python -m megatron_ext.generate", __doc__)
    parser.add_argument("--seed", type=number("Seed"), default=1234)
    parser.add_argument("--load", type=path, required=True)

A number has a range of `ranges`, as the flags of training have; no text and no path is empty.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from megatron_ext.errors import ConfigError
from megatron_ext.ranges import RANGES, real_number, whole_number


class CommandLine(argparse.ArgumentParser):
    """An argparse parser in the house's manners: no abbreviations, help as written."""

    def __init__(self, prog: str, description: str | None = None, **settings):
        settings.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(prog, description=description, allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        """Raises the usage error that argparse found."""
        raise ConfigError(message, do=f"{self.prog} --help")


def number(kind: str) -> Callable[[str], float]:
    """A reader of one word for ``type=``: a number of `RANGES` [kind]."""
    limits = RANGES[kind]
    read = whole_number if limits.base == "int" else real_number

    def reader(word: str) -> float:
        try:
            value = read(word)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text(word)} {error}") from None
        if not limits.holds(value):
            raise argparse.ArgumentTypeError(f"{word} {limits.rule(value)}: {limits.example}")
        return value

    return reader


def text(word: str) -> str:
    """A reader for ``type=``: a word that is not empty."""
    if not word.strip():
        raise argparse.ArgumentTypeError("is empty: an unset variable of the shell? leave it out")
    return word


def path(word: str) -> Path:
    """A reader for ``type=``: a path that is not empty."""
    return Path(text(word))
