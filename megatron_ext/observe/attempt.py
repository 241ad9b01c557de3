"""What only shows a run must not end it: a full or unwritable place for logs is one warning."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from typing import Any

logger = logging.getLogger(__name__)


class Attempts:
    """Runs writes of named places; a place that fails is given up, with one warning.

    Only OSError (no space, no permission, a broken pipe) is caught: other errors are bugs.
    """

    def __init__(self) -> None:
        self._failed: set[str] = set()

    def __call__(self, place: str, write: Callable, *args: Any, **kwargs: Any) -> Any:
        """`write(*args)`, or None where the place has failed now or before."""
        if place in self._failed:
            return None
        try:
            return write(*args, **kwargs)
        except OSError as error:
            self._failed.add(place)
            reason = error.strerror or error
            logger.warning("%s cannot be written (%s): the run goes on without it", place, reason)
            return None


class PatientFileHandler(logging.FileHandler):
    """A log file that is given up, with one line on stderr, when it cannot be written."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            super().emit(record)
        except OSError:  # the file cannot be opened; errors of writing go to handleError
            self.handleError(record)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        """Say it once and take no more records."""
        self.setLevel(logging.CRITICAL + 1)
        stream, self.stream = self.stream, None
        with contextlib.suppress(OSError):
            if stream is not None:
                stream.close()
        logger.warning("the log file %s cannot be written: its records are lost", self.baseFilename)
