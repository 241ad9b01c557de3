"""The work of `data.prepare` in pieces that can be redone: plan, one shard, journal.

The plan depends on the input files only.  A worker turns a shard into ``shard-000012.bin`` (ids)
and ``shard-000012.len`` (int64 lengths) under temporary names, fsyncs and renames them.  The parent
then appends the shard's facts with both hashes to ``journal.jsonl`` and fsyncs it.  After a kill,
shards whose files still match their line are kept and the others are done again; the output is the
shards in order, so it is the same bytes for any number of workers and any number of kills.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from data.documents import (
    MAX_DOCUMENT_BYTES,
    Piece,
    Skipped,
    Source,
    read_documents,
    splits_by_rows,
)
from data.indexed import LARGEST_DOCUMENT, token_dtype
from data.parquet import row_groups
from data.storage import atomic_file, disk_errors, sha256_of, write_json
from data.tokenizer import Tokenizer
from megatron_ext.errors import DataError

SMALLEST_SHARD_BYTES = 1 << 20
LARGEST_SHARD_BYTES = 1 << 28
SHARDS_WANTED = 2048


@dataclass
class ShardFacts:
    """What one finished shard holds; a line of the journal."""

    shard: int
    bin_bytes: int = 0
    bin_sha256: str = ""
    len_sha256: str = ""
    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    """UTF-8 bytes of the texts."""
    piece_bytes: int = 0
    """Bytes that the ids stand for by their pieces: equals ``text_bytes`` where those are exact."""
    smallest_id: int | None = None
    largest_id: int | None = None
    skipped: Skipped = field(default_factory=Skipped)


def shard_bytes(sources: list[Source]) -> int:
    """Bytes of input in a shard: about `SHARDS_WANTED` shards, within limits; depends on the inputs
    only.
    """
    total = sum(source.size for source in sources)
    return min(LARGEST_SHARD_BYTES, max(SMALLEST_SHARD_BYTES, total // SHARDS_WANTED))


def pieces_of(source: Source, target: int) -> Iterator[Piece]:
    """The pieces of a source, in the order of its documents."""
    if source.kind == "jsonl" and not source.compression:
        for start in range(0, source.size, target):
            end = min(source.size, start + target)
            yield Piece(source, start, end, end - start)
    elif splits_by_rows(source):
        groups = max(1, row_groups(source.path))
        for group in range(groups):
            yield Piece(source, group, group + 1, source.size // groups)
    else:
        yield Piece(source, 0, source.size, source.size)


def plan(sources: list[Source]) -> list[list[Piece]]:
    """Shards, each a list of pieces; neighbours are grouped until a shard is full."""
    target = shard_bytes(sources)
    shards: list[list[Piece]] = [[]]
    filled = 0
    for source in sources:
        for piece in pieces_of(source, target):
            if shards[-1] and filled + piece.size > target:
                shards.append([])
                filled = 0
            shards[-1].append(piece)
            filled += piece.size
    return shards


def shard_paths(folder: Path, shard: int) -> tuple[Path, Path]:
    """(.bin, .len) of a shard."""
    return folder / f"shard-{shard:06d}.bin", folder / f"shard-{shard:06d}.len"


@dataclass(frozen=True)
class Recipe:
    """How shards are made, beside the tokenizer."""

    folder: Path
    """Where they are written."""
    key: str
    """Of the text in jsonl lines and parquet columns."""
    append_eod: bool
    max_document_bytes: int = MAX_DOCUMENT_BYTES


def write_shard(
    recipe: Recipe, shard: int, pieces: list[Piece], tokenizer: Tokenizer
) -> ShardFacts:
    """Tokenizes one shard to disk; returns its facts."""
    skipped = Skipped()
    texts = (
        document
        for piece in pieces
        for document in read_documents(piece, recipe.key, skipped, recipe.max_document_bytes)
    )
    return write_texts(recipe, shard, texts, tokenizer, skipped)


def write_texts(
    recipe: Recipe,
    shard: int,
    texts: Iterable[tuple[str, str]],
    tokenizer: Tokenizer,
    skipped: Skipped,
) -> ShardFacts:
    """The ``.bin`` and ``.len`` of one shard from (place, text); a document that the tokenizer
    cannot do is counted in ``skipped``, which becomes part of the facts.
    """
    facts = ShardFacts(shard, skipped=skipped)
    dtype = token_dtype(tokenizer.vocab_size)
    bin_path, len_path = shard_paths(recipe.folder, shard)
    lengths: list[int] = []
    digest = hashlib.sha256()
    with atomic_file(bin_path) as stream:
        for place, text in texts:
            ids = None
            with skipped.one_document("tokenizer", place):
                ids = encode_checked(tokenizer, text, recipe.append_eod)
                count_document(facts, text, ids, tokenizer, recipe.append_eod)
            if ids is None:
                continue
            content = ids.astype(dtype).tobytes()
            digest.update(content)
            stream.write(content)
            lengths.append(len(ids))
    facts.bin_bytes, facts.bin_sha256 = facts.tokens * dtype.itemsize, digest.hexdigest()
    content = np.array(lengths, dtype="<i8").tobytes()
    facts.len_sha256 = hashlib.sha256(content).hexdigest()
    with atomic_file(len_path) as stream:
        stream.write(content)
    return facts


def encode_checked(tokenizer: Tokenizer, text: str, append_eod: bool) -> np.ndarray:
    """int64 ids of one document, each proven to be inside the vocabulary, none of them its end."""
    ids = np.array(tokenizer.encode(text) + ([tokenizer.eod] if append_eod else []), dtype=np.int64)
    if len(ids) > LARGEST_DOCUMENT:
        raise DataError(
            f"a document has {len(ids)} tokens, an .idx counts up to {LARGEST_DOCUMENT}",
            do="cut the document",
        )
    if len(ids) and not 0 <= ids.min() <= ids.max() < tokenizer.vocab_size:
        raise DataError(
            f"the tokenizer gave id {ids.max() if ids.min() >= 0 else ids.min()}, "
            f"its vocabulary is 0 to {tokenizer.vocab_size - 1}",
            do="use a tokenizer file that is whole",
        )
    if (ids[: len(ids) - append_eod] == tokenizer.eod).any():
        raise DataError(
            f"the text spells the end of a document (id {tokenizer.eod})",
            do="mark the token as special in the tokenizer's file",
        )
    return ids


def count_document(
    facts: ShardFacts, text: str, ids: np.ndarray, tokenizer: Tokenizer, behind_eod: bool
) -> None:
    """Adds one document to the facts; ``behind_eod``: training sees an eod before it."""
    text_bytes, of_pieces = len(text.encode("utf-8")), tokenizer.pieces.of_text(ids, behind_eod)
    facts.documents += 1
    facts.tokens += len(ids)
    facts.text_bytes += text_bytes
    facts.piece_bytes += of_pieces
    if len(ids):
        low, high = int(ids.min()), int(ids.max())
        facts.smallest_id = low if facts.smallest_id is None else min(low, facts.smallest_id)
        facts.largest_id = high if facts.largest_id is None else max(high, facts.largest_id)


def append_to_journal(folder: Path, facts: ShardFacts) -> None:
    """Makes a finished shard durable."""
    path = folder / "journal.jsonl"
    with disk_errors(path), open(path, "a", encoding="utf-8") as stream:
        stream.write("\n" + json.dumps(asdict(facts)))  # a line cut by a kill spoils only itself
        stream.flush()
        os.fsync(stream.fileno())


def facts_path(folder: Path, shard: int) -> Path:
    """The facts of a shard that another machine made: many writers cannot share the journal."""
    return folder / f"shard-{shard:06d}.json"


def save_facts(folder: Path, facts: ShardFacts) -> None:
    """Makes a finished shard durable without the journal."""
    write_json(facts_path(folder, facts.shard), asdict(facts))


def parse_facts(text: str) -> ShardFacts | None:
    """The facts in a line or file, None where it was cut by a kill."""
    try:
        record = json.loads(text)
        return ShardFacts(**{**record, "skipped": Skipped(**record["skipped"])})
    except (ValueError, TypeError, KeyError):
        return None


def finished_shards(folder: Path) -> dict[int, ShardFacts]:
    """The shards with facts, in the journal or beside them, whose files have their hashes."""
    journal = folder / "journal.jsonl"
    texts = [path.read_text() for path in sorted(folder.glob("shard-*.json"))]
    if journal.exists():
        texts += journal.read_text(encoding="utf-8", errors="replace").splitlines()
    found = {facts.shard: facts for text in texts if (facts := parse_facts(text)) is not None}
    return {shard: facts for shard, facts in found.items() if _is_whole(folder, facts)}


def _is_whole(folder: Path, facts: ShardFacts) -> bool:
    bin_path, len_path = shard_paths(folder, facts.shard)
    try:
        return (
            bin_path.stat().st_size == facts.bin_bytes
            and sha256_of(bin_path) == facts.bin_sha256
            and sha256_of(len_path) == facts.len_sha256
        )
    except OSError:
        return False


def total_facts(all_facts: list[ShardFacts]) -> ShardFacts:
    """Sums over the shards, in order."""
    total = ShardFacts(shard=len(all_facts))
    for facts in all_facts:
        for name in ("bin_bytes", "documents", "tokens", "text_bytes", "piece_bytes"):
            setattr(total, name, getattr(total, name) + getattr(facts, name))
        total.skipped.merge(facts.skipped)
    total.smallest_id = min(
        (f.smallest_id for f in all_facts if f.smallest_id is not None), default=None
    )
    total.largest_id = max(
        (f.largest_id for f in all_facts if f.largest_id is not None), default=None
    )
    return total
