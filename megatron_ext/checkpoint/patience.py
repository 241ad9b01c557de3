"""Reading from a disk that refuses: tried again, then said; the checkpoint itself is left alone.

A stale handle of a file server, an error of a device or a missing permission says nothing about the
bytes that were written, so it neither damages a checkpoint nor makes an older one the right one.
"""

from __future__ import annotations

import errno
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from megatron_ext.errors import DiskError

T = TypeVar("T")
PAUSES_S = (0.2, 1.0, 3.0)
"""Between the first try and the last."""
CERTAIN = (errno.ENOENT, errno.ELOOP, errno.ENOTDIR)
"""What trying again does not change: no such file, or a link in its place."""

_log = logging.getLogger(__name__)


def patiently(read: Callable[[], T], path: Path) -> T:
    """What `read` returns. Raises its OSError where that is CERTAIN, and DiskError (74) where the
    disk still refuses at the last try.
    """
    for pause_s in (*PAUSES_S, None):
        try:
            return read()
        except OSError as error:
            reason = os.strerror(error.errno) if error.errno else str(error)
            if error.errno in CERTAIN:
                raise
            if pause_s is None:
                raise DiskError(
                    f"checkpoint cannot be read: {path.name}: {reason}",
                    do="it is left as it is: start again when the disk can be read;"
                    " --ckpt-step names an older one",
                    path=path,
                ) from error
            _log.warning("%s cannot be read (%s): tried again in %g s", path, reason, pause_s)
        time.sleep(pause_s)
    raise AssertionError("the last try returns or raises")
