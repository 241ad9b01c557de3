"""Text to Megatron's ``.bin``/``.idx``, with many processes, resumable, the same bytes every time.

    python -m data.prepare --input corpus/code.jsonl more/ --output tokens/code --append-eod --workers 8 \\
        --tokenizer-type SentencePieceTokenizer --tokenizer-model corpus/bpe.model

writes tokens/code.bin, tokens/code.idx and tokens/code.report.json.  Inputs are files and folders of .txt .md .py
.jsonl .parquet and .gz/.zst of those.  Killed at any moment, the same command goes on where it was: finished shards
wait in tokens/code.parts.  Files appear under their final names only when they are complete.  Finished with the same
settings already: nothing is done; with other settings: refused unless --overwrite.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from data import documents, indexed, shards
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
from megatron_ext.errors import ConfigError, DataError, Fatal, LockedError, exit_on_fatal

FORMAT = 1
PARENT_CHECK_S = 1.0


@dataclass(frozen=True)
class Job:
    """One output and everything that decides its bytes."""

    prefix: Path
    sources: list[documents.Source]
    key: str
    append_eod: bool
    tokenizer: Tokenizer

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
        facts = run_shards(job, plan, args)
        total = shards.total_facts(facts)
        skipped.merge(total.skipped)
        total.skipped = skipped
        if not total.tokens:
            raise documents.nothing_found(skipped, job.key)
        hashes = join_shards(job, facts, total)
        report = make_report(job, total, hashes, time.monotonic() - started, args.workers)
        write_json(job.report, report)
        shutil.rmtree(job.parts)
    return report


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
        yield
        path.unlink(missing_ok=True)


def finished_report(job: Job, overwrite: bool) -> dict | None:
    """The report where the output is already there with these settings; refuses to touch anything else's."""
    outputs = [path for path in (*indexed.paths_of(job.prefix), job.report) if path.exists()]
    settings = job.settings_sha256()
    started = read_json(job.parts / "settings.json") or {}
    same_parts = started.get("settings_sha256") == settings
    report = read_json(job.report)
    if report and report.get("settings_sha256") == settings and len(outputs) == 3 and not overwrite:  # noqa: PLR2004
        bin_path, idx_path = indexed.paths_of(job.prefix)
        if sha256_of(idx_path) == report.get(
            "idx_sha256"
        ) and bin_path.stat().st_size == report.get("bin_bytes"):
            shutil.rmtree(job.parts, ignore_errors=True)
            return report
    if not overwrite and (
        (outputs and not same_parts) or (job.parts.exists() and started and not same_parts)
    ):
        raise DataError(
            "--output exists and was made from other inputs, options or tokenizer, or is not whole",
            do="choose another --output or add --overwrite",
            path=outputs[0] if outputs else job.parts,
        )
    if job.parts.exists() and not same_parts:
        shutil.rmtree(job.parts)
    make_folder(job.parts)
    write_json(job.parts / "settings.json", {"settings_sha256": settings})
    return None


def run_shards(
    job: Job, plan: list[list[documents.Piece]], args: argparse.Namespace
) -> list[shards.ShardFacts]:
    """Facts of all shards in order; finished ones are kept, the others run on ``--workers`` processes."""
    done = shards.finished_shards(job.parts)
    total_bytes = sum(source.size for source in job.sources)
    need = sum(facts.bin_bytes for facts in done.values())
    require_space(job.parts, max(0, total_bytes // 4 - need))
    progress = Progress(len(plan), done)
    open_shards = [shard for shard in range(len(plan)) if shard not in done]
    runs = (
        run_here(job, plan, open_shards)
        if args.workers == 1
        else run_pool(job, plan, open_shards, args)
    )
    for facts in runs:
        shards.append_to_journal(job.parts, facts)
        done[facts.shard] = facts
        progress.show()
    progress.end()
    return [done[shard] for shard in range(len(plan))]


def run_here(
    job: Job, plan: list[list[documents.Piece]], open_shards: list[int]
) -> Iterator[shards.ShardFacts]:
    """Shards one after the other in this process."""
    for shard in open_shards:
        yield shards.write_shard(
            job.parts, shard, plan[shard], job.tokenizer, job.key, job.append_eod
        )


def run_pool(
    job: Job, plan: list[list[documents.Piece]], open_shards: list[int], args: argparse.Namespace
) -> Iterator[shards.ShardFacts]:
    """Shards as worker processes finish them."""
    workers = min(args.workers, max(1, len(open_shards)))
    pool = ProcessPoolExecutor(workers, get_context("spawn"), Worker.start, (args, os.getpid()))
    try:
        tasks = [
            pool.submit(Worker.run, job.parts, shard, plan[shard], job.key, job.append_eod)
            for shard in open_shards
        ]
        for task in as_completed(tasks):
            yield task.result()
    except BrokenProcessPool:
        raise Fatal(
            "a worker process died (killed, or out of memory)",
            do="run the same command again: finished shards are kept; use fewer --workers if memory is short",
            path=job.parts,
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


class Worker:
    """The state of one worker process: its tokenizer, loaded once."""

    tokenizer: Tokenizer

    @classmethod
    def start(cls, args: argparse.Namespace, parent: int) -> None:
        """Loads the tokenizer and ends with the parent, also when that is killed."""
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
        cls.tokenizer = tokenizer_of(args)

    @classmethod
    def run(
        cls, folder: Path, shard: int, pieces: list[documents.Piece], key: str, append_eod: bool
    ) -> shards.ShardFacts:
        """One shard."""
        return shards.write_shard(folder, shard, pieces, cls.tokenizer, key, append_eod)


def _end_with(parent: int) -> None:
    """Ends this process soon after ``parent`` has gone."""
    while os.getppid() == parent:
        time.sleep(PARENT_CHECK_S)
    os._exit(1)


class Progress:
    """A line that counts shards, on a terminal only."""

    def __init__(self, total: int, done: dict[int, shards.ShardFacts]):
        self.total, self.done, self.started = total, done, time.monotonic()
        self.kept = len(done)
        if self.kept:
            print(f"resume: {self.kept} of {total} shards are finished", file=sys.stderr)

    def show(self) -> None:
        """Draws the line again."""
        if not sys.stderr.isatty():
            return
        finished = len(self.done)
        tokens = sum(facts.tokens for facts in self.done.values())
        rate = (finished - self.kept) / max(1e-9, time.monotonic() - self.started)
        left_s = (self.total - finished) / max(1e-9, rate)
        bar = "#" * (30 * finished // self.total)
        print(
            f"\r[{bar:<30}] {finished}/{self.total} shards, {tokens / 1e6:.1f} Mtokens, {left_s:.0f} s left ",
            end="",
            file=sys.stderr,
            flush=True,
        )

    def end(self) -> None:
        """Leaves the line."""
        if sys.stderr.isatty():
            print(file=sys.stderr)


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


def make_report(
    job: Job, total: shards.ShardFacts, hashes: dict[str, str], seconds: float, workers: int
) -> dict:
    """The content of PREFIX.report.json; all but ``run`` and the file's time is the same for every run."""
    bin_path, _ = indexed.paths_of(job.prefix)
    return {
        "format": FORMAT,
        "settings_sha256": job.settings_sha256(),
        "inputs": len(job.sources),
        "input_bytes": sum(source.size for source in job.sources),
        "documents": total.documents,
        "tokens": total.tokens,
        "bytes": total.text_bytes,
        "represented_bytes": total.represented_bytes,
        "bytes_per_token": round(total.text_bytes / total.tokens, 4),
        "skipped": total.skipped.counts,
        "skipped_examples": total.skipped.examples,
        "min_token_id": total.smallest_id,
        "max_token_id": total.largest_id,
        "vocab_size": job.tokenizer.vocab_size,
        "eod": job.tokenizer.eod,
        "append_eod": job.append_eod,
        "dtype": indexed.token_dtype(job.tokenizer.vocab_size).name,
        "tokenizer_fingerprint": job.tokenizer.fingerprint,
        "bin_bytes": total.bin_bytes,
        "bin_mtime_ns": bin_path.stat().st_mtime_ns,
        "spot_sha256": spot_sha256(bin_path),
        **hashes,
        "run": {
            "seconds": round(seconds, 3),
            "workers": workers,
            "megabytes_per_s": round(total.text_bytes / 1e6 / max(seconds, 1e-9), 3),
        },
    }


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m data.prepare",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
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
    made.add_argument(
        "--json-keys",
        "--json-key",
        nargs="+",
        default=["text"],
        metavar="KEY",
        help="the key of the text in jsonl lines, or the parquet column (default text)",
    )
    made.add_argument(
        "--append-eod",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="end each document with the tokenizer's end-of-document id (wanted for pre-training)",
    )
    made.add_argument(
        "--workers",
        type=int,
        default=os.cpu_count() or 1,
        metavar="N",
        help="processes (default: the machine's cores); the output does not depend on it",
    )
    made.add_argument(
        "--overwrite", action="store_true", help="replace an output that has other settings"
    )
    add_tokenizer_flags(made)
    return made


def job_of(args: argparse.Namespace) -> tuple[Job, documents.Skipped]:
    """The job that the flags describe, and the files left out by name."""
    if args.workers < 1:
        raise ConfigError(
            f"--workers {args.workers} must be 1 or more", do="leave it out to use all cores"
        )
    sources, skipped = documents.find_sources(args.input)
    key = documents.single_key(args.json_keys)
    return Job(args.output.absolute(), sources, key, args.append_eod, tokenizer_of(args)), skipped


def main(argv: list[str] | None = None) -> None:
    """Entry point of ``python -m data.prepare``."""
    args = parser().parse_args(argv)
    job, skipped = job_of(args)
    report = prepare(job, args, skipped)
    left_out = (
        ", ".join(f"{count} {reason}" for reason, count in report["skipped"].items()) or "nothing"
    )
    state = "unchanged" if report.get("already_done") else "written"
    print(
        f"{args.output}.bin {state}: documents={report['documents']} tokens={report['tokens']} "
        f"bytes={report['bytes']} skipped: {left_out}"
    )


if __name__ == "__main__":
    with exit_on_fatal():
        main(sys.argv[1:])
