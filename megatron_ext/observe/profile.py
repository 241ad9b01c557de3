"""--profile: torch's profiler over some steps, one Chrome trace a rank in RUN/traces/.

Megatron-LM's flags: --profile-step-start (first profiled step), --profile-step-end (the step before
which it stops), --profile-ranks. Steps are numbered from 1 as in metrics.jsonl. Open the files with
ui.perfetto.dev or chrome://tracing.
"""

from __future__ import annotations

from pathlib import Path

import torch

from megatron_ext.config.sections.observe import ObserveSection


class Profile:
    """Starts and stops the profiler at the right steps; nothing without --profile."""

    def __init__(self, observe: ObserveSection, traces: Path, rank: int) -> None:
        ranks = observe.profile_ranks
        self._is_asked = observe.profile and (not ranks or rank in ranks)
        self._observe, self._rank, self._traces = observe, rank, traces
        self._profiler: torch.profiler.profile | None = None

    def before(self, step: int) -> None:
        """`step` is about to begin."""
        observe = self._observe
        first, last = observe.profile_step_start, observe.profile_step_end
        if self._profiler is not None and step >= last:
            self.close()
        elif self._is_asked and self._profiler is None and first <= step < last:
            self._profiler = torch.profiler.profile(
                record_shapes=observe.pytorch_profiler_collect_shapes,
                with_stack=observe.pytorch_profiler_collect_callstack,
            )
            self._profiler.start()

    def close(self) -> None:
        """Stop and write; also where the training ends inside the profiled steps."""
        if self._profiler is None:
            return
        profiler, self._profiler = self._profiler, None
        profiler.stop()
        self._traces.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(self._traces / f"profile_rank_{self._rank}.json"))
