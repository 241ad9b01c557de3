"""argv (and a YAML file) -> RunConfig, or one ConfigError with everything that is wrong."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence

from megatron_ext.config import ignored
from megatron_ext.config.argv import Setting, build_parser, read_words
from megatron_ext.config.checks import violations_of
from megatron_ext.config.flags import Flag, all_flags
from megatron_ext.config.resolve import Values, merge, resolve
from megatron_ext.config.run_config import RunConfig, build
from megatron_ext.config.yaml_file import words_of_file
from megatron_ext.errors import ConfigError


def parse(argv: Sequence[str] | None = None, environ: Mapping[str, str] = os.environ) -> RunConfig:
    """Reads flags (and ``--config FILE.yaml``): default < file < flag, the last one wins.

    Imports neither torch nor megatron-core and touches no file but the YAML.  With --print-config
    only the words are checked; otherwise also every cross-group rule.

    Args:
        argv: the words after the program's name; None: those of this process.
        environ: WORLD_SIZE is the number of ranks where --world-size is absent.

    Raises:
        ConfigError: unknown flags, bad values or broken rules, all violations together.
        SystemExit: 0 after --help.
    """
    words = sys.argv[1:] if argv is None else argv
    settings, action, config, print_format = _settings(words)
    values = merge(settings)
    resolve(values, environ, config)
    without_effect = _without_effect(settings, values)
    cfg = build(
        values,
        ignored=without_effect,
        warnings=_warnings(values, without_effect),
        action=action,
        print_format=print_format,
    )
    if action != "print-config":
        violations = violations_of(cfg, environ)
        if violations:
            raise ConfigError(violations=violations)
    return cfg


def _settings(argv: Sequence[str]) -> tuple[list[Setting], str, str | None, str | None]:
    parser = build_parser()
    given = read_words(argv, "flag", parser)
    control = {s.dest: s.value for s in given}
    config = control.get("config")
    from_file: list[Setting] = []
    if isinstance(config, str):
        from_file = read_words(words_of_file(config), f"file:{config}", parser)
    print_format = control.get("print_config")
    action = "dry-run" if control.get("dry_run") else "train"
    if print_format:
        action = "print-config"
    return (
        [*from_file, *given],
        action,
        config if isinstance(config, str) else None,
        print_format if isinstance(print_format, str) else None,
    )


def _without_effect(settings: Sequence[Setting], values: Values) -> dict[str, str]:
    """Given flag -> reason, for those whose value asks for something that will not happen."""
    table = ignored.reasons(values.value)
    flags = all_flags()
    last = {s.dest: s for s in settings}
    found = {}
    for dest, reason in table.items():
        setting = last.get(dest)
        if setting is None or setting.value in ignored.HARMLESS.get(dest, ()):
            continue
        if setting.value in (False, None) or setting.value == _inert(flags[dest]):
            continue
        found[setting.flag] = reason
    return found


def _inert(flag: Flag) -> object:
    """The value that asks for nothing: a switch that is on by default still asks for its work."""
    return False if flag.kind.base == "bool" and flag.section != "megatron_only" else flag.default


def _warnings(values: Values, without_effect: Mapping[str, str]) -> tuple[str, ...]:
    notes = list(values.notes)
    if without_effect:
        by_reason: dict[str, list[str]] = {}
        for flag, reason in without_effect.items():
            by_reason.setdefault(reason, []).append(flag)
        text = "; ".join(f"{', '.join(names)} ({reason})" for reason, names in by_reason.items())
        notes.append(f"no effect: {text}")
    return tuple(notes)
