"""From a folder of dense checkpoints to a folder of one of a mixture, whole or not at all."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_ext.checkpoint import stream
from megatron_ext.config import RunConfig
from megatron_ext.config.flags import all_flags
from megatron_ext.errors import ConfigError, DataError
from megatron_ext.generate import LAYOUT_KEYS, one_rank_config
from megatron_ext.hf.configure import differences, yaml_text
from megatron_ext.hf.exporter import open_checkpoint, saved_config
from megatron_ext.mesh.agree import first_rank
from megatron_ext.upcycle.convert import Converter
from megatron_ext.upcycle.split import Split, split_of

YAML = "config.yaml"
NOT_IN_YAML = frozenset(
    {*LAYOUT_KEYS, "save", "load", "finetune", "moe_use_upcycling", "mock_data"}
)


def moe_config(
    dense: RunConfig, run: dict, load: Path, options: list[str], granularity: int | None
):
    """The dense run's configuration for one rank with the experts that `options` (flags) name."""
    if granularity is not None:
        width = dense.transformer.ffn_hidden_size
        if granularity < 1 or width % granularity:
            raise ConfigError(
                f"--moe-upcycling-granularity {granularity} must divide the dense width {width}",
                do="use a divisor",
            )
        options = ["--moe-ffn-hidden-size", str(width // granularity), *options]
    return one_rank_config(run, str(load), options)


def yaml_of(cfg: RunConfig, title: str) -> str:
    """A file for --config with everything of a configuration that is not a default or a place."""
    flags, found = all_flags(), {}
    for section in cfg.sections().values():
        for name, value in vars(section).items():
            if name in flags and name not in NOT_IN_YAML and value != flags[name].default:
                found[name] = value
    return yaml_text(found, title)


def _convert(stored: stream.StoredTensors, dense: RunConfig, moe: RunConfig, save: Path) -> Split:
    split = split_of(dense, moe)
    other = [n for n in differences(dense, moe) if not n.startswith(("moe_", "num_moe_"))]
    if other:
        raise ConfigError(
            f"upcycling changes the feed-forward layers only; different: {', '.join(other)}",
            do="leave these flags as the dense run had them",
        )
    if save.exists() and (not save.is_dir() or any(save.iterdir())):
        raise DataError("--save is there already", do="name a new folder", path=save)
    info = {"config": moe.to_yaml(), "upcycled_from": str(stored.path)}
    with stream.whole_folder(save) as writing:
        stream.write(writing, list(Converter(stored, split, moe).pieces()), info)
        (writing / YAML).write_text(yaml_of(moe, f"upcycled from {stored.path}"))
    return split


def upcycle(
    load: Path,
    save: Path,
    options: list[str],
    *,
    granularity: int | None = None,
    step: int | None = None,
) -> Split:
    """Write `save` (checkpoint and YAML) from the dense checkpoint of `load`.

    `options`: flags of pretrain_moe.py about the experts. Raises ConfigError, DataError, DiskError;
    nothing is left then.
    """
    stored = open_checkpoint(load, step)
    dense = saved_config(stored, load)
    moe = moe_config(dense, stored.record["run"], load, options, granularity)
    return _convert(stored, dense, moe, save)


def load_upcycled(cfg: RunConfig, where: Any) -> tuple[RunConfig, Any]:
    """Configuration and places of a run with --moe-use-upcycling: it loads the weights of
    RUN/upcycled, made once by rank 0. Collective.
    """
    folder = where.root / "upcycled"

    def make() -> None:
        if not folder.is_dir():
            stored = open_checkpoint(where.load, cfg.checkpoint.ckpt_step)
            _convert(stored, saved_config(stored, where.load), cfg, folder)

    first_rank(make)
    checkpoint = replace(cfg.checkpoint, finetune=True, ckpt_step=None)
    return replace(cfg, checkpoint=checkpoint), replace(where, load=folder)
