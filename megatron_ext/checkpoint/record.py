"""What a checkpoint says about itself, without its tensors; read without torch, so that a launcher
and a dry run can tell whose steps lie in a folder.
"""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

from megatron_ext.checkpoint.hashes import text_hash

MANIFEST = "manifest.json"


def read_record(step: Path) -> dict[str, Any] | None:
    """The manifest of a step's folder as it was written, None where it cannot be read or has not
    the hash of its first line. Whether the step is whole, its loader says.
    """
    try:
        descriptor = os.open(step / MANIFEST, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with os.fdopen(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                return None
            first, rest = file.readline(128), file.read()
        if json.loads(first.rstrip(b",\n") + b"}")["hash"] != text_hash(rest):
            return None
        found = json.loads(b"{" + rest)["manifest"]
        is_sound = isinstance(found["run"], dict) and isinstance(found["step"], int)
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None
    return found if is_sound else None
