"""The datasets of a run: data files, checked, cut, blended, one object for each of train, valid and
test.

Every rank opens and checks the files.  One rank (``is_builder``) also scans the ids and writes the
index cache; after the barrier all ranks read what it wrote.  A builder's error is raised after the
barrier, and what a scan found is read by all ranks, so that they end together with the same
message.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from data import blend, pack, scan
from data.cache import IndexCache
from data.indexed import IndexedFile
from data.inputs import Inputs, content_of, data_files, stamped
from data.mock import MockDataset
from data.rules import Rules
from data.samples import BlendedDataset, Dataset, PackedDataset
from megatron_ext.errors import ConfigError, DataError

SPLIT_NAMES = ("train", "valid", "test")
DEFAULT_SPLIT = "969,30,1"


@dataclass
class Splits:
    """The datasets of a run; None where a split was not asked for or has no document."""

    train: Dataset | None
    valid: Dataset | None
    test: Dataset | None
    warnings: tuple[str, ...] = ()
    """One line each; the program prints them on rank 0."""
    inputs: Inputs = field(default_factory=Inputs)
    """The files behind them and the tokenizer's, where the caller has looked at them."""


@dataclass
class _Opening:
    """What `open_datasets` carries from one step to the next."""

    seq_length: int
    seed: int
    vocab_size: int
    rules: Rules
    mmap: bool
    cache: IndexCache
    complete: bool
    """Hash every byte, however large the file is."""
    files: dict[str, IndexedFile] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def file(self, prefix: str) -> IndexedFile:
        """The checked file of a prefix, opened once."""
        if prefix not in self.files:
            self.files[prefix] = IndexedFile(prefix, self.mmap)
        return self.files[prefix]


def open_datasets(
    data_cfg,
    *,
    seq_length: int,
    num_samples: tuple[int | None, int | None, int | None],
    seed: int,
    vocab_size: int,
    eod: int,
    is_builder: bool,
    barrier: Callable[[], None],
) -> Splits:
    """Opens train, valid and test.

    Args:
        data_cfg: has data_path, train_data_path, valid_data_path, test_data_path,
            per_split_data_args_path, split, mock_data, data_cache_path, mmap_bin_files,
            reset_position_ids, reset_attention_mask, eod_mask_loss.
        seq_length: tokens of a sample, without the label of the last one.
        num_samples: samples of each split; 0: the split is not opened; None: one epoch.
        vocab_size: ids of the files must be below it (give the tokenizer's size, not the padded
            one).
        is_builder: this rank scans and writes the cache: one rank, or one a node where the disk is
            not shared.
        barrier: returns when all ranks have called it; called once.

    Raises:
        ConfigError: flags that contradict each other.  DataError: bad files.  DiskError:
            --data-cache-path.
    """
    rules = _rules_of(data_cfg, eod)
    if getattr(data_cfg, "mock_data", False):
        barrier()
        return _mock_splits(seq_length, num_samples, seed, vocab_size, rules)
    blends = blends_of(data_cfg)
    mmap = getattr(data_cfg, "mmap_bin_files", True) is not False
    cache = cache_of(data_cfg, blends)
    complete = getattr(data_cfg, "data_hash", "sampled") == "complete"
    opening = _Opening(seq_length, seed, vocab_size, rules, mmap, cache, complete)
    made = [
        _blended(opening, blends, data_cfg, split, count) for split, count in enumerate(num_samples)
    ]
    failure = None
    try:
        if is_builder:
            _build(opening, made)
    except Exception as error:  # raised below: the other ranks must not wait for ever
        failure = error
    barrier()
    if failure is not None:
        raise failure
    _require_verdict(opening)
    for dataset in made:
        if dataset is not None:
            dataset.open()
    return Splits(*made, warnings=tuple(opening.warnings + opening.cache.warnings))


def prefixes_of(data_cfg) -> list[list[str]]:
    """The pairs of train, valid and test, each once; none for mock data."""
    if getattr(data_cfg, "mock_data", False):
        return [[], [], []]
    return [list(dict.fromkeys(e.prefix for e in entries)) for entries in blends_of(data_cfg)]


def files_now(data_cfg, tokenizer_files: Sequence[Path]) -> Inputs:
    """What the files of a run are before they are opened. Raises as `open_datasets`."""
    prefixes = dict.fromkeys(prefix for split in prefixes_of(data_cfg) for prefix in split)
    return stamped([*data_files(prefixes), *tokenizer_files])


def content(data_cfg, tokenizer_files: Sequence[Path]) -> dict:
    """`Inputs.content` of the training data and the tokenizer; reads the files (one rank does)."""
    train = prefixes_of(data_cfg)[0]
    if not train:
        return content_of([], tokenizer_files, IndexCache(Path(), required=False), False)
    complete = getattr(data_cfg, "data_hash", "sampled") == "complete"
    cache = cache_of(data_cfg, blends_of(data_cfg))
    return content_of(train, tokenizer_files, cache, complete)


def _rules_of(data_cfg, eod: int) -> Rules:
    names = ("reset_position_ids", "reset_attention_mask", "eod_mask_loss")
    return Rules(eod, *(bool(getattr(data_cfg, name, False)) for name in names))


def _mock_splits(
    seq_length: int,
    num_samples: tuple[int | None, int | None, int | None],
    seed: int,
    vocab_size: int,
    rules: Rules,
) -> Splits:
    """Made-up data; None samples, one epoch elsewhere, is one sample."""
    made = [
        None if count == 0 else MockDataset(count or 1, seq_length, vocab_size, rules, seed, split)
        for split, count in enumerate(num_samples)
    ]
    return Splits(*made)


def blends_of(data_cfg) -> list[list[blend.BlendEntry]]:
    """The blend of each split; the same list three times where --split divides the documents of
    --data-path.
    """
    per_split = [getattr(data_cfg, f"{name}_data_path", None) for name in SPLIT_NAMES]
    arguments = getattr(data_cfg, "per_split_data_args_path", None)
    given = [
        flag
        for flag, value in (
            ("--data-path", data_cfg.data_path),
            ("--per-split-data-args-path", arguments),
            ("--train/valid/test-data-path", any(per_split)),
        )
        if value
    ]
    if len(given) != 1:
        raise ConfigError(
            f"{' and '.join(given) or 'no data'} given: exactly one of --data-path, "
            "--train/valid/test-data-path, --per-split-data-args-path is needed",
            do="keep one of them, or use --mock-data",
        )
    if arguments:
        per_split = _read_split_arguments(Path(arguments))
    if data_cfg.data_path:
        return [blend.parse_blend(_words(data_cfg.data_path))] * 3
    return [
        blend.parse_blend(_words(words), f"--{name}-data-path") if words else []
        for name, words in zip(SPLIT_NAMES, per_split, strict=True)
    ]


def _words(value: str | Sequence[str]) -> list[str]:
    return value.split() if isinstance(value, str) else list(value)


def _read_split_arguments(path: Path) -> list[list[str] | None]:
    """The JSON of --per-split-data-args-path: {"train": [...], "valid": [...], "test": [...]}."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        lists = [value.get(name) for name in SPLIT_NAMES]
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise DataError(
            f"--per-split-data-args-path cannot be read: {error}",
            do='write {"train": ["0.3", "prefix", ...], "valid": [...], "test": [...]}',
            path=path,
        ) from None
    return [None if words is None else [str(word) for word in _words(words)] for words in lists]


def cache_of(data_cfg, blends: list[list[blend.BlendEntry]]) -> IndexCache:
    """The cache of --data-cache-path, or the folder index-cache beside the first data file."""
    named = getattr(data_cfg, "data_cache_path", None)
    first = next(entry.prefix for entries in blends for entry in entries)
    return IndexCache(
        Path(named) if named else Path(first).absolute().parent / "index-cache",
        required=bool(named),
    )


def _document_range(data_cfg, file: IndexedFile, split: int) -> tuple[int, int]:
    """Documents of a file that belong to a split."""
    if not data_cfg.data_path:
        return 0, len(file)
    return check_split(data_cfg, len(file))[split]


def check_split(data_cfg, num_documents: int = 1) -> list[tuple[int, int]]:
    """The documents of each split of --split, as [first, last + 1). Raises ConfigError."""
    text = getattr(data_cfg, "split", None) or DEFAULT_SPLIT
    try:
        return pack.split_ranges(text, num_documents)
    except ValueError:
        raise ConfigError(
            f"--split {text} must be one to three numbers of 0 or more that do not sum to 0",
            do="use 969,30,1, Megatron-LM's default",
        ) from None


def _blended(
    opening: _Opening, blends: list[list[blend.BlendEntry]], data_cfg, split: int, count: int | None
) -> BlendedDataset | None:
    """The dataset of a split, its files checked, its indices not yet built."""
    if count == 0 or not blends[split]:
        return None
    members, weights, empty, documents = [], [], [], 0
    for entry in blends[split]:
        file = opening.file(entry.prefix)
        first, stop = _document_range(data_cfg, file, split)
        documents += len(file)
        tokens = int(file.lengths[first:stop].sum(dtype=np.int64))
        if tokens:
            members.append(
                PackedDataset(
                    file,
                    first,
                    stop,
                    seq_length=opening.seq_length,
                    seed=opening.seed,
                    vocab_size=opening.vocab_size,
                    cache=opening.cache,
                )
            )
            weights.append(tokens if entry.weight is None else entry.weight)
            _warn_if_short(opening, members[-1], split)
        else:
            empty.append(entry.prefix)
    if not members:
        return _no_documents(opening, data_cfg, split, documents)
    opening.warnings += [
        f"{SPLIT_NAMES[split]}: {prefix} has no document there, the weights are of the others"
        for prefix in empty
    ]
    return BlendedDataset(
        members, weights, count or sum(map(len, members)), opening.cache, opening.rules
    )


def _warn_if_short(opening: _Opening, member: PackedDataset, split: int) -> None:
    if member.num_tokens <= opening.seq_length:
        opening.warnings.append(
            f"{SPLIT_NAMES[split]}: {member.file.prefix} has {member.num_tokens} tokens there, "
            f"less than one sample of {opening.seq_length + 1}: each sample repeats them"
        )


def _no_documents(opening: _Opening, data_cfg, split: int, documents: int) -> None:
    """A split without documents: an error for train; for the others one warning, or nothing where
    --split gives them a share of 0.
    """
    shares = getattr(data_cfg, "split", None) or DEFAULT_SPLIT
    what = f"--split {shares} gives {SPLIT_NAMES[split]} none of {documents} documents"
    if split == 0:
        raise DataError(what, do="give it a larger share or more documents")
    if data_cfg.data_path and pack.split_shares(shares)[split] == 0:
        return
    opening.warnings.append(
        f"{what}: it is not run; give it a larger share or --{SPLIT_NAMES[split]}-data-path"
    )


def _build(opening: _Opening, made: Sequence[BlendedDataset | None]) -> None:
    """The builder's part: what the files hold, then the indices."""
    for file in opening.files.values():
        key = scan.cache_key(file, opening.complete)
        examine = functools.partial(scan.examine, file, opening.complete)
        opening.cache.note(key, examine)
        _require_good(opening, file, opening.cache.read_note(key) or examine())
    for dataset in made:
        if dataset is not None:
            dataset.build()


def _require_good(opening: _Opening, file: IndexedFile, found: dict) -> None:
    """Raises where a file is damaged or holds an id outside the vocabulary."""
    scan.require_whole(file, found)
    if not scan.needs_no_scan(file, opening.vocab_size):
        scan.require_range(file, found, opening.vocab_size)


def _require_verdict(opening: _Opening) -> None:
    """All ranks: the builder's verdict on the files, as it left it in the cache."""
    for file in opening.files.values():
        if scan.has_bad_report(file):
            opening.warnings.append(
                f"{scan.report_path(file)} is no report of data.prepare: the bytes of the pair are "
                "not compared with it"
            )
        found = opening.cache.read_note(scan.cache_key(file, opening.complete))
        if found is not None:
            _require_good(opening, file, found)
