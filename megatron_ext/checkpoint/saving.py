"""One save after its state has been handed over: written, published, read back, in the background.

    every rank   write, fsync, report size and hashes; read back, report again
    rank 0       all written -> manifest, rename, `latest`; all read back -> verified, prune

No collective and nothing that waits for another rank runs in the main thread: it only looks at
`phase` and `error`.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_ext.checkpoint import folder, manifest, tensor_file, writer
from megatron_ext.checkpoint.hashes import Damaged, FileHash
from megatron_ext.checkpoint.ledger import Ledger
from megatron_ext.checkpoint.reports import FailedThere, Failure, Reports, quietly
from megatron_ext.checkpoint.spots import Spot
from megatron_ext.checkpoint.staging import Image, Stopped
from megatron_ext.errors import DiskError, Fatal

WRITING, DURABLE, VERIFIED = 0, 1, 2
SILENT_S = 600.0
"""How long rank 0's thread waits for news from any other before the save has failed."""


@dataclass(frozen=True)
class Order:
    """What rank 0 decided when the save began; the same on every rank but the last four."""

    step: int
    identity: str
    directory: Path
    num_bytes: int
    record: dict[str, Any]
    by_rank: list[list[Spot]]
    check_lease: Callable[[], None]
    prune: Callable[[int], list[int]]

    @property
    def writing(self) -> Path:
        """The folder that is being filled."""
        return self.directory / f".writing_{folder.step_name(self.step)}_{self.identity}"


@dataclass
class Save:
    """The save of one step on this rank."""

    order: Order
    image: Image
    rank: int
    world: int
    started: float = field(default_factory=time.perf_counter)
    phase: int = WRITING
    agreed: int = WRITING
    error: Fatal | None = None
    is_elsewhere: bool = False
    stop: threading.Event = field(default_factory=threading.Event)
    changed: threading.Event = field(default_factory=threading.Event)
    thread: threading.Thread | None = None

    def start(self) -> None:
        """Copy and write in threads of this process: they die with it."""
        step = self.order.step
        copy = threading.Thread(
            target=self.image.copy,
            args=(lambda: self.note("staged"),),
            name=f"copy step {step}",
            daemon=True,
        )
        copy.start()
        self.thread = threading.Thread(target=self.run, name=f"save step {step}", daemon=True)
        self.thread.start()

    @property
    def reports(self) -> Reports:
        """Where the ranks tell rank 0."""
        return Reports(self.order.directory, self.order.step, self.order.identity)

    def run(self) -> None:
        """Never raises: `error` and `phase` are for the main thread."""
        try:
            self._run()
        except BaseException as error:
            self._fail(error)
        self.changed.set()

    def _run(self) -> None:
        path = self.order.writing / tensor_file.file_name(self.rank)
        written = writer.write_image(self.image, path)
        descriptor = writer.open_written(path, written)
        try:
            self.reports.add("written", self.rank, written.to_json())
            if self.rank == 0:
                self._publish()
            self.phase = DURABLE
            self.changed.set()
            begin = time.perf_counter()
            count = writer.read_back(path, descriptor, written)
        finally:
            os.close(descriptor)
        report = {"bytes": count, "seconds": round(time.perf_counter() - begin, 3)}
        if self.rank == 0:
            self._settle(report)
        else:  # rank 0 may be done with this save by now, because of another failure
            quietly(lambda: self.reports.add("verified", self.rank, report))
        self.phase = VERIFIED

    def _publish(self) -> None:
        reports = self.reports.gather("written", self.world, self.stop, SILENT_S)
        text = self.describe([FileHash.from_json(report) for report in reports])
        self.order.check_lease()
        folder.publish(self.order.writing, self.order.directory, self.order.step, text)
        self.note("durable")

    def describe(self, written: Sequence[FileHash]) -> bytes:
        """Rank 0: the manifest of the files of all ranks."""
        files, pieces = {}, []
        for rank, (hash_, spots) in enumerate(zip(written, self.order.by_rank)):
            name, places = tensor_file.file_name(rank), tensor_file.arrange(spots)
            files[name] = hash_
            pieces += [(spots[index], name, offset) for index, offset in places.places]
        return manifest.describe(self.order.record, files, iter(pieces))

    def _settle(self, report: dict[str, Any]) -> None:
        """All ranks have read their files back: the save is verified, older ones may go."""
        self.reports.add("verified", 0, report)
        self.reports.gather("verified", self.world, self.stop, SILENT_S)
        self.note("verified")
        self.reports.remove()
        for step in self.order.prune(self.order.step):
            self.note("pruned", of=step)

    def _fail(self, error: BaseException) -> None:
        """Keep the error, tell rank 0, and as rank 0 clean up."""
        is_gone = isinstance(error, FileNotFoundError) or (
            isinstance(error.__cause__, FileNotFoundError)  # found when it was opened to be read
        )
        was_swept = is_gone and not self.reports.path.exists()
        self.is_elsewhere = isinstance(error, FailedThere) or (was_swept and self.rank != 0)
        was_published = self.phase == DURABLE and self.rank == 0
        fatal = self._fatal(error)
        quietly(lambda: self.reports.failed(self.rank, fatal.what))
        if self.rank == 0:
            self.note("failed", error=str(fatal))
            if was_published and isinstance(error, (Damaged, Failure)):
                quietly(self._withdraw)
            self.reports.remove()  # first: who finds its file gone looks here for the reason
            shutil.rmtree(self.order.writing, ignore_errors=True)
        self.error = fatal

    def _withdraw(self) -> None:
        """What was published does not read back: out of the way, `latest` to the one before."""
        directory, step = self.order.directory, self.order.step
        folder.quarantine(directory, step)
        self.note("quarantined")
        older = [s for s in folder.steps(directory) if s < step]
        if older:
            folder.point_at(directory, older[0])

    def _fatal(self, error: BaseException) -> Fatal:
        if isinstance(error, Fatal):
            return error
        if isinstance(error, OSError):
            return folder.disk_error(error, self.order.directory, self.order.num_bytes)
        if isinstance(error, Failure):
            what = str(error)
        elif isinstance(error, Stopped):
            what = "the checkpoint was given up"
        else:
            what = f"the checkpoint writer of rank {self.rank} failed: {error!r}"
        do = "see the rank's log; the previous checkpoint is still the latest"
        return DiskError(what, do=do, path=self.order.directory)

    def note(self, event: str, of: int | None = None, **values: Any) -> None:
        """A line in the ledger; a full disk does not make it worth an error of its own."""
        if self.rank != 0:
            return
        seconds = round(time.perf_counter() - self.started, 3)
        step, ledger = self.order.step if of is None else of, Ledger(self.order.directory)
        size = {} if of is not None else {"bytes": self.order.num_bytes}
        quietly(lambda: ledger.add(event, step, **size, seconds=seconds, **values))

    def give_up(self) -> None:
        """Let the threads end soon; nobody waits for other ranks any more."""
        self.stop.set()
        self.image.stop.set()
