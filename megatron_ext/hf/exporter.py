"""A checkpoint of ours -> a Hugging Face folder, entry by entry.

The network is the one that the checkpoint's own configuration describes, whatever layout it was
trained in; the folder appears whole, under its own name, at the end.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_ext.checkpoint import folder as on_disk
from megatron_ext.checkpoint import stream
from megatron_ext.config import RunConfig
from megatron_ext.errors import DataError
from megatron_ext.generate import one_rank_config
from megatron_ext.hf import words
from megatron_ext.hf.architectures import Architecture, by_model_type
from megatron_ext.hf.configure import config_of, differences, run_config
from megatron_ext.hf.entries import Entry, entries
from megatron_ext.hf.memory import check_memory
from megatron_ext.hf.shards import Writer
from megatron_ext.hf.source import CONFIG, Source

HF_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")


def open_checkpoint(load: Path, step: int | None) -> stream.StoredTensors:
    """The newest checkpoint of a folder, or the one of `step`. Raises DataError."""
    load, step = on_disk.named_step(load, step)
    known = on_disk.steps(load)
    newest = on_disk.latest_step(load)
    chosen = step if step is not None else (newest if newest in known else max(known, default=None))
    if chosen not in known:
        raise DataError(
            f"--load holds {'no checkpoint' if not known else f'steps {known}, not {step}'}",
            do="name a run's checkpoints folder",
            path=load,
        )
    return stream.StoredTensors(load / on_disk.step_name(chosen))


def saved_config(stored: stream.StoredTensors, load: Path) -> RunConfig:
    """The one-rank configuration of the run that wrote a checkpoint."""
    run = stored.record.get("run") or {}
    if "config" not in run:
        raise DataError("the checkpoint does not say its configuration", path=stored.path)
    return one_rank_config(run, str(load), [])


def _describe(
    cfg: RunConfig, like: dict[str, Any] | None, wanted: str | None
) -> tuple[Architecture, dict[str, Any]]:
    """Family and config.json: the given one where it says the same network, else from flags."""
    if like is not None and like.get("model_type") in by_model_type() and wanted is None:
        one = by_model_type()[like["model_type"]]
        flags = one.flags(Source(like, Path(CONFIG)))
        if not differences(cfg, run_config(flags)):
            return one, {**like, **_trained_with(one, cfg)}
    return config_of(cfg, wanted)


def _trained_with(one: Architecture, cfg: RunConfig) -> dict[str, Any]:
    """What a run may set to another value and its network stays the same."""
    made = one.config(cfg)
    return {name: made[name] for name in ("router_aux_loss_coef",) if name in made}


def _check_shapes(table: Sequence[Entry], stored: stream.StoredTensors) -> None:
    """Every entry's tensor is there in its shape; a padded vocabulary may have more rows."""
    for entry in {entry.ours: entry for entry in table}.values():
        if entry.ours not in stored:
            raise DataError(f"the checkpoint has no {entry.ours}", path=stored.path)
        found = stored.shape(entry.ours)
        may_be_padded = entry.ours in VOCABULARY and found[0] >= entry.shape[0]
        if found[1:] != entry.shape[1:] or (found[0] != entry.shape[0] and not may_be_padded):
            raise DataError(
                f"{entry.ours} is {found} in the checkpoint, its configuration says {entry.shape}",
                path=stored.path,
            )
    ours = {entry.ours for entry in table}
    weights = (name for name in stored.names() if not name.startswith(("optimizer.", "rng.")))
    extra = [name for name in weights if name not in ours]
    if extra:
        raise DataError(
            f"{len(extra)} tensors of the checkpoint have no place there, as {min(extra)}",
            path=stored.path,
        )


def export_folder(
    load: Path,
    out: Path,
    *,
    step: int | None = None,
    wanted: str | None = None,
    largest_shard: int = 5 * 10**9,
    note: Callable[[str], None] = lambda text: None,
) -> Architecture:
    """Write `out`; the family that it is of. `note` is told what could not be carried over. Raises
    DataError, DiskError; nothing is left then.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError("--model is there already", do="name a new folder", path=out)
    stored = open_checkpoint(load, step)
    cfg = saved_config(stored, load)
    run = stored.record["run"]
    one, config = _describe(cfg, words.imported_config(load, run), wanted)
    table = list(entries(one.rows(cfg), cfg))
    _check_shapes(table, stored)
    tensors = {
        part.name: (stored.dtype(entry.ours), part.shape) for entry in table for part in entry.parts
    }
    files = words.describe(config, cfg, load, run, note)
    config["dtype"] = config["torch_dtype"] = HF_DTYPES[stored.dtype(table[0].ours)]
    sizes = [torch.Size(e.size).numel() * stored.dtype(e.ours).itemsize for e in table]
    check_memory(4 * max(sizes), "exporting its largest tensor", load)
    with stream.whole_folder(out) as writing:
        on_disk.check_space(writing, sum(sizes))
        _write(writing, table, tensors, stored, largest_shard)
        (writing / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        words.copy(files, writing)
    return one


def _write(
    writing: Path,
    table: Sequence[Entry],
    tensors: dict,
    stored: stream.StoredTensors,
    largest_shard: int,
) -> None:
    writer = Writer(writing, tensors, largest_shard)
    for entry in table:
        ours = stored.read(entry.ours, entry.place, entry.size)
        for part, value in zip(entry.parts, entry.split(ours)):
            writer.write(part.name, value, part.index)
    writer.close()
