"""Limits of this process that would end a run in the middle: checked before it starts."""

from __future__ import annotations

import resource

from megatron_ext import ulimits
from megatron_ext.errors import ResourceError, current_rank

FILES = 512
"""Open files of a rank: its modules, sockets to the ranks of each group, data, checkpoints."""

ENOUGH_FILES = 65_536


def check_limits() -> None:
    """Raise the soft limit of open files to the hard one. Raises ResourceError (69) where that, or
    the limit of memory, is less than a rank needs.
    """
    memory = ulimits.memory_limit()
    if memory is not None and memory[1] < ulimits.LEAST:
        raise ResourceError(
            f"{memory[0]}: a rank needs {ulimits.LEAST >> 10} KiB of addresses at least",
            do=ulimits.RAISE,
        )
    ulimits.speak_before_terminate(current_rank(), ResourceError.code)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    enough = ENOUGH_FILES if hard == resource.RLIM_INFINITY else min(hard, ENOUGH_FILES)
    if soft != resource.RLIM_INFINITY and soft < enough:
        resource.setrlimit(resource.RLIMIT_NOFILE, (enough, hard))
    if hard != resource.RLIM_INFINITY and hard < FILES:
        raise ResourceError(
            f"ulimit -n is {hard}: a rank opens up to {FILES} files",
            do=f"ulimit -n {2 * FILES}, or ask whoever set the limit (limits.conf, LimitNOFILE=)",
        )
