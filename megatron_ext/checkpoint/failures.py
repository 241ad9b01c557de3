"""Saves that failed: which of them are a warning, and when they end the run.

The store: training goes on without that checkpoint, the third failure in a row ends it, and so does
a failed last save. A fast tier (memory, local) is only fast: its failures end nothing, it is named
once when it begins to fail and tried again whenever it is due.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from pathlib import Path

from megatron_ext.errors import Fatal, LockedError
from megatron_ext.mesh.agree import FailedElsewhere

MAX_FAILED_SAVES = 3
_log = logging.getLogger(__name__)


class Failures:
    """The failed saves of a run; `fast`: the folders of its fast tiers."""

    def __init__(self, fast: Collection[Path]) -> None:
        self._fast = frozenset(fast)
        self._failing: set[Path] = set()
        self._in_a_row = 0
        self.last: Fatal | OSError | None = None
        """Why the store's last save failed, where it did."""

    def add(self, step: int, directory: Path, error: Fatal | OSError) -> None:
        """A save into `directory` failed, on all ranks. Raises the error where the run cannot go
        on: the third in a row in the store, or a lease that is lost.
        """
        if getattr(error, "code", None) == LockedError.code:
            raise error
        is_news = not isinstance(error, FailedElsewhere)  # on the rank that found it
        if directory in self._fast:
            if is_news and directory not in self._failing:
                _log.warning(
                    "checkpoint of step %d failed in a fast tier, which is tried again whenever it"
                    " is due; training goes on, saves into --save do not depend on it: %s",
                    step,
                    error,
                )
            self._failing.add(directory)
            return
        self._in_a_row += 1
        if self._in_a_row >= MAX_FAILED_SAVES:
            self.last = None
            raise error
        self.last = error
        if is_news:
            _log.warning("checkpoint of step %d failed, training goes on: %s", step, error)

    def forget(self, directory: Path) -> None:
        """A save into `directory` is on disk."""
        if directory in self._fast:
            self._failing.discard(directory)
        else:
            self._in_a_row, self.last = 0, None

    def raise_last(self) -> None:
        """At the end of a run: raise why the store's last save failed, once."""
        if self.last is not None:
            error, self.last = self.last, None
            raise error
