"""Where tokens come from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_ext.ranges import Whole


@dataclass(frozen=True)
class DataSection:
    """Data sets, their blend, and the tokenizer."""

    data_path: list[str] | None = None
    """Prefixes of .bin/.idx files, or weights and prefixes: 0.7 code 0.3 text; cut by --split."""

    train_data_path: list[str] | None = None
    """Blend of the training set alone; excludes --data-path."""

    valid_data_path: list[str] | None = None
    """Blend of the validation set alone."""

    test_data_path: list[str] | None = None
    """Blend of the test set alone."""

    per_split_data_args_path: str | None = None
    """JSON file with the blends: {"train": [...], "valid": [...], "test": [...]}."""

    split: str | None = None
    """Shares of training, validation and test documents, for instance 969,30,1."""

    mock_data: bool = False
    """Made-up tokens instead of files."""

    check_files: bool = True
    """--dry-run and the launcher open the tokenizer and the data files, as a run does. Off: they
    lie on another machine."""

    data_cache_path: str | None = None
    """Folder of the cached sample indices. Default: beside the data."""

    mmap_bin_files: bool = True
    """Map .bin files into memory instead of reading them."""

    data_hash: Literal["sampled", "complete"] = "sampled"
    """How a .bin above 4 GiB is compared with the hash that data.prepare left: 256 blocks of it, or
    every byte (smaller files: always every byte)."""

    num_workers: Whole = 2
    """Loader processes or threads a rank."""

    num_dataset_builder_threads: Whole = 1
    """Threads that build the indices of a blend."""

    dataloader_type: Literal["single", "cyclic", "external"] | None = None
    """single: one pass in the index's order (default); cyclic: shuffled passes."""

    eod_mask_loss: bool = False
    """No loss on end-of-document tokens."""

    reset_position_ids: bool = False
    """Positions start again after an end-of-document token."""

    reset_attention_mask: bool = False
    """Tokens attend only inside their own document."""

    create_attention_mask_in_dataloader: bool = True
    """Kept for Megatron-LM's scripts: our attention makes its mask itself, both mean the same."""

    tokenizer_type: (
        Literal[
            "BertWordPieceLowerCase",
            "BertWordPieceCase",
            "GPT2BPETokenizer",
            "SentencePieceTokenizer",
            "GPTSentencePieceTokenizer",
            "HuggingFaceTokenizer",
            "Llama2Tokenizer",
            "TikTokenizer",
            "MultimodalTokenizer",
            "NullTokenizer",
            "NullMultimodalTokenizer",
            "SFTTokenizer",
        ]
        | None
    ) = None
    """Kind of tokenizer; its vocabulary must hold every id of the data."""

    tokenizer_model: str | None = None
    """File or name of the tokenizer's model."""

    vocab_file: str | None = None
    """Vocabulary file, where the tokenizer's kind has one."""

    merge_file: str | None = None
    """Merges file, where the tokenizer's kind has one."""

    tiktoken_pattern: Literal["v1", "v2"] | None = None
    """Word pattern of TikTokenizer."""

    tiktoken_num_special_tokens: Whole = 1000
    """Special tokens of TikTokenizer."""
