"""Tokens a second of the loader beside a memory map and Megatron's GPTDataset; MB/s of preparation.

    python -m tests.bench data --json data.json
    python -m tests.bench data --prepare          # also: data.prepare with each of its executors

All read the same .bin/.idx (documents of 20 to 2,000 tokens, uint16) and give micro-batches of
`--batch` x `--sequence` tokens and labels as torch tensors. 'memory map' is a random window of the
.bin for each row, as small training scripts read it: no epochs, no documents, no resume. Ours reads
ahead in a thread by default, as training does. Rounds are interleaved; medians. The floor is what
the copies of these bytes cost: 2 bytes read, 16 written a token (tokens and labels in int64).
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from tests.bench import ceilings, table

VOCABULARY, EOD = 32000, 0
BYTES_A_TOKEN = 2 + 16


def write_corpus(prefix: Path, num_tokens: int) -> None:
    """Random documents of 20 to 2,000 tokens that end with EOD."""
    from data.indexed import write_pair

    made = np.random.default_rng(0)
    documents, total = [], 0
    while total < num_tokens:
        length = int(made.integers(20, 2000))
        document = made.integers(1, VOCABULARY, length, dtype=np.uint16)
        document[-1] = EOD
        documents.append(document)
        total += length
    write_pair(prefix, documents, np.uint16)


def ours(prefix: Path, batch: int, sequence: int, prefetch: int) -> Iterator[Any]:
    """data.loader.MicroBatches over open_datasets, without end."""
    from data import open_datasets
    from data.loader import MicroBatches

    flags = SimpleNamespace(data_path=[str(prefix)], split="100,0,0")
    dataset = open_datasets(
        flags,
        seq_length=sequence,
        num_samples=(10**6, 0, 0),
        seed=1,
        vocab_size=VOCABULARY,
        eod=EOD,
        is_builder=True,
        barrier=lambda: None,
    ).train
    with MicroBatches(dataset, batch, 0, 1, prefetch=prefetch) as batches:
        yield from batches


def memory_map(prefix: Path, batch: int, sequence: int) -> Iterator[Any]:
    """Random windows, tokens and labels."""
    tokens = np.memmap(f"{prefix}.bin", dtype=np.uint16, mode="r")
    made = torch.Generator().manual_seed(0)
    while True:
        starts = torch.randint(len(tokens) - sequence - 1, (batch,), generator=made).tolist()
        rows = [tokens[i : i + sequence + 1].astype(np.int64) for i in starts]
        stacked = torch.from_numpy(np.stack(rows))
        yield stacked[:, :-1].contiguous(), stacked[:, 1:].contiguous()


class Words:
    """What GPTDataset asks a tokenizer."""

    vocab_size, eod, pad = VOCABULARY, EOD, -1
    unique_identifiers = {"class": "bench"}


def gpt_dataset(prefix: Path, batch: int, sequence: int, workers: int) -> Iterator[Any]:
    """megatron-core's GPTDataset behind torch's DataLoader."""
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.utils import Split

    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=sequence,
        blend=([str(prefix)], None),
        split="1,0,0",
        path_to_cache=str(prefix.parent / "megatron-cache"),
        tokenizer=Words(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    low = GPTDataset.build_low_level_dataset(str(prefix), config)
    documents = np.arange(len(low), dtype=np.int32)
    dataset = GPTDataset(low, str(prefix), documents, 200_000, Split.train, config)
    loader = torch.utils.data.DataLoader(
        dataset, batch, num_workers=workers, persistent_workers=workers > 0
    )
    while True:
        yield from loader


def ways(prefix: Path, batch: int, sequence: int) -> dict[str, Callable[[], Iterator[Any]]]:
    """The readers by name."""
    return {
        "ours, read ahead (default)": lambda: ours(prefix, batch, sequence, 2),
        "ours, in the caller": lambda: ours(prefix, batch, sequence, 0),
        "memory map": lambda: memory_map(prefix, batch, sequence),
        "GPTDataset, DataLoader(0)": lambda: gpt_dataset(prefix, batch, sequence, 0),
        "GPTDataset, DataLoader(2)": lambda: gpt_dataset(prefix, batch, sequence, 2),
    }


def rates(args: argparse.Namespace, folder: Path) -> dict[str, list[float] | str]:
    """Tokens a second of each reader in each round; a text where it does not run."""
    prefix = folder / "corpus"
    write_corpus(prefix, args.tokens)
    found: dict[str, Any] = {}
    readers: dict[str, Iterator[Any]] = {}
    for name, make in ways(prefix, args.batch, args.sequence).items():
        try:
            readers[name] = make()
            next(readers[name])
            found[name] = []
        except Exception as error:  # whatever it raises is the finding
            found[name] = f"{type(error).__name__}: {str(error)[:120]}"
            readers.pop(name)
    for _ in range(args.rounds):
        for name, reader in readers.items():
            for _ in range(4):
                next(reader)  # what was read ahead in the others' turns
            begin = time.perf_counter()
            for _ in range(args.batches):
                next(reader)
            seconds = time.perf_counter() - begin
            found[name].append(args.batches * args.batch * args.sequence / seconds)
    for reader in readers.values():
        reader.close()
    return found


def main(argv: list[str]) -> int:
    """Print both tables."""
    parser = table.parser("data", __doc__)
    parser.add_argument("--batches", type=int, default=200, help="micro-batches of a turn")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--sequence", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=5_000_000, help="of the corpus")
    parser.add_argument("--prepare", action="store_true", help="also tests.bench.prepare")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        found = rates(args, Path(name))
    copy = ceilings.copy_gb_s()
    own = next(iter(found.values()))
    rows = []
    for name, values in found.items():
        if isinstance(values, str):
            rows.append([name, "-", "-", "-", f"not run: {values}"])
            continue
        rate = statistics.median(values)
        quotient = statistics.median(a / b for a, b in zip(own, values)) if own else float("nan")
        share = rate * BYTES_A_TOKEN / 1e9 / copy
        rows.append([name, f"{rate / 1e6:,.1f}", f"{share:.0%}", f"{quotient:.2f}x", ""])
    print(table.markdown(("reader", "M tokens/s", "of the copy rate", "ours is", "notes"), rows))
    print(f"\ncopy {copy:.1f} GB/s (read and written), {BYTES_A_TOKEN} bytes a token")
    content: dict[str, Any] = {"table": "data", "copy_gb_s": copy, "tokens_per_s": found}
    if args.prepare:
        from tests.bench.prepare import measure

        speeds = measure(args.rounds)
        head = ("preparation", "MB/s a core", "lowest", "highest")
        rows = [
            [way, f"{statistics.median(v):.2f}", f"{min(v):.2f}", f"{max(v):.2f}"]
            for way, v in speeds.items()
        ]
        print("\n" + table.markdown(head, rows))
        content["prepare_mb_per_cpu_s"] = speeds
    table.write_json(args.json, content)
    return 0
