"""datatrove's filters by name: those that need nothing downloaded."""

from __future__ import annotations

import difflib
import inspect
import re

from datatrove.pipeline import filters as blocks
from datatrove.pipeline.filters.base_filter import BaseFilter
from datatrove.utils.word_tokenizers import WordTokenizer

from megatron_ext.errors import ConfigError

FILTERS: dict[str, type[BaseFilter]] = {
    "gopher-quality": blocks.GopherQualityFilter,
    "gopher-repetition": blocks.GopherRepetitionFilter,
    "fineweb-quality": blocks.FineWebQualityFilter,
    "c4-quality": blocks.C4QualityFilter,
    "c4-paragraph": blocks.C4ParagraphFilter,
}
REGEX = "regex"


def name_of(text: str) -> str:
    """The filter's name in ``NAME[:KEY=VALUE,...]``."""
    return text.partition(":")[0]


def make_filter(text: str, words: WordTokenizer, writer: object) -> BaseFilter:
    """The block of one --filter.

    Args:
        words: given to blocks that look at words or sentences.
        writer: told of each document that is dropped.
    """
    name, _, rest = text.partition(":")
    if name == REGEX:
        return _regex(rest, writer)
    if name not in FILTERS:
        known = [*FILTERS, REGEX]
        near = difflib.get_close_matches(name, known, 3, 0.4) or known
        raise ConfigError(f"--filter {name} is unknown", do="use " + ", ".join(near))
    accepted = inspect.signature(FILTERS[name]).parameters
    settings = dict(_setting(name, item, accepted) for item in rest.split(",") if item)
    if "language" in accepted:
        settings["language"] = words
    return FILTERS[name](exclusion_writer=writer, **settings)


def _regex(pattern: str, writer: object) -> BaseFilter:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ConfigError(
            f"--filter regex:{pattern} is no regular expression: {error}", do="correct it"
        ) from None
    if not pattern:
        raise ConfigError("--filter regex has no pattern", do="--filter 'regex:lorem ipsum'")
    return blocks.RegexFilter(pattern, exclusion_writer=writer)


def _setting(name: str, item: str, accepted: dict[str, inspect.Parameter]) -> tuple[str, object]:
    """KEY=VALUE as the block takes it: a number, or true or false."""
    key, _, value = item.partition("=")
    numbers = [key for key, given in accepted.items() if isinstance(given.default, (int, float))]
    if key not in numbers:
        near = difflib.get_close_matches(key, numbers, 3, 0.4) or numbers
        do = "use " + ", ".join(near) if numbers else "leave it out: it has no settings"
        raise ConfigError(f"--filter {name} has no setting {key}", do=do)
    default = accepted[key].default
    try:
        if isinstance(default, bool):
            return key, {"true": True, "false": False}[value.lower()]
        return key, int(value) if isinstance(default, int) and value.isdigit() else float(value)
    except (KeyError, ValueError):
        kind = "true or false" if isinstance(default, bool) else "a number"
        raise ConfigError(
            f"--filter {name}:{key}={value} must be {kind}", do=f"{key}={default} is the default"
        ) from None
