"""Python stacks of all ranks into RUN/logs/rank_R.stack, and which ranks share one.

faulthandler's signal handler is C and needs no GIL: a rank answers while its main thread sits in a
collective or in a regular expression. A stopped process (SIGSTOP) does not answer; its file says
so. Ranks with the same stack of the main thread are one cluster, so that of 1,000 ranks a page is
left to read, and the odd one stands alone (ByteRobust, arXiv 2509.16293).
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import re
import signal
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

SIGNAL = signal.SIGRTMIN + 9
"""A real-time signal that torch, NCCL and the launchers leave alone."""
WAIT_S = 3.0


def stack_path(logs: Path, rank: int) -> Path:
    """Where the stack of a rank is."""
    return logs / f"rank_{rank}.stack"


@contextlib.contextmanager
def answering(path: Path) -> Iterator[None]:
    """Within it, `SIGNAL` makes this process append the stacks of its threads to `path`."""
    with path.open("w") as file:
        faulthandler.register(SIGNAL, file=file, all_threads=True)
        try:
            yield
        finally:
            signal.signal(SIGNAL, signal.SIG_IGN)  # one that is still on its way does not kill
            faulthandler.unregister(SIGNAL)


def ask(pid: int) -> bool:
    """Ask a process of this host for its stacks; False where it is gone."""
    try:
        os.kill(pid, SIGNAL)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def is_whole(text: str) -> bool:
    """True where the stack of the main thread, the last one, is there."""
    return bool(main_stack(text)) and text.endswith("\n")


def wait_for(logs: Path, ranks: list[int], seconds: float = WAIT_S) -> None:
    """Wait until the stacks of `ranks` are written, or until the time is up."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if all(is_whole(_text(stack_path(logs, rank))) for rank in ranks):
            return
        time.sleep(0.05)


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def main_stack(text: str) -> str:
    """The stack of the main thread, without addresses: faulthandler lists it last."""
    blocks = re.split(r"^(?:Current thread|Thread) 0x[0-9a-f]+.*\n", text, flags=re.MULTILINE)
    return blocks[-1].strip() if len(blocks) > 1 else ""


def cluster(texts: Mapping[int, str]) -> list[tuple[list[int], str]]:
    """[(ranks, their stack)], the smallest cluster first: the odd one is on top."""
    found: dict[str, list[int]] = {}
    for rank, text in sorted(texts.items()):
        found.setdefault(main_stack(text) or text.strip(), []).append(rank)
    return sorted(((ranks, stack) for stack, ranks in found.items()), key=lambda one: len(one[0]))


def read_all(logs: Path, ranks: list[int]) -> dict[int, str]:
    """The text of each rank's stack file; "no stack" where there is none."""
    return {rank: _text(stack_path(logs, rank)) or "no stack" for rank in ranks}


def format_clusters(clusters: list[tuple[list[int], str]]) -> str:
    """The clusters as text."""
    parts = []
    for ranks, stack in clusters:
        parts.append(f"{len(ranks)} rank(s): {', '.join(map(str, ranks))}\n{stack}\n")
    return "\n".join(parts)
