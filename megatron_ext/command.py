"""The command lines of the programs beside training: one FATAL line and code 64 for a wrong word.

    parser = CommandLine("python -m megatron_ext.generate", __doc__)
    parser.add_argument("--seed", type=number("Seed"), default=1234)
    parser.add_argument("--load", type=Path, required=True)

A number has a range of `ranges`, as the flags of training have. No word is empty, whether it is a
path or has no type; an argument that may be empty says ``type=str``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from megatron_ext.errors import ConfigError
from megatron_ext.ranges import EMPTY, RANGES, real_number, whole_number

_WAY_OUT = " | "


class CommandLine(argparse.ArgumentParser):
    """An argparse parser in the house's manners: no abbreviations, help as written."""

    def __init__(self, prog: str, description: str | None = None, **settings):
        settings.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(prog, description=description, allow_abbrev=False, **settings)
        self.register("type", None, _text)
        self.register("type", Path, lambda word: Path(_text(word)))

    def error(self, message: str) -> NoReturn:
        """Raises the usage error that argparse found: ``--seed -1 must be ...``."""
        if message.startswith("argument "):
            message = message.removeprefix("argument ").replace(": ", " ", 1)
        what, _, use = message.partition(_WAY_OUT)
        raise ConfigError(what, do=use or f"{self.prog} --help")


def number(kind: str) -> Callable[[str], float]:
    """A reader of one word for ``type=``: a number of `RANGES` [kind]."""
    limits = RANGES[kind]
    read = whole_number if limits.base == "int" else real_number

    def reader(word: str) -> float:
        _text(word)
        try:
            value = read(word)
        except ValueError as error:
            raise _wrong(f"{word} {error}", limits.example) from None
        if not limits.holds(value):
            raise _wrong(f"{word} {limits.rule(value)}", limits.example)
        return value

    return reader


def _text(word: str) -> str:
    if not word.strip():
        raise _wrong(EMPTY, "leave it out")
    return word


def _wrong(rule: str, use: str) -> argparse.ArgumentTypeError:
    return argparse.ArgumentTypeError(rule + _WAY_OUT + use)
