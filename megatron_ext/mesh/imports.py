"""Many imports at once, without the garbage collector looking through what they make."""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def without_collections() -> Iterator[None]:
    """Within it nothing is collected; what lives at its end is never looked at again. Without
    effect where megatron-core was imported before: what lives then may be garbage one day.

    torch and megatron-core make some 10^5 objects that stay: looking through them again and again
    is 15% of the CPU time of their import, and each later full collection would take 0.3 s.
    """
    if "megatron.core" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
