"""Is there enough memory? Asked before anything is read."""

from __future__ import annotations

import os
from pathlib import Path

from megatron_ext.errors import DataError


def available_bytes() -> int:
    """Memory that this process may still take: the machine's, or less by its control group."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                free = int(line.split()[1]) * 1024
    except OSError:
        return free
    return min(free, _group_bytes())


def _group_bytes() -> int:
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
    except (OSError, ValueError):
        return 1 << 62
    return 1 << 62 if limit == "max" else max(0, int(limit) - used)


def check_memory(num_bytes: int, what: str, path: Path) -> None:
    """Raises DataError where `num_bytes` are not there."""
    have = available_bytes()
    if num_bytes > have:
        raise DataError(
            f"{what} needs about {num_bytes} bytes of memory, {have} bytes are available",
            do="use a machine with more memory",
            path=path,
        )
