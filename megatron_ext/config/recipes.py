"""The words of --config as files: paths, or names of recipes.

    configs/mine.yaml   that file
    qwen3-30b-a3b       configs/qwen3-30b-a3b.yaml: model and training
    qwen3-30b-a3b.h100  the same and configs/layouts/qwen3-30b-a3b.h100.yaml: its layout on H100

Names may be written in capitals. Several words are several files, and a later one wins.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path

from megatron_ext.errors import ConfigError

CONFIGS = Path(__file__).parents[2] / "configs"
SUFFIXES = (".yaml", ".yml")
SAME_NODE = {"h200": "h100"}
"""Machine -> the one whose layout it runs where it has none of its own: an H200 node is an H100
node with more memory."""
CLOSE = 0.3
"""Likeness from which a name is offered, 0 to 1."""


def files_of(words: Sequence[str], configs: Path = CONFIGS) -> list[str]:
    """The files that the words name, in order.

    Raises:
        ConfigError: no such recipe, or none for that machine; with the nearest ones.
    """
    return [file for word in words for file in _files(word, configs)]


def models(configs: Path = CONFIGS) -> list[str]:
    """Names of all recipes."""
    return sorted(path.stem for path in configs.glob("*.yaml"))


def machines(model: str, configs: Path = CONFIGS) -> list[str]:
    """Machines for which a recipe has a layout."""
    found = {path.stem.split(".")[-1] for path in (configs / "layouts").glob(f"{model}.*.yaml")}
    return sorted(found | {new for new, old in SAME_NODE.items() if old in found})


def _files(word: str, configs: Path) -> list[str]:
    path = Path(word)
    is_file = path.exists() and not path.is_dir()  # a pipe, too: it is refused when it is read
    if is_file or path.suffix in SUFFIXES or len(path.parts) != 1:
        return [word]
    given, dot, machine = word.partition(".")
    model = {name.lower(): name for name in models(configs)}.get(given.lower())
    if model is None:
        nearest = _nearest(given.lower(), configs)
        raise ConfigError(f"--config {word}: no such file or recipe", do=nearest)
    file = str(configs / f"{model}.yaml")
    machine = machine.lower()
    return [file, _layout(word, model, machine, configs)] if dot else [file]


def _nearest(model: str, configs: Path) -> str:
    known = models(configs)
    close = difflib.get_close_matches(model, known, n=3, cutoff=CLOSE) or known
    return f"use {', '.join(close)}, or the path of a YAML file"


def _layout(word: str, model: str, machine: str, configs: Path) -> str:
    for name in (machine, SAME_NODE.get(machine)):
        path = configs / "layouts" / f"{model}.{name}.yaml"
        if path.is_file():
            return str(path)
    known = machines(model, configs)
    use = f"use {model}." + f", {model}.".join(known) if known else f"use {model}"
    raise ConfigError(f"--config {word}: {model} has no layout for {machine!r}", do=use)
