"""Whether a failed run is worth another start: a table of exit codes and a budget by progress.

code              another start in place?
0, 75             no: done, or asked to leave with the state saved
64, 65, 73, 74    no: the same flags, files, lock or disk meet it again
76                no: the step was replayed already and gives the same NaN
69                yes: a port in use, a peer that is gone
70, other codes   yes: a crash (a driver, a library); the budget stops one that comes back
77, 78            yes: corruption suspected, a hang
128 + n           yes: killed by signal n (a lack of memory, an operator, a node's health check)
130               no: Ctrl-C
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

FINAL_CODES = frozenset({0, 64, 65, 73, 74, 75, 76, 130})
SAME_STEP_LIMIT = 3
"""A run that fails so often at the same step is not started again, whatever the budget."""


def is_recoverable(code: int) -> bool:
    """True where the same command may succeed if it is started again."""
    return code not in FINAL_CODES


@dataclass
class Budget:
    """Counts starts without progress. Progress is a new checkpoint, so a run may be started any
    number of times in its weeks as long as it gets on.

    Args:
        limit: starts in a row without a new checkpoint; 0: never start again.
    """

    limit: int
    _used: int = 0
    _checkpoint: int = -1
    _at_step: Counter = field(default_factory=Counter)

    def refuses(self, code: int, step: int | None, checkpoint: int) -> str | None:
        """Why there is no further start after a failure, None where there is one.

        `step` in which it failed, None before the first; `checkpoint`: step of the newest one, -1
        without one. "" for failures that never lead to another start.
        """
        if self.limit == 0 or not is_recoverable(code):
            return ""
        if checkpoint > self._checkpoint:
            self._checkpoint, self._used = checkpoint, 0
            passed = [seen for seen in self._at_step if (seen or 0) <= checkpoint]
            for seen in passed:
                del self._at_step[seen]
        self._at_step[step] += 1
        if self._at_step[step] >= SAME_STEP_LIMIT:
            return self._poison(step)
        if self._used >= self.limit:
            return f"no new checkpoint after {self._used} restarts (--restarts {self.limit})"
        self._used += 1
        return None

    def _poison(self, step: int | None) -> str:
        count = self._at_step[step]
        if step is None:
            return f"it failed {count} times before its first step"
        return (
            f"it failed {count} times at step {step}: its samples or this state may be the cause;"
            f" --skip-samples leaves the samples of step {step} out"
        )
