"""The limits of this process, in the words of a shell: which of them is why something failed.

A limit of addresses (ulimit -v, or -d for data) makes every library fail in its own way: an import
that maps no segment, a MemoryError, a thread that does not start, std::terminate. So not the error
is looked at but how much of the limit is used up.
"""

from __future__ import annotations

import ctypes
import os
import re
import resource
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

GIB = 1 << 30
LEAST = 2 * GIB
"""Addresses of the smallest rank on a CPU: torch and megatron-core imported, 8 MB of weights, gloo.
Measured on a two-core machine: 1.5 to 2.4 GiB fail at different places, 2.6 suffice."""
LOW = 16 * GIB
"""From here on a rank that is killed is not blamed on the limit."""
ASKED_AT_ONCE = GIB
"""The largest piece of addresses that a failed call may have wanted."""
RAISE = "ulimit -v unlimited, or ask whoever set the limit (limits.conf, the batch system)"
_OF_MEMORY = (("-v", resource.RLIMIT_AS, "VmPeak"), ("-d", resource.RLIMIT_DATA, "VmData"))


def _soft(kind: int) -> int | None:
    soft = resource.getrlimit(kind)[0]
    return None if soft == resource.RLIM_INFINITY else soft


def memory_limit() -> tuple[str, int] | None:
    """(`ulimit -v is N KiB`, bytes) of the lowest limit of memory, None without any."""
    found = [(_soft(kind), option) for option, kind, _ in _OF_MEMORY]
    known = [(limit, f"ulimit {option} is {limit >> 10} KiB") for limit, option in found if limit]
    return min(known)[::-1] if known else None


def low_memory_limit() -> str:
    """The lowest limit of memory in words where a rank may have died of it, "" elsewhere."""
    found = memory_limit()
    return found[0] if found is not None and found[1] < LOW else ""


def used_up() -> str:
    """Which limit of memory this process has (nearly) used up, in words; "" where none."""
    with suppress(OSError):
        status = Path("/proc/self/status").read_text()
        for option, kind, field in _OF_MEMORY:
            limit, held = _soft(kind), re.search(rf"{field}:\s*(\d+) kB", status)
            if limit and held and int(held[1]) * 1024 > limit - ASKED_AT_ONCE:
                return f"ulimit {option} is {limit >> 10} KiB, {held[1]} KiB of it are used"
    return ""


def file_limit() -> str:
    """`ulimit -f is N KiB`; "" without one."""
    limit = _soft(resource.RLIMIT_FSIZE)
    return "" if limit is None else f"ulimit -f is {limit >> 10} KiB"


_handlers: list[Callable[[], None]] = []  # C++ keeps a pointer only


def speak_before_terminate(rank: int, code: int) -> None:
    """Where memory is limited so low that it may be the reason: std::terminate says so in one FATAL
    line and leaves with `code`, instead of "terminate called" and an abort.
    """
    limit = low_memory_limit()
    if not limit:
        return
    what = f"a library of C++ gave up: {limit}, which may not suffice"
    line = f"FATAL {code} rank={rank} what={what} do={RAISE}\n".encode()

    @ctypes.CFUNCTYPE(None)
    def speak() -> None:
        os.write(2, line)
        os._exit(code)

    with suppress(OSError, AttributeError):
        ctypes.CDLL("libstdc++.so.6")._ZSt13set_terminatePFvvE(speak)
        _handlers.append(speak)
