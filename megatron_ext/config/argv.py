"""Words -> settings: argparse for the grammar and the help, our own code for values and errors.

argparse only cuts the words (`allow_abbrev=False`); values are converted here, so that every bad
value is reported in one go and each setting remembers where it came from.
"""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from megatron_ext.config.flags import Flag, all_flags
from megatron_ext.config.kinds import Kind
from megatron_ext.errors import ConfigError, Violation
from megatron_ext.ranges import EMPTY

CONTROL: tuple[Flag, ...] = (
    Flag(
        "config",
        "program",
        Kind("str", "+", None, True),
        None,
        "YAML files of flags, or names of recipes (qwen3-30b-a3b.h100); a later file wins over an"
        " earlier one, flags on the command line over all.",
        ("--config",),
    ),
    Flag(
        "print_config",
        "program",
        Kind("str", None, ("json", "yaml"), True),
        None,
        "Print every value and its origin, check nothing else, exit 0.",
        ("--print-config",),
    ),
    Flag(
        "dry_run",
        "program",
        Kind("bool"),
        False,
        "Check everything, print the rank grid and the parameter counts, exit 0.",
        ("--dry-run",),
        ("--no-dry-run",),
    ),
    Flag(
        "explain_flags",
        "program",
        Kind("bool"),
        False,
        "Say of each given flag who reads it, why it has no effect, or what to write instead, and"
        " exit 0.",
        ("--explain-flags",),
        ("--no-explain-flags",),
    ),
    Flag(
        "scale_down",
        "program",
        Kind("bool"),
        False,
        "Train 3 steps of a tiny model of the same kind on up to 4 CPU ranks, with mock data and"
        " the layout shrunk; every changed value is printed, and flags after this one win.",
        ("--scale-down",),
        ("--no-scale-down",),
    ),
)
"""Flags of the program itself: they choose an action and are no part of the run."""


UNSET = "null"
"""The word after a flag, or the value in a file, that takes back what was given before."""
YES, NO = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


@dataclass(frozen=True)
class Setting:
    """One flag as it was given; the value None takes back what was given before."""

    dest: str
    flag: str
    value: object
    origin: str


def every_flag() -> dict[str, Flag]:
    """All flags by dest, the program's own included."""
    return {**{f.dest: f for f in CONTROL}, **all_flags()}


@lru_cache(maxsize=1)
def spellings_table() -> dict[str, Flag]:
    """Spelling -> flag, with underscores read as hyphens."""
    table = {}
    for flag in every_flag().values():
        for name in (*flag.names, *flag.negatives):
            table[name.replace("_", "-")] = flag
    return table


class _Collect(argparse.Action):
    """Keeps (dest, spelling, words) in the order of the words."""

    def __call__(self, parser, namespace, values, option_string=None):  # noqa: D102
        words = [values] if isinstance(values, str) else list(values or [])
        namespace.given.append((self.dest, option_string, words))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # type: ignore[override]
        raise ConfigError(message, do="see --help")


class _Help(argparse.HelpFormatter):
    """Shows the first spelling of each side; the others are accepted silently."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=34, width=110)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        words = [*action.option_strings[:1]]
        words += [s for s in action.option_strings[1:] if s == getattr(action, "other_side", None)]
        metavar = f" {action.metavar}" if action.metavar else ""
        return ", ".join(words) + metavar


def build_parser(prog: str = "pretrain_moe.py") -> argparse.ArgumentParser:
    """The parser of all flags, in one help group a section."""
    parser = _Parser(
        prog=prog,
        allow_abbrev=False,
        formatter_class=_Help,
        usage="%(prog)s [--config FILE.yaml] [--dry-run | --print-config {json,yaml}] [flags]",
        description="Trains a mixture-of-experts language model on megatron-core.",
    )
    groups: dict[str, argparse._ArgumentGroup] = {}
    for flag in every_flag().values():
        if flag.section not in groups:
            groups[flag.section] = parser.add_argument_group(flag.section)
        spelled = [n for n in (*flag.names, *flag.negatives)]
        if "opt_param" in flag.dest:
            spelled += [n.replace("opt-param", "opt_param") for n in spelled]
        options = {"dest": flag.dest, "action": _Collect, "default": argparse.SUPPRESS}
        action = groups[flag.section].add_argument(
            *spelled,
            nargs="*",  # so that argparse does not stop at the first wrong count
            help=_help(flag),
            metavar=None if flag.kind.base == "bool" else _words(flag.kind),
            **options,
        )
        action.other_side = flag.negatives[0] if flag.negatives else None  # type: ignore[attr-defined]
    return parser


def _words(kind: Kind) -> str:
    if kind.choices:
        return "{" + ",".join(str(c) for c in kind.choices) + "}"
    one = {"int": "N", "float": "X", "pattern": "PATTERN", "pair": "(A,B)"}.get(kind.base, "TEXT")
    return one if kind.many is None else f"{one} ..."


def _help(flag: Flag) -> str:
    default = "" if flag.default is None else f" [{flag.default}]"
    return (flag.help + default).replace("%", "%%")


def nearest(name: str, known: Iterable[str]) -> str:
    """The known spelling closest to ``name``, or an empty text."""
    bare = {k.removeprefix("--"): k for k in known}
    close = difflib.get_close_matches(name.removeprefix("--"), list(bare), n=1, cutoff=0.6)
    return bare[close[0]] if close else ""


def _unknown(words: Sequence[str], origin: str) -> list[Violation]:
    """One violation for each unknown flag, with its nearest name; and for stray words."""
    table, found = spellings_table(), []
    flags = [w.split("=")[0] for w in words if w.startswith("--")]
    where = "" if origin == "flag" else f" in {origin.removeprefix('file:')}"
    for name in flags:
        close = nearest(name.replace("_", "-"), table)
        use = f"use {close}" if close else "see --help"
        found.append(Violation(name, None, f"is not a flag{where}", use))
    if not flags:
        rule = "belongs to no flag"
        found += [Violation(word, None, rule, "remove it, or see --help") for word in words]
    return found


def read_words(
    words: Sequence[str], origin: str, parser: argparse.ArgumentParser
) -> tuple[list[Setting], list[Violation]]:
    """The settings that the words spell, in order; and unknown flags and bad values."""
    namespace = argparse.Namespace(given=[])
    _, rest = parser.parse_known_args(list(words), namespace)
    violations = _unknown(rest, origin) if rest else []
    settings = []
    flags = every_flag()
    for dest, spelled, raw in namespace.given:
        flag = flags[dest]
        try:
            settings.append(Setting(dest, spelled, _value(flag, spelled, raw), origin))
        except ValueError as error:
            use = _way_out(flag, spelled, raw, str(error))
            violations.append(Violation(spelled, " ".join(raw), str(error), use))
    return settings, violations


def _value(flag: Flag, spelled: str, raw: list[str]) -> object:
    """The value; None unsets what was given before.

    Raises:
        ValueError: with the broken rule.
    """
    is_unset = raw == [UNSET] or (raw == [""] and flag.default == "")
    if is_unset and flag.section != "program":
        return None
    if flag.kind.base == "bool":
        if raw:
            raise ValueError("is not a value of a switch")
        return spelled.replace("_", "-") not in flag.negatives
    if not raw:
        raise ValueError("needs a value")
    if flag.kind.many is None and len(raw) > 1:
        raise ValueError(f"takes one value, not {len(raw)}")
    return flag.kind.convert(raw)


def _way_out(flag: Flag, spelled: str, raw: list[str], rule: str) -> str:
    if rule == EMPTY:
        return f"leave {spelled} out, or write null in YAML"
    if flag.kind.base == "bool":
        return _side(flag, spelled, raw[0])
    close = nearest(raw[0], map(str, flag.kind.choices)) if flag.kind.choices and raw else ""
    return f"use {spelled} {close}" if close else f"for instance {spelled} {_words(flag.kind)}"


def _side(flag: Flag, spelled: str, word: str) -> str:
    """`write --no-bf16` for `--bf16 false`."""
    is_on = spelled.replace("_", "-") not in flag.negatives
    for words, wanted in ((YES, is_on), (NO, not is_on)):
        if word.lower() in words:
            return f"write {(flag.names if wanted else flag.negatives)[0]}"
    return f"write {flag.names[0]} or {flag.negatives[0]}"
