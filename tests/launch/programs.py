"""Start the programs of launch/ as a user does, and look at what they leave."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
OF_A_LAUNCH = "RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT".split()


def environment() -> dict[str, str]:
    """This process's, with its own interpreter first and nothing of a launch around it."""
    kept = {name: value for name, value in os.environ.items() if name not in OF_A_LAUNCH}
    path = f"{Path(sys.executable).parent}{os.pathsep}{kept.get('PATH', '')}"
    return {**kept, "PATH": path, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}


def run(command: Sequence[object], timeout_s: float = 150) -> subprocess.CompletedProcess[str]:
    """The finished command, with its output as text."""
    return subprocess.run(
        [str(word) for word in command],
        cwd=ROOT,
        env=environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def launch(num_ranks: int, *flags: object) -> subprocess.CompletedProcess[str]:
    """`bash launch/run.sh num_ranks flags...`, finished."""
    return run(["bash", ROOT / "launch/run.sh", num_ranks, *flags])


@contextmanager
def launched(num_ranks: int, *flags: object) -> Iterator[subprocess.Popen[str]]:
    """The same, running; killed at the end of the block if it still does."""
    words = ["bash", ROOT / "launch/run.sh", num_ranks, *flags]
    process = subprocess.Popen(
        [str(word) for word in words],
        cwd=ROOT,
        env=environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            process.send_signal(signal.SIGINT)
        process.communicate(timeout=20)


def wait_for(path: Path, text: str, timeout_s: float = 90) -> None:
    """Return when the file holds `text`."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if path.exists() and text in path.read_text():
            return
        time.sleep(0.1)
    raise AssertionError(f"no {text!r} in {path} after {timeout_s} s")


def children_of(pid: int) -> list[int]:
    """Ids of the living processes that a process has started, oldest first."""
    path = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(word) for word in path.read_text().split()] if path.exists() else []


def processes_of(word: str) -> list[int]:
    """Ids of the living processes whose command line holds `word`, except this one and zombies."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            if word.encode() in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue  # it ended while we looked
    return found


def all_gone(word: str, timeout_s: float) -> bool:
    """True as soon as no process has `word` in its command line."""
    deadline = time.monotonic() + timeout_s
    while processes_of(word):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def fatal_lines(text: str) -> list[str]:
    """The FATAL lines of a program's stderr."""
    return [line for line in text.splitlines() if re.match(r"FATAL \d+ ", line)]
