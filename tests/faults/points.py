"""Named points of a run, and how a fault is put there from outside.

Three ways, none of which needs a line in the program:

    audit     Python's own audit events (open, os.rename, ...) matched by path: whoever writes the
              manifest, in whatever thread or child process, is caught in the act
    wrap      a function by dotted name, before or after its nth call
    bytes     RLIMIT_FSIZE with the default SIGXFSZ: the kernel ends the process at byte b of a file
"""

from __future__ import annotations

import functools
import importlib
import re
import resource
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Point:
    """Where: an audit event with a path, or a function by dotted name."""

    wrap: str = ""
    """``module:attribute.path``."""
    after: bool = False
    """Act when the function has returned instead of before it is called."""
    event: str = ""
    """Audit event, with ``path`` searched in the path that it acts on (for os.rename: the new)."""
    path: str = ""
    writes: bool = False
    """Of `open` events only those that write."""
    per_step: bool = True
    """Counted from the step of the fault on; else from the start of the process."""


SAVE = "megatron_ext.checkpoint.store:Checkpointer.save"
POINTS: dict[str, Point] = {
    "import": Point(wrap="pretrain_moe:main", per_step=False),
    "rendezvous": Point(wrap="torch.distributed:init_process_group", per_step=False),
    "groups": Point(wrap="megatron.core.parallel_state:initialize_model_parallel", per_step=False),
    "index build": Point(event="open", path=r"\.npy", writes=True, per_step=False),
    "load": Point(wrap="megatron_ext.checkpoint.store:Checkpointer.load", per_step=False),
    "loaded": Point(
        wrap="megatron_ext.checkpoint.store:Checkpointer.load", after=True, per_step=False
    ),
    "forward": Point(wrap="megatron_ext.train.step:forward_step"),
    "backward": Point(wrap="megatron.core.pipeline_parallel.schedules:backward_step"),
    "all-reduce": Point(wrap="torch.distributed:all_reduce"),
    "before optimizer": Point(wrap="optimizer:step"),
    "after optimizer": Point(wrap="optimizer:step", after=True),
    "snapshot": Point(wrap=SAVE),
    "staged": Point(wrap=SAVE, after=True),
    "shard open": Point(event="open", path=r"(\.safetensors|\.distcp)", writes=True),
    "shard byte": Point(wrap=SAVE),
    "before manifest": Point(event="open", path=r"(manifest|state)\.json", writes=True),
    "before rename": Point(event="os.rename", path=r"/step_\d+/?$"),
    "before latest": Point(event="os.rename", path=r"/latest$"),
    "before prune": Point(event="os.rename", path=r"/\.pruned_step_\d+"),
    "during prune": Point(event="shutil.rmtree", path=r"/\.pruned_step_\d+"),
    "evaluate": Point(wrap="megatron_ext.train.loop:evaluate"),
    "teardown": Point(wrap="megatron_ext.mesh.groups:stop", per_step=False),
}
RANK_ZERO = ("index build", "before manifest", "before rename", "before latest")
RANK_ZERO += ("before prune", "during prune")
"""Points that only rank 0 reaches."""


def find(dotted: str) -> tuple[Any, str]:
    """(owner, attribute name) of ``module:attribute.path``."""
    module, _, path = dotted.partition(":")
    owner = importlib.import_module(module)
    *parents, name = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    return owner, name


def wrap(owner: Any, name: str, action: Callable[[], None], after: bool = False) -> None:
    """Calls ``action`` before, or after, each call of ``owner.name``."""
    inner = getattr(owner, name)

    @functools.wraps(inner)
    def outer(*args: Any, **settings: Any) -> Any:
        if not after:
            action()
        result = inner(*args, **settings)
        if after:
            action()
        return result

    setattr(owner, name, outer)


def watch(point: Point, action: Callable[[], None]) -> None:
    """Calls ``action`` just before each file operation of the point, in any thread."""
    pattern = re.compile(point.path)
    names = ("os.rename", "os.link") if point.event == "os.rename" else (point.event,)

    def hook(event: str, args: tuple) -> None:
        if event not in names:
            return
        target = args[1] if event in ("os.rename", "os.link") else args[0]
        if not isinstance(target, str | bytes) and not hasattr(target, "__fspath__"):
            return
        if point.writes and not _is_write(args):
            return
        if pattern.search(str(target)):
            action()

    sys.addaudithook(hook)


def _is_write(args: tuple) -> bool:
    """Of the arguments of an `open` event: (path, mode, flags)."""
    mode, flags = args[1], args[2]
    if isinstance(mode, str):
        return any(letter in mode for letter in "wax+")
    return isinstance(flags, int) and bool(flags & 3)


def end_at_byte(limit: int) -> None:
    """From now on the kernel ends this process when it writes beyond ``limit`` bytes of a file."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
