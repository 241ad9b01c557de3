"""Our ends of a datatrove pipeline: a shard's documents in, Megatron's shard out.

Both are pickled and run elsewhere, so they hold paths and plain values.
"""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import asdict
from functools import lru_cache
from itertools import islice
from pathlib import Path

from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep

from data.documents import Piece, Skipped, Source, read_documents
from data.shards import Recipe, save_facts, write_texts
from data.storage import atomic_file
from data.tokenizer import Tokenizer, tokenizer_of
from megatron_ext.errors import DataError


def plan_path(folder: Path) -> Path:
    """Where the tasks find their pieces."""
    return folder / "plan.jsonl"


def write_plan(folder: Path, plan: list[list[Piece]]) -> None:
    """One line a shard, so that a task reads its own and not thousands."""
    with atomic_file(plan_path(folder)) as stream:
        for pieces in plan:
            line = json.dumps([asdict(piece) for piece in pieces], default=str)
            stream.write(f"{line}\n".encode())


def read_plan(folder: Path, shard: int) -> list[Piece]:
    """The pieces of one shard."""
    with open(plan_path(folder), encoding="utf-8") as stream:
        records = json.loads(next(islice(stream, shard, None)))
    return [_piece(record) for record in records]


def _piece(record: dict) -> Piece:
    source = Source(**{**record["source"], "path": Path(record["source"]["path"])})
    return Piece(**{**record, "source": source})


def require_unchanged(source: Source) -> None:
    """Raises where an input is not the file that was planned."""
    try:
        status = source.path.stat()
    except OSError as error:
        raise DataError(
            f"a task cannot read an input: {error.strerror}",
            do="put inputs and --output on a file system that all nodes see",
            path=source.path,
        ) from error
    if (status.st_size, status.st_mtime_ns) != (source.size, source.mtime_ns):
        raise DataError(
            "an input changed while it was prepared", do="run the command again", path=source.path
        )


class ReadShard(PipelineStep):
    """The documents of the shard with the number of the task, in order."""

    type = "READER"
    name = "shard"

    def __init__(self, recipe: Recipe):
        super().__init__()
        self.recipe = recipe
        self.skipped = Skipped()
        """What this task left out so far, here and in later steps."""

    def run(self, data=None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """Yields the documents; metadata holds the task's number."""
        self.skipped.counts.clear()  # several tasks of one job share this object
        self.skipped.examples.clear()
        key, limit = self.recipe.key, self.recipe.max_document_bytes
        for piece in read_plan(self.recipe.folder, rank):
            require_unchanged(piece.source)
            for place, text in read_documents(piece, key, self.skipped, limit):
                yield Document(text=text, id=place, metadata={"rank": rank})


class Dropped:
    """What datatrove's steps call with a document that they drop: counts it with its reason."""

    def __init__(self, reader: ReadShard, reason: str):
        self.reader, self.reason = reader, reason

    def __enter__(self) -> Dropped:
        return self

    def __exit__(self, *error: object) -> None:
        return None

    def write(self, document: Document, rank: int = 0) -> None:
        """Counts the document."""
        detail = document.metadata.get("filter_reason")
        reason = f"{self.reason}: {detail}" if detail else self.reason
        self.reader.skipped.add(reason, document.id)


class OneByOne(PipelineStep):
    """A step of datatrove that gets each document alone: one on which it fails is left out."""

    type = "FILTER"

    def __init__(self, step: PipelineStep, reader: ReadShard, name: str):
        super().__init__()
        self.step, self.reader, self.name = step, reader, name

    def run(self, data=None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """Yields what the step yields."""
        for document in data:
            kept: list[Document] = []
            with self.reader.skipped.one_document(self.name, document.id):
                kept = list(self.step.run([document], rank, world_size))
            yield from kept


@lru_cache(maxsize=1)
def _tokenizer(flags: str) -> Tokenizer:
    """One tokenizer a process, for all its tasks."""
    return tokenizer_of(Namespace(**json.loads(flags)))


class WriteShard(PipelineStep):
    """Tokenizes what reaches it into the shard with the number of the task."""

    type = "WRITER"
    name = "Megatron shard"

    def __init__(self, recipe: Recipe, reader: ReadShard, flags: Namespace, fingerprint: str):
        super().__init__()
        self.recipe, self.reader, self.fingerprint = recipe, reader, fingerprint
        names = ("tokenizer_type", "tokenizer_model", "vocab_size", "vocab_file", "merge_file")
        tiktoken = ("tiktoken_pattern", "tiktoken_num_special_tokens")
        chosen = {name: getattr(flags, name) for name in (*names, *tiktoken)}
        self.flags = json.dumps(chosen, default=str)

    def run(self, data=None, rank: int = 0, world_size: int = 1) -> None:
        """Writes ``.bin``, ``.len`` and then the facts, which say that both are whole."""
        tokenizer = _tokenizer(self.flags)
        if tokenizer.fingerprint != self.fingerprint:
            raise DataError(
                "a task found another tokenizer than the command did",
                do="put the tokenizer on a file system that all nodes see",
            )
        texts = ((document.id, document.text) for document in data)
        facts = write_texts(self.recipe, rank, texts, tokenizer, self.reader.skipped)
        save_facts(self.recipe.folder, facts)
