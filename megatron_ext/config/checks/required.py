"""What must be given."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_ext.config.run_config import RunConfig
from megatron_ext.errors import Violation

ALWAYS: tuple[tuple[str, str, str], ...] = (
    ("transformer", "num_layers", "--num-layers 12"),
    ("transformer", "hidden_size", "--hidden-size 768"),
    ("transformer", "num_attention_heads", "--num-attention-heads 12"),
    ("model", "seq_length", "--seq-length 1024"),
    ("model", "max_position_embeddings", "--max-position-embeddings 1024"),
    ("train", "micro_batch_size", "--micro-batch-size 1"),
)
"""Section, attribute, example."""

BEGIN = (
    "bash launch/quickstart.sh trains a first model; --config NAME --dry-run looks at one of"
    " configs/ (quickstart, mixtral-8x7b, ...); --help lists the flags"
)
"""Ways to begin."""


def rules(cfg: RunConfig) -> Iterator[Violation]:
    """Names each missing flag with an example; without any of a model, only how to begin."""
    if all(getattr(getattr(cfg, section), attribute) is None for section, attribute, _ in ALWAYS):
        yield Violation("--config", None, "or the flags of a model are missing", BEGIN)
        return
    for section, attribute, example in ALWAYS:
        if getattr(getattr(cfg, section), attribute) is None:
            yield _missing(attribute, example)
    if not cfg.train.eval_only:
        if cfg.train.train_iters is None and cfg.train.train_samples is None:
            yield Violation(
                "--train-iters",
                None,
                "or --train-samples is required",
                "use for instance --train-iters 100",
            )
        if cfg.schedule.lr is None:
            yield _missing("lr", "--lr 3e-4")
    if cfg.action in ("train", "dry-run"):
        yield from _data(cfg)


def _missing(attribute: str, example: str) -> Violation:
    flag = "--" + attribute.replace("_", "-")
    return Violation(flag, None, "is required", f"use for instance {example}")


def _data(cfg: RunConfig) -> Iterator[Violation]:
    """A dry run may leave the data out: it is about the model then."""
    data = cfg.data
    blends = [data.data_path, data.per_split_data_args_path]
    blends += [data.train_data_path, data.valid_data_path, data.test_data_path]
    is_named = any(blends) or data.mock_data
    if not is_named and cfg.action == "dry-run":
        return
    if not is_named:
        yield Violation(
            "--data-path",
            None,
            "or --mock-data is required",
            "use --data-path PREFIX made by python -m data.prepare",
        )
    if any(blends) and data.mock_data:
        yield Violation("--mock-data", None, "excludes data paths", "remove one of them")
    per_split = any((data.train_data_path, data.valid_data_path, data.test_data_path))
    ways = {
        "--data-path": data.data_path,
        "--train-data-path": per_split,
        "--per-split-data-args-path": data.per_split_data_args_path,
    }
    given = [name for name, value in ways.items() if value]
    if len(given) > 1:
        yield Violation(given[1], None, f"excludes {given[0]}", f"use only {given[0]}")
    sized = cfg.model.vocab_size or cfg.model.padded_vocab_size
    if data.tokenizer_type is None and not sized:
        yield Violation(
            "--tokenizer-type",
            None,
            "or --vocab-size is required",
            "use --tokenizer-type SentencePieceTokenizer --tokenizer-model FILE",
        )
