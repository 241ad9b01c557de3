"""How the background threads of the ranks tell rank 0 what they did: small files, no collective.

    DIR/.reports_step_00000100_<id>/written_3.json    {"bytes": ..., "hash": ..., "blocks": ...}
    DIR/.reports_step_00000100_<id>/verified_3.json   {"bytes": ..., "seconds": ...}

A rank that is gone writes none, and nobody's main thread waits for it. All ranks see the folder,
since they all write into DIR.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_ext.checkpoint import folder

FIRST_WAIT_S, LONGEST_WAIT_S = 0.002, 0.2


class Failure(Exception):  # noqa: N818 - carries a report
    """Why reports did not come together, in one line."""


class FailedThere(Failure):
    """A rank reported that it failed; it knows more than this line."""


class Reports:
    """The reports of one save, under `directory`."""

    def __init__(self, directory: Path, step: int, identity: str) -> None:
        self.path = directory / f".reports_{folder.step_name(step)}_{identity}"

    def begin(self) -> None:
        """Rank 0 makes the folder before anybody writes into it. Raises OSError."""
        os.mkdir(self.path)

    def add(self, kind: str, rank: int, report: dict[str, Any]) -> None:
        """A report appears whole. Raises OSError."""
        target = self.path / f"{kind}_{rank}.json"
        temporary = target.with_suffix(".part")
        temporary.write_text(json.dumps(report))
        os.replace(temporary, target)

    def failed(self, rank: int, what: str) -> None:
        """This rank cannot go on. Raises OSError."""
        self.add("failed", rank, {"what": what})

    def gather(
        self, kind: str, world: int, stop: threading.Event, limit_s: float
    ) -> list[dict[str, Any]]:
        """One report of this kind from every rank, in rank order; waits for them. Raises Failure
        for a rank that failed, that is silent for `limit_s`, or when `stop` is set.
        """
        found: dict[int, dict] = {}
        deadline, pause = time.monotonic() + limit_s, FIRST_WAIT_S
        while True:
            before = len(found)
            self._look(kind, found)
            if len(found) == world:
                return [found[rank] for rank in range(world)]
            if len(found) > before:
                deadline, pause = time.monotonic() + limit_s, FIRST_WAIT_S
            if time.monotonic() > deadline:
                silent = sorted(set(range(world)) - set(found))
                raise Failure(f"no news from the checkpoint writer of ranks {silent[:8]}")
            if stop.wait(pause):
                raise Failure("the run ended before the checkpoint was written")
            pause = min(2 * pause, LONGEST_WAIT_S)

    def _look(self, kind: str, found: dict[int, dict]) -> None:
        for name in os.listdir(self.path):
            stem, _, ending = name.partition(".")
            what, _, rank = stem.rpartition("_")
            if ending != "json" or what not in (kind, "failed"):
                continue
            if what == "failed":
                raise FailedThere(json.loads((self.path / name).read_text())["what"])
            if int(rank) not in found:
                found[int(rank)] = json.loads((self.path / name).read_text())

    def remove(self) -> None:
        """Rank 0, when the save is over."""
        shutil.rmtree(self.path, ignore_errors=True)


def quietly(action: Callable[[], None]) -> OSError | None:
    """Run something that a full or vanished disk may refuse; the error instead of raising it."""
    try:
        action()
    except OSError as error:
        return error
    return None
