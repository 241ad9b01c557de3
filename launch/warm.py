"""Ranks forked from a process that has imported everything: a rank starts in milliseconds.

An import of torch and megatron-core costs each rank about 3 s of CPU time; once, in the launcher,
it also serves every later start. The memory of the imported code is shared (copy on write). Only on
the CPU: a CUDA context does not survive a fork, and neither do threads, so a launcher that has any
after the import lets the ranks start by themselves.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import os
import sys
import traceback
from pathlib import Path

from megatron_ext.errors import INTERNAL_BUG
from megatron_ext.mesh.imports import without_collections

MODULES = (
    "pretrain_moe",
    "megatron_ext.mesh.groups",
    "megatron_ext.model.gpt",
    "megatron_ext.optim.build",
    "megatron_ext.train.setup",
    "megatron_ext.train.loop",
)
"""What pretrain_moe.py imports on its way to the first step."""


def can_fork(device: str) -> bool:
    """True where the ranks will surely run on the CPU (`device`: --device) of a Linux machine."""
    has_cuda = any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/dxg").exists()
    return sys.platform == "linux" and (device == "cpu" or (device == "auto" and not has_cuda))


def load() -> bool:
    """Import what a rank needs; True where this process may fork ranks then: it has one thread."""
    with without_collections():
        from megatron_ext.device import start

        start("cpu")
        for name in MODULES:
            importlib.import_module(name)
        gc.collect()  # and frozen on the way out: keeps the shared pages shared
    return len(os.listdir("/proc/self/task")) == 1


def run(flags: list[str]) -> None:
    """The program in a forked rank; does not return."""
    from pretrain_moe import main

    code = 0
    try:
        main(flags)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
        code = INTERNAL_BUG
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)
