"""Text to Megatron's ``.bin``/``.idx``, with many processes, resumable, the same bytes every time.

    python -m data.prepare --input corpus/code.jsonl more/ --output tokens/code \\
        --tokenizer-type SentencePieceTokenizer --tokenizer-model corpus/bpe.model \\
        --append-eod --workers 8

writes tokens/code.bin, tokens/code.idx and tokens/code.report.json.  Inputs are files and folders
of .txt .md .py .jsonl .parquet and .gz/.zst of those.  Killed at any moment, the same command goes
on where it was: finished shards wait in tokens/code.parts.  Files appear under their final names
only when they are complete.  Finished with the same settings already: nothing is done; with other
settings: refused unless --overwrite.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data import documents, indexed, piece_bytes, shards
from data.command import add_document_flags
from data.executors.flags import Asked, add_executor_flags, asked_of
from data.scan import spot_sha256
from data.storage import (
    HASH_CHUNK_BYTES,
    atomic_file,
    disk_errors,
    make_folder,
    read_json,
    require_space,
    sha256_of,
    write_json,
)
from data.tokenizer import Tokenizer, add_tokenizer_flags, tokenizer_of
from data.workers import run_shards
from megatron_ext.command import CommandLine, number
from megatron_ext.errors import DataError, LockedError, exit_on_fatal

FORMAT = 1
INTERRUPTED = 130
LOSS_WORTH_SAYING = 0.01


@dataclass(frozen=True)
class Job:
    """One output and everything that decides its bytes."""

    prefix: Path
    sources: list[documents.Source]
    key: str
    append_eod: bool
    tokenizer: Tokenizer
    asked: Asked
    max_document_bytes: int = documents.MAX_DOCUMENT_BYTES

    @property
    def parts(self) -> Path:
        """Folder of the finished shards."""
        return Path(f"{self.prefix}.parts")

    @property
    def report(self) -> Path:
        """Path of the JSON report."""
        return Path(f"{self.prefix}.report.json")

    def settings_sha256(self) -> str:
        """Hash over inputs (path, size, time of change), tokenizer and options."""
        inputs = [(str(source.path), source.size, source.mtime_ns) for source in self.sources]
        settings = [FORMAT, self.key, self.append_eod, self.tokenizer.fingerprint, inputs]
        settings += self.asked.changes_documents
        if self.max_document_bytes != documents.MAX_DOCUMENT_BYTES:
            settings += [self.max_document_bytes]
        return hashlib.sha256(json.dumps(settings).encode()).hexdigest()


def prepare(job: Job, args: argparse.Namespace, skipped: documents.Skipped) -> dict:
    """Runs a job to its end; returns the report."""
    started = time.monotonic()
    make_folder(job.prefix.parent)
    with locked(job):
        done = finished_report(job, args.overwrite)
        if done is not None:
            return {**done, "already_done": True}
        plan = shards.plan(job.sources)
        recipe = shards.Recipe(job.parts, job.key, job.append_eod, job.max_document_bytes)
        facts, kept = make_shards(job, recipe, plan, args)
        total = shards.total_facts(facts)
        skipped.merge(total.skipped)
        total.skipped = skipped
        if not total.tokens:
            raise documents.nothing_found(skipped, job.key)
        hashes = join_shards(job, facts, total)
        report = make_report(job, total, hashes)
        seconds = round(time.monotonic() - started, 3)
        report["run"] = {"seconds": seconds, "workers": args.workers, "kept_shards": kept}
        write_json(job.report, report)
        shutil.rmtree(job.parts)
    return report


def make_shards(
    job: Job, recipe: shards.Recipe, plan: list[list[documents.Piece]], args: argparse.Namespace
) -> tuple[list[shards.ShardFacts], int]:
    """Facts of all shards in order, and how many an earlier run finished."""
    if not job.asked.executor:
        return run_shards(recipe, plan, job.tokenizer, args)
    from data.executors.run import run_shards_on  # datatrove is not needed without it

    return run_shards_on(job.asked, recipe, plan, job.tokenizer, args)


@contextmanager
def locked(job: Job) -> Iterator[None]:
    """One process a prefix: a second one is refused, a dead one leaves no lock."""
    path = job.prefix.with_name(f".{job.prefix.name}.lock")
    with disk_errors(path), open(path, "w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LockedError(
                "another python -m data.prepare writes this --output",
                do="wait for it or choose another",
                path=job.prefix,
            ) from None
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def finished_report(job: Job, overwrite: bool) -> dict | None:
    """The report where this output is already there; else makes the folder of shards ready.

    Refuses to touch an output, or tokenized shards, that other settings made.
    """
    settings = job.settings_sha256()
    if not overwrite and (report := report_of_finished(job, settings)) is not None:
        shutil.rmtree(job.parts, ignore_errors=True)
        return report
    begun = read_json(job.parts / "settings.json") or {}
    if begun.get("settings_sha256") == settings:
        return None
    made = [path for path in (*indexed.paths_of(job.prefix), job.report) if path.exists()]
    if any(facts.documents for facts in shards.finished_shards(job.parts).values()):
        made.append(job.parts)
    if made and not overwrite:
        raise DataError(
            "--output was made from other inputs, options or tokenizer, or is not whole",
            do="choose another --output or add --overwrite",
            path=made[0],
        )
    if job.parts.exists():
        shutil.rmtree(job.parts)
    make_folder(job.parts)
    write_json(job.parts / "settings.json", {"settings_sha256": settings})
    return None


def report_of_finished(job: Job, settings: str) -> dict | None:
    """The report, where it and the pair belong to these settings and to each other."""
    report = read_json(job.report) or {}
    bin_path, idx_path = indexed.paths_of(job.prefix)
    if report.get("settings_sha256") != settings or not (bin_path.exists() and idx_path.exists()):
        return None
    whole = sha256_of(idx_path) == report.get("idx_sha256") and spot_sha256(bin_path) == report.get(
        "spot_sha256"
    )
    return report if whole else None


def join_shards(
    job: Job, all_facts: list[shards.ShardFacts], total: shards.ShardFacts
) -> dict[str, str]:
    """Writes the pair from the shards, ``.bin`` first; returns both hashes."""
    bin_path, idx_path = indexed.paths_of(job.prefix)
    require_space(bin_path, total.bin_bytes + total.documents * 20)
    digest = hashlib.sha256()
    with atomic_file(bin_path, total.bin_bytes) as stream:
        for facts in all_facts:
            with open(shards.shard_paths(job.parts, facts.shard)[0], "rb") as part:
                while chunk := part.read(HASH_CHUNK_BYTES):
                    digest.update(chunk)
                    stream.write(chunk)
    lengths = np.concatenate(
        [
            np.fromfile(shards.shard_paths(job.parts, facts.shard)[1], dtype="<i8")
            for facts in all_facts
        ]
    )
    with atomic_file(idx_path) as stream:
        indexed.write_index(stream, lengths, indexed.token_dtype(job.tokenizer.vocab_size))
    return {"bin_sha256": digest.hexdigest(), "idx_sha256": sha256_of(idx_path)}


def make_report(job: Job, total: shards.ShardFacts, hashes: dict[str, str]) -> dict:
    """The part of PREFIX.report.json that every run of a job writes alike."""
    bin_path, _ = indexed.paths_of(job.prefix)
    return {
        "format": FORMAT,
        "settings_sha256": job.settings_sha256(),
        "inputs": len(job.sources),
        "input_bytes": sum(source.size for source in job.sources),
        "documents": total.documents,
        "tokens": total.tokens,
        "bytes": total.text_bytes,
        "represented_bytes": total.piece_bytes,
        "represented_by": piece_bytes.COUNTED_BY,
        "bytes_per_token": round(total.text_bytes / total.tokens, 4),
        "skipped": total.skipped.counts,
        "skipped_examples": total.skipped.examples,
        "min_token_id": total.smallest_id,
        "max_token_id": total.largest_id,
        "vocab_size": job.tokenizer.vocab_size,
        "eod": job.tokenizer.eod,
        "append_eod": job.append_eod,
        "filters": list(job.asked.filters),
        "dedup": job.asked.dedup,
        "dtype": indexed.token_dtype(job.tokenizer.vocab_size).name,
        "tokenizer_fingerprint": job.tokenizer.fingerprint,
        "bin_bytes": total.bin_bytes,
        "spot_sha256": spot_sha256(bin_path),
        **hashes,
    }


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = CommandLine("python -m data.prepare", __doc__)
    made.add_argument(
        "--input",
        nargs="+",
        required=True,
        type=Path,
        metavar="PATH",
        help="files and folders of text",
    )
    made.add_argument(
        "--output",
        "--output-prefix",
        required=True,
        type=Path,
        metavar="PREFIX",
        help="path without extension; what --data-path takes",
    )
    add_document_flags(made)
    made.add_argument(
        "--append-eod",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="end each document with the tokenizer's end-of-document id (wanted for pre-training)",
    )
    made.add_argument(
        "--workers",
        type=number("Parts"),
        metavar="N",
        help="processes (default: the machine's cores; slurm and ray: no limit); the output does "
        "not depend on it",
    )
    made.add_argument(
        "--overwrite", action="store_true", help="replace an output that has other settings"
    )
    add_tokenizer_flags(made)
    add_executor_flags(made)
    return made


def job_of(args: argparse.Namespace) -> tuple[Job, documents.Skipped]:
    """The job that the flags describe, and the files left out by name."""
    asked = asked_of(args)
    sources, skipped = documents.find_sources(args.input)
    key = documents.single_key(args.json_keys)
    tokenizer = tokenizer_of(args)
    prefix, limit = args.output.absolute(), args.max_document_bytes
    return Job(prefix, sources, key, args.append_eod, tokenizer, asked, limit), skipped


def main(argv: list[str] | None = None) -> None:
    """Entry point of ``python -m data.prepare``."""
    args = parser().parse_args(argv)
    job, skipped = job_of(args)
    try:
        report = prepare(job, args, skipped)
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from the finished shards", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None
    left_out = ", ".join(
        f"{count} {reason} (first: {report['skipped_examples'][reason][0]})"
        for reason, count in report["skipped"].items()
    )
    state = "unchanged" if report.get("already_done") else "written"
    print(
        f"{args.output}.bin {state}: documents={report['documents']} tokens={report['tokens']} "
        f"bytes={report['bytes']} skipped: {left_out or 'nothing'}"
    )
    share = report["represented_bytes"] / max(1, report["bytes"])
    if abs(share - 1) > LOSS_WORTH_SAYING:
        print(
            f"this tokenizer does not keep the text: its ids stand for {100 * share:.1f}% of the "
            "bytes (a normalizer, white space that it drops, or words that it does not know)"
        )


if __name__ == "__main__":
    with exit_on_fatal():
        main(sys.argv[1:])
