"""A Hugging Face folder -> a checkpoint of ours and its YAML, entry by entry.

Everything is checked against the headers first: names, shapes, dtypes, memory, disk. Then each
entry is read, joined and written; memory holds one entry (an expert's gate and up, or the
embedding) and its sources.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_ext.config import RunConfig
from megatron_ext.errors import DataError
from megatron_ext.hf.architectures import Architecture
from megatron_ext.hf.configure import RUN, architecture_of, run_config, yaml_text
from megatron_ext.hf.entries import Entry, entries
from megatron_ext.hf.memory import check_memory
from megatron_ext.hf.shards import Shards
from megatron_ext.hf.source import CONFIG, Source

YAML = "config.yaml"
BESIDE = "huggingface"
"""Folder in the checkpoint folder with config.json and the tokenizer's files."""
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "generation_config.json",
    "chat_template.jinja",
)
OLD_BUFFERS = ("rotary_emb.inv_freq",)
"""Ends of names that old files hold and nobody reads."""


@dataclass(frozen=True)
class Plan:
    """What an import will do: made from headers alone."""

    source: Source
    architecture: Architecture
    flags: dict[str, Any]
    cfg: RunConfig
    shards: Shards
    entries: list[Entry]
    notes: list[str]

    @property
    def num_bytes(self) -> int:
        """Bytes of all weights."""
        return sum(
            torch.Size(entry.size).numel() * self.shards.dtype(entry.parts[0].name).itemsize
            for entry in self.entries
        )

    @property
    def largest_entry(self) -> int:
        """Bytes of the largest entry."""
        return max(
            torch.Size(entry.size).numel() * self.shards.dtype(entry.parts[0].name).itemsize
            for entry in self.entries
        )


def plan_import(folder: Path, *, without_mtp: bool = False) -> Plan:
    """Read config.json and all headers. Raises DataError for anything that cannot be imported."""
    source = Source.of_folder(folder)
    architecture = architecture_of(source)
    flags = architecture.flags(source)
    if (folder / "tokenizer.json").is_file():
        flags["tokenizer_type"] = "HuggingFaceTokenizer"
    cfg = run_config({k: v for k, v in flags.items() if not k.startswith("tokenizer")})
    shards = Shards(folder)
    table = list(entries(architecture.rows(cfg), cfg))
    mtp_layers = source.get("num_nextn_predict_layers", 0)
    notes = _check_names(table, shards, _mtp_prefixes(cfg, mtp_layers), without_mtp)
    _check_shapes(table, shards)
    unread = source.unread()
    if unread:
        notes.append(f"config.json keys that are not read: {', '.join(unread)}")
    return Plan(source, architecture, flags, cfg, shards, table, notes)


def _check_names(
    table: Sequence[Entry], shards: Shards, mtp_prefixes: tuple[str, ...], without_mtp: bool
) -> list[str]:
    """Every expected tensor is there and no other; returns notes about what is left out."""
    expected = {part.name for entry in table for part in entry.parts}
    missing = sorted(expected - set(shards.tensors))
    if missing:
        raise DataError(
            f"the folder lacks {len(missing)} of {len(expected)} tensors, as {missing[0]}",
            do="fetch the folder again",
            path=shards.folder,
        )
    extra = set(shards.tensors) - expected
    extra = {name for name in extra if not name.endswith(OLD_BUFFERS)}
    extra -= _tied_copies(extra, shards)
    mtp = {name for name in extra if name.startswith(mtp_prefixes)}
    if without_mtp:
        extra -= mtp
    if extra:
        do = "a model with these tensors has no equal here"
        if mtp == extra:
            do = "--without-mtp leaves the multi-token-prediction layer out"
        raise DataError(
            f"the folder holds {len(extra)} tensors that this architecture has not,"
            f" as {min(extra)}",
            do=do,
            path=shards.folder,
        )
    return [f"left out: {len(mtp)} tensors of the multi-token-prediction layer"] if mtp else []


def _mtp_prefixes(cfg: RunConfig, mtp_layers: int) -> tuple[str, ...]:
    """Names of the layers for multi-token prediction begin so: they follow the decoder's."""
    first = cfg.transformer.num_layers
    return tuple(f"model.layers.{layer}." for layer in range(first, first + mtp_layers))


def _tied_copies(extra: set[str], shards: Shards) -> set[str]:
    """lm_head.weight of a tied model, where it is a copy of the embedding."""
    head, table = "lm_head.weight", "model.embed_tokens.weight"
    if head not in extra or table not in shards.tensors:
        return set()
    if torch.equal(shards.read(head), shards.read(table)):
        return {head}
    raise DataError(
        "tie_word_embeddings is true, but lm_head.weight is not the embedding",
        do="set it to false in config.json",
        path=shards.folder,
    )


def _check_shapes(table: Sequence[Entry], shards: Shards) -> None:
    for entry in table:
        dtypes = {part.name: shards.dtype(part.name) for part in entry.parts}
        for part in entry.parts:
            found = shards.tensors[part.name].shape
            if found != part.shape:
                raise DataError(
                    f"{part.name} is {found}, config.json says {part.shape}",
                    do="use the config.json of these weights",
                    path=shards.folder,
                )
        if len(set(dtypes.values())) > 1 or not dtypes[entry.parts[0].name].is_floating_point:
            raise DataError(
                f"{', '.join(dtypes)} have dtypes {', '.join(map(str, dtypes.values()))}",
                do="convert the weights to one floating-point dtype",
                path=shards.folder,
            )
        if dtypes[entry.parts[0].name].itemsize == 1:
            raise DataError(
                f"{entry.parts[0].name} is quantised ({dtypes[entry.parts[0].name]})",
                do="dequantise the weights to bfloat16 first",
                path=shards.folder,
            )


def import_folder(plan: Plan, save: Path) -> Path:
    """Write the checkpoint, its YAML and copies of the small files; the YAML's path.

    `save` appears whole at the end. Raises DataError, DiskError.
    """
    if save.exists() and (not save.is_dir() or any(save.iterdir())):
        raise DataError("--save is there already", do="name a new folder", path=save)
    check_memory(4 * plan.largest_entry, "importing its largest tensor", plan.shards.folder)
    from megatron_ext.device import start

    start("cpu")
    from megatron_ext.checkpoint import stream

    with stream.whole_folder(save) as writing:
        _write(plan, writing, save)
    return save / YAML


def _write(plan: Plan, writing: Path, save: Path) -> None:
    """The contents of `save`, in `writing`."""
    from megatron_ext.checkpoint import stream

    def piece(entry: Entry) -> stream.Piece:
        return stream.Piece(
            name=entry.ours,
            shape=entry.shape,
            place=entry.place,
            size=entry.size,
            dtype=plan.shards.dtype(entry.parts[0].name),
            make=lambda: entry.join([plan.shards.read(p.name, p.index) for p in entry.parts]),
        )

    flags = dict(plan.flags)
    if "tokenizer_type" in flags:
        flags["tokenizer_model"] = str((save / BESIDE / "tokenizer.json").resolve())
    info = {"config": run_config(flags).to_yaml(), "huggingface": plan.source.values}
    stream.write(writing, [piece(entry) for entry in plan.entries], info)
    beside = writing / BESIDE
    beside.mkdir()
    for name in (CONFIG, *TOKENIZER_FILES):
        if (plan.shards.folder / name).is_file():
            shutil.copyfile(plan.shards.folder / name, beside / name)
    title = f"imported from {plan.shards.folder} ({plan.architecture.model_type})"
    (writing / YAML).write_text(yaml_text({**flags, **RUN}, title))
