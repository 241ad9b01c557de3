"""argv (and a YAML file) -> RunConfig, or one ConfigError with everything that is wrong."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from megatron_ext.config import ignored
from megatron_ext.config.argv import Setting, build_parser, read_words
from megatron_ext.config.bounds import bounded
from megatron_ext.config.checks import violations_of
from megatron_ext.config.explain import smallest_world
from megatron_ext.config.flags import all_flags
from megatron_ext.config.once import without_first_load
from megatron_ext.config.recipes import files_of
from megatron_ext.config.renamed import OTHER_NAMES, translate_before_scaling
from megatron_ext.config.resolve import Values, merge, overlay, resolve
from megatron_ext.config.run_config import RunConfig, build
from megatron_ext.config.scale_down import scale_down
from megatron_ext.config.tried import tried
from megatron_ext.config.yaml_file import words_of_file
from megatron_ext.errors import ConfigError, Violation


def parse(argv: Sequence[str] | None = None, environ: Mapping[str, str] = os.environ) -> RunConfig:
    """Reads flags (and ``--config FILE...``): default < files < flag, the last one wins.

    Imports neither torch nor megatron-core and touches no file but the YAML.  With --print-config
    words and ranges are checked; otherwise also every cross-group rule. With --explain-flags what
    is broken is not raised: it is in `RunConfig.broken`.

    Args:
        argv: the words after the program's name; None: those of this process.
        environ: WORLD_SIZE is the number of ranks where --world-size is absent.

    Raises:
        ConfigError: unknown flags, bad values or broken rules, all violations together.
        SystemExit: 0 after --help.
    """
    words = sys.argv[1:] if argv is None else argv
    asked = _asked(words)
    if asked.violations and asked.action != "explain":
        raise ConfigError(violations=asked.violations)
    settings, notes = without_first_load(asked.settings)
    checked = bounded(settings)
    values, scaled = _values(checked.settings, environ)
    if asked.action == "explain" and values["world_size"] is None and "WORLD_SIZE" not in environ:
        values.derive("world_size", smallest_world(values.value))
    values.notes += notes
    if not scaled:
        tried(values, checked.settings)
    resolve(values, environ, asked.config)
    without_effect = _without_effect(checked.settings, values)
    cfg = build(
        values,
        ignored=without_effect,
        warnings=_warnings(values, without_effect),
        action=asked.action,
        print_format=asked.print_format,
        scaled=scaled,
        given=asked.settings,
    )
    broken = [*asked.violations, *checked.violations]
    if asked.action != "print-config" and not asked.violations:
        named = {v.flag for v in broken}
        across = [*values.violations, *violations_of(cfg, environ, checked.sizes_hold)]
        broken += [v for v in across if v.flag not in named]
    if broken and asked.action != "explain":
        raise ConfigError(violations=broken)
    return replace(cfg, broken=tuple(broken))


@dataclass(frozen=True)
class _Asked:
    """What the words of the command line and of its files say."""

    settings: tuple[Setting, ...]
    violations: tuple[Violation, ...]
    action: str
    config: str | None
    print_format: str | None


def _asked(argv: Sequence[str]) -> _Asked:
    parser = build_parser()
    given, violations = read_words(argv, "flag", parser)
    control = {s.dest: s.value for s in given}
    files = files_of([word for s in given if s.dest == "config" for word in s.value])
    from_file: list[Setting] = []
    for file in files:
        words, bad_keys = words_of_file(file)
        settings, bad_words = read_words(words, f"file:{file}", parser)
        from_file += settings
        violations += [*bad_keys, *bad_words]
    print_format = control.get("print_config")
    action = "dry-run" if control.get("dry_run") else "train"
    if control.get("explain_flags"):
        action = "explain"
    if print_format:
        action = "print-config"
    return _Asked(
        (*from_file, *given),
        tuple(violations),
        action,
        files[0] if files else None,
        print_format if isinstance(print_format, str) else None,
    )


def _values(
    settings: Sequence[Setting], environ: Mapping[str, str]
) -> tuple[Values, tuple[str, ...]]:
    """What was given, shrunk where --scale-down stands (flags after it win), and what that did."""
    marks = [place for place, s in enumerate(settings) if s.dest == "scale_down"]
    if not marks or not settings[marks[-1]].value:
        return merge(settings), ()
    after = [s for s in settings[marks[-1] :] if s.dest != "world_size"]
    values = merge([s for s in settings if s not in after])
    translate_before_scaling(values)
    launched = environ.get("WORLD_SIZE", "")
    scaled = scale_down(values, int(launched) if launched.isdecimal() else None)
    overlay(values, after)
    return values, scaled


def _without_effect(settings: Sequence[Setting], values: Values) -> dict[str, str]:
    """Given flag -> reason, for those whose value asks for something that will not happen."""
    table = ignored.reasons(values.value)
    flags = all_flags()
    last = {s.dest: s for s in settings}
    found = {}
    for dest, reason in table.items():
        setting = last.get(dest)
        if setting is not None and not ignored.asks_for_nothing(flags[dest], setting.value):
            found[setting.flag] = reason
    return found


def _warnings(values: Values, without_effect: Mapping[str, str]) -> tuple[str, ...]:
    notes = list(values.notes)
    if without_effect:
        by_reason: dict[str, list[str]] = {}
        for flag, reason in without_effect.items():
            by_reason.setdefault(reason, []).append(flag)
        text = "; ".join(f"{', '.join(names)} ({reason})" for reason, names in by_reason.items())
        named = [note for note in notes if note.startswith(OTHER_NAMES)]
        notes = [note for note in notes if note not in named]
        notes.append("; ".join([f"no effect: {text}", *named]))
    return tuple(notes)
