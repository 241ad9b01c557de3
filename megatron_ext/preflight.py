"""What the start of a run checks and needs no rank for: files, tokenizer, tiers, folders, memory.

`--dry-run` and the launchers ask here before a rank starts, so that they refuse what the run would
refuse, with the same code and the same words: each check is the function that the run itself calls.
No torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from data.datasets import blends_of, check_split
from data.indexed import IndexedFile
from data.skip import parse_ranges
from data.tokenizer import build_tokenizer, check_flags, files_of
from megatron_ext.checkpoint.lost import check_loadable
from megatron_ext.checkpoint.starting import folders, named_load, plan
from megatron_ext.checkpoint.tiers import tiers_of
from megatron_ext.config import RunConfig
from megatron_ext.costs.tensors import padded_vocab_size
from megatron_ext.errors import ConfigError, DataError, Fatal, Violation
from megatron_ext.planner.memory import all_stages, worst


def preflight(cfg: RunConfig) -> list[str]:
    """Lines about what was looked at and what could not be.

    Raises ConfigError (64) with all wrong flags together, else the first DataError (65) of a file.
    """
    cfg = named_load(cfg)
    found = [error for check in _flag_checks(cfg) if (error := _error_of(check))]
    broken = [error for error in found if error.code == ConfigError.code]
    if broken:
        raise ConfigError(violations=[_violation(error) for error in broken])
    for error in found:
        raise _with_way_out(error, cfg)
    try:
        looked_at = _files(cfg)
    except DataError as error:
        raise _with_way_out(error, cfg) from error
    return [*looked_at, _memory(cfg), plan(cfg).told(cfg)]


def _with_way_out(error: Fatal, cfg: RunConfig) -> Fatal:
    if cfg.action == "dry-run":
        error.do += "; --no-check-files where it lies on another machine"
    return error


def _error_of(check: Callable[[], object]) -> Fatal | None:
    try:
        check()
    except Fatal as error:
        return error
    return None


def _violation(error: Fatal) -> Violation:
    path = f" path={error.path}" if error.path else ""
    return Violation(error.what + path, None, "", error.do)


def _flag_checks(cfg: RunConfig) -> Iterator[Callable[[], object]]:
    """Checks of what the flags say, without their files."""
    data = cfg.data
    yield lambda: tiers_of(cfg.checkpoint, folders(cfg)[1])
    yield lambda: parse_ranges(cfg.resilience.skip_samples)
    if data.tokenizer_type or not data.mock_data:
        if data.tokenizer_type or _has_data(cfg):
            yield lambda: check_flags(*_tokenizer(cfg))
    reads = data.check_files or not data.per_split_data_args_path
    if not data.mock_data and _has_data(cfg) and reads:
        yield lambda: blends_of(data)
        yield lambda: check_split(data)
    load = cfg.checkpoint.load
    if load and data.check_files:
        yield lambda: check_loadable(cfg.checkpoint, Path(load), folders(cfg)[1])


def _tokenizer(cfg: RunConfig) -> tuple:
    data = cfg.data
    kind = data.tokenizer_type or ("NullTokenizer" if data.mock_data else None)
    return kind, data.tokenizer_model, cfg.model.vocab_size, data.vocab_file, data.merge_file


def _has_data(cfg: RunConfig) -> bool:
    data = cfg.data
    splits = (data.train_data_path, data.valid_data_path, data.test_data_path)
    return any((data.data_path, data.per_split_data_args_path, *splits))


def _files(cfg: RunConfig) -> list[str]:
    """Open the tokenizer and every pair of data files, as the run does."""
    data = cfg.data
    if not data.check_files:
        return ["files: not looked at (--no-check-files)"]
    if not (data.mock_data or _has_data(cfg)):
        return ["files: none named; a training needs --data-path, or --mock-data"]
    if cfg.action == "dry-run" and (elsewhere := _elsewhere(cfg)):
        listed = ", ".join(map(str, elsewhere))
        return [f"files: NOT THERE, a run on this machine would end with 65: {listed}"]
    words = build_tokenizer(
        *_tokenizer(cfg),
        tiktoken_pattern=data.tiktoken_pattern,
        tiktoken_num_special_tokens=data.tiktoken_num_special_tokens,
    )
    padded = cfg.model.padded_vocab_size
    if padded and words.vocab_size > padded:
        raise ConfigError(
            f"--padded-vocab-size {padded} must hold {words.vocab_size} tokens of the tokenizer",
            do="leave it out: it is derived",
        )
    if data.mock_data:
        return [f"files: mock data, a tokenizer of {words.vocab_size} tokens"]
    prefixes = sorted({entry.prefix for blend in blends_of(data) for entry in blend})
    tokens = sum(IndexedFile(prefix).num_tokens for prefix in prefixes)
    return [f"files: {len(prefixes)} with {tokens} tokens, a tokenizer of {words.vocab_size}"]


def _elsewhere(cfg: RunConfig) -> list[Path]:
    """Files that a configuration file names in folders which this machine has not: they are another
    machine's, or will be made. What a flag of this command names is looked at in any case.
    """
    data = cfg.data
    kind, model, _, vocab, merges = _tokenizer(cfg)
    named = [(path, "tokenizer_model") for path in files_of(kind, model, vocab, merges)]
    if _has_data(cfg) and not data.per_split_data_args_path:
        dest = "data_path" if data.data_path else "train_data_path"
        named += [(Path(entry.prefix), dest) for blend in blends_of(data) for entry in blend]
    from_file = [path for path, dest in named if cfg.origins[dest].startswith("file:")]
    return sorted({path for path in from_file if not path.parent.is_dir()})


def _memory(cfg: RunConfig) -> str:
    """The estimate of the fullest rank. Raises ConfigError where it is above --device-memory-gb."""
    if cfg.action != "dry-run" and cfg.parallel.device_memory_gb is None:
        return "memory: not asked for"
    if not padded_vocab_size(cfg):
        return "memory: unknown until the vocabulary's size is (--vocab-size)"
    top, room = worst(all_stages(cfg)), cfg.parallel.device_memory_gb
    text = f"{top.total / 1e9:.3g} GB on the fullest rank, of pipeline stage {top.stage}"
    if room is not None and top.total > room * 1e9:
        raise ConfigError(
            f"--device-memory-gb {room:g} is less than the estimate of {text}",
            do="add ranks, lower --micro-batch-size, or add --recompute-granularity selective;"
            " python -m megatron_ext.planner search finds what fits",
        )
    limit = "" if room is None else f", {room:g} GB there"
    return f"memory: about {text}{limit}"
