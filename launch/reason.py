"""Where and why a run ended, from the files it leaves: exit_reason.json, metrics.jsonl, ckpts."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import time
from contextlib import suppress
from pathlib import Path

from megatron_ext.checkpoint import identity
from megatron_ext.errors import read_exit_reason, write_exit_reason
from megatron_ext.state_files import opener


def last_step(run: Path) -> int | None:
    """The step of the last whole line of RUN/metrics.jsonl that has one, None without any."""
    try:
        with open(run / "metrics.jsonl", "rb", opener=opener) as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 65_536))
            lines = file.read().splitlines()
    except OSError:
        return None
    for line in reversed(lines):
        with suppress(ValueError, TypeError):
            record = json.loads(line)
            if "lm_loss" in record:
                return int(record["step"])
    return None


def newest_checkpoint(save: Path) -> int:
    """The step of the newest finished checkpoint in `save`, -1 without one."""
    names = (re.fullmatch(r"step_(\d{8,})", path.name) for path in save.glob("step_*"))
    return max((int(name[1]) for name in names if name), default=-1)


class Reason:
    """Why one attempt ended: RUN/logs/exit_reason.LAUNCH.attempt_N.json until the launch ends, then
    RUN/exit_reason.json, if this launch held the folder. Another launch into the same folder, which
    is refused, shares no file with it and leaves none.
    """

    def __init__(self, run: Path, attempt: str, launch: str) -> None:
        self._run, self._launch = run, launch
        self.path = run / "logs" / f"exit_reason.{launch}.attempt_{attempt}.json"

    def prepare(self) -> None:
        """Make the folder; one that cannot be made is the program's to report."""
        with suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.unlink(missing_ok=True)

    def holds(self) -> bool:
        """Whether the ranks of this launch have got the run's folder."""
        found = identity.read(self._run)
        return found is not None and found.launch == self._launch

    def read(self) -> dict | None:
        """What the first failing rank wrote."""
        return read_exit_reason(self.path)

    def write(self, code: int, rank: int | None, pid: int, what: str) -> None:
        """For a rank that could not say it: killed, or gone without a word."""
        step = last_step(self._run) if self.holds() else None
        reason = {"code": code, "rank": rank, "step": None if step is None else step + 1}
        where = {"time": time.time(), "host": socket.gethostname(), "pid": pid}
        write_exit_reason({**reason, "what": what, "path": None, "do": "", **where}, self.path)

    def publish(self) -> None:
        """Leave it as RUN/exit_reason.json; nothing where the folder is another run's."""
        with suppress(OSError):
            if self.holds():
                temporary = self._run / f"exit_reason.json.{os.getpid()}"
                shutil.copyfile(self.path, temporary)
                os.replace(temporary, self._run / "exit_reason.json")
            else:
                self.path.unlink()
