"""What an export says about words: ids of special tokens, the tokenizer's files, the generation
config.

They come from the folder that the run began from (`BESIDE` next to the checkpoint, or next to one
of the run's origins; the ids also from the record, which every later save carries), as long as the
run's tokenizer is that folder's; else from the run's own tokenizer. What is not known is written as
null: transformers puts its own numbers where a key is missing.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megatron_ext.config import RunConfig
from megatron_ext.errors import Fatal
from megatron_ext.hf.importer import BESIDE, TOKENIZER_FILES
from megatron_ext.hf.source import CONFIG, Source

IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
SENTENCE_PIECE = ("SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer")


def imported_folder(load: Path, run: Mapping[str, Any]) -> Path | None:
    """The small files of the Hugging Face folder that a run began from, where they are left."""
    return next((one for one in _places(load, run) if (one / CONFIG).is_file()), None)


def _places(load: Path, run: Mapping[str, Any]) -> list[Path]:
    """Where those files may be or have been."""
    places = [load, *(origin.get("load") for origin in run.get("origins") or ())]
    return [Path(place).absolute() / BESIDE for place in places if place]


def imported_config(load: Path, run: Mapping[str, Any]) -> dict[str, Any] | None:
    """Its config.json, from the record or the folder."""
    folder = imported_folder(load, run)
    if run.get("huggingface"):
        return dict(run["huggingface"])
    return Source.of_folder(folder).values if folder else None


def _digest(path: Path) -> str | None:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def _own_files(cfg: RunConfig) -> dict[str, Path]:
    """Name in the export -> file of the run's tokenizer, of those that transformers reads."""
    data, kind = cfg.data, cfg.data.tokenizer_type
    model = Path(data.tokenizer_model) if data.tokenizer_model else None
    if kind == "HuggingFaceTokenizer" and model:
        folder = model if model.is_dir() else model.parent
        found = {name: folder / name for name in TOKENIZER_FILES}
        found |= {} if model.is_dir() else {"tokenizer.json": model}
    elif kind in SENTENCE_PIECE and model:
        found = {"tokenizer.model": model}
    elif kind == "GPT2BPETokenizer":
        found = {"vocab.json": Path(data.vocab_file), "merges.txt": Path(data.merge_file)}
    else:
        found = {}
    return {name: path for name, path in found.items() if path.is_file()}


def _is_imported(
    cfg: RunConfig, load: Path, run: Mapping[str, Any], like: Mapping[str, Any] | None
) -> bool:
    """Whether the run reads the imported folder's tokenizer, or none of its own (mock data)."""
    if cfg.data.tokenizer_type in (None, "NullTokenizer"):
        return like is not None
    if like and Path(cfg.data.tokenizer_model or "").parent in _places(load, run):
        return True  # also where it is gone
    folder, mine = imported_folder(load, run), _own_files(cfg).get("tokenizer.json")
    theirs = folder and folder / "tokenizer.json"
    return bool(mine and theirs) and _digest(mine) == _digest(theirs)


def _own_ids(cfg: RunConfig, note: Callable[[str], None]) -> dict[str, int | None]:
    """The ids that the run's own tokenizer says; null where it cannot be read or is none."""
    from data.tokenizer import build_tokenizer

    data, ids = cfg.data, dict.fromkeys(IDS)
    if data.tokenizer_type in (None, "NullTokenizer"):
        note("the run has no tokenizer with text: the ids of special tokens are null")
        return ids
    try:
        words = build_tokenizer(
            data.tokenizer_type,
            data.tokenizer_model,
            vocab_size=cfg.model.vocab_size,
            vocab_file=data.vocab_file,
            merge_file=data.merge_file,
        )
    except Fatal as error:
        note(f"the ids of special tokens are null: {error}")
        return ids
    return ids | {"eos_token_id": words.eod, "bos_token_id": words.bos}


def describe(
    config: dict[str, Any], cfg: RunConfig, load: Path, run: Mapping[str, Any], note
) -> dict[str, Path]:
    """Put the ids of special tokens into `config`; name -> file of what else to copy."""
    folder, like = imported_folder(load, run), imported_config(load, run)
    if not _is_imported(cfg, load, run, like):
        config |= _own_ids(cfg, note)
        files = _own_files(cfg)
        if not files and cfg.data.tokenizer_type not in (None, "NullTokenizer"):
            note(f"no tokenizer file that transformers reads ({cfg.data.tokenizer_type})")
        return files
    config |= {name: (like or {}).get(name) for name in IDS}
    if folder is None:
        note("the imported folder is gone: no tokenizer and no generation config are copied")
        return {}
    return {name: folder / name for name in TOKENIZER_FILES if (folder / name).is_file()}


def copy(files: Mapping[str, Path], to: Path) -> None:
    """Copy them under their names."""
    for name, path in files.items():
        shutil.copyfile(path, to / name)
