"""Judges a step before its update and has it replayed: NaN, infinity, spikes.

    attempt --finite, no spike--> update                          (every healthy step)
        \\--otherwise--> snapshot restored --> replay, watched module by module
              finite again          one warning, the update takes the replay   (transient)
              not finite again      RUN/nonfinite_step_N.json, exit code 76    (reproducible)
              still a spike         RUN/spike_step_N.json, training goes on    (the data's)

All ranks judge the same sums, so they replay together whichever rank, stage or replica was hit.
Megatron-LM's --rerun-mode: `disabled` ends at the first attempt that is not finite, `report_stats`
replays every step and warns where the numbers differ.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from megatron.core import parallel_state
from torch import Tensor, nn

from megatron_ext.config import RunConfig
from megatron_ext.errors import NumericError
from megatron_ext.resilience import nonfinite, spikes
from megatron_ext.resilience.blame import Watch
from megatron_ext.resilience.replay import Snapshot

log = logging.getLogger(__name__)


class Judged(Protocol):
    """What a guard has to know of an attempt; `reports` is this rank's, the rest everybody's."""

    lm_loss: float
    grad_norm: float | None
    reports: Sequence[Tensor]

    def problem(self) -> str | None:
        """What is not finite, as text."""
        ...


A = TypeVar("A", bound=Judged)


@dataclass(frozen=True)
class Guard:
    """Rules and memory of one run. `folder`: RUN, for reports; None writes none."""

    mode: str = "disabled"
    folder: Path | None = None
    ring: spikes.Ring | None = None

    @classmethod
    def of(cls, cfg: RunConfig) -> Guard:
        """The guard of a run."""
        resilience = cfg.resilience
        ring = spikes.Ring(resilience.spike_window, resilience.spike_threshold)
        return cls(resilience.rerun_mode, Path(cfg.observe.run_dir), ring)

    def settle(
        self, attempt: Callable[[], A], step: int, chunks: Sequence[nn.Module], optimizer, batches
    ) -> A:
        """Run `attempt`, again where it must be; returns the attempt whose gradients are in place.

        Raises NumericError (76) on the culprit's rank and FailedElsewhere on the others where a
        replay is not finite either.
        """
        snapshot = None if self.mode == "disabled" else Snapshot.take(chunks, optimizer)
        made = attempt()
        problem, spike = made.problem(), self._spike(made)
        if snapshot is None or (not problem and not spike and self.mode != "report_stats"):
            return _or_stop(made, problem, step)
        snapshot.restore()
        with Watch(chunks, len(batches)) as watch:
            again = attempt()
        if again.problem():
            watch.look_at_reduced()
            self._stop(again, step, batches, watch)
        self._tell(made, again, step, batches)
        return again

    def _spike(self, made: Judged) -> str | None:
        return self.ring and self.ring.spike(made.lm_loss, made.grad_norm)

    def _stop(self, again: Judged, step: int, batches: Sequence, watch: Watch) -> None:
        everyone = nonfinite.gathered(nonfinite.seen(again.reports, batches, watch.findings))
        report = nonfinite.report(step, again.problem() or "", everyone)
        path = None
        if self.folder is not None:
            path = self.folder / f"nonfinite_step_{step}.json"
            if torch.distributed.get_rank() == 0:
                nonfinite.write_report(self.folder, report)
        raise nonfinite.error(report, path)

    def _tell(self, made: Judged, again: Judged, step: int, batches: Sequence) -> None:
        """One warning on rank 0 where the replay is better or differs."""
        problem, spike = made.problem(), self._spike(made)
        if problem:
            everyone = nonfinite.gathered(nonfinite.seen(made.reports, batches, []))
            _warn(f"{problem} at step {step}: {nonfinite.places(everyone)}; finite in its replay")
        elif spike and not self._spike(again):
            _warn(f"{spike} at step {step}; not in its replay, which is taken: a fault of a device")
        elif self.mode == "report_stats" and _numbers(made) != _numbers(again):
            _warn(f"step {step} gives {_numbers(made)}, its replay {_numbers(again)}")

    def remember(self, step: int, made: Judged, batches: Sequence) -> None:
        """Put an accepted step into the ring, and write the evidence where it is a spike."""
        if self.ring is None or made.grad_norm is None:
            return
        spike = self._spike(made)
        ids = [batch.sample_ids_B.tolist() for batch in batches]
        self.ring.add(spikes.StepNote(step, made.lm_loss, made.grad_norm, ids))
        if spike and self.folder is not None:
            self._write_spike(step, spike)

    def _write_spike(self, step: int, spike: str) -> None:
        mine = spikes.as_json(parallel_state.get_data_parallel_rank(), list(self.ring.notes))
        everyone: list = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(everyone, mine)
        if torch.distributed.get_rank() == 0:
            of_dp = {one["dp"]: one for one in everyone}
            try:
                path = spikes.write(self.folder, step, spike, [of_dp[dp] for dp in sorted(of_dp)])
                _warn(f"{spike} at step {step}: samples of the last steps in {path}")
            except OSError as error:
                _warn(f"{spike} at step {step}; no evidence written: {error.strerror}")


def _numbers(made: Judged) -> tuple[str, str]:
    return float(made.lm_loss).hex(), float(made.grad_norm or 0.0).hex()


def _or_stop(made: A, problem: str | None, step: int) -> A:
    if problem:
        raise NumericError(
            f"{problem} at step {step}",
            do="resume from the last checkpoint with a lower --lr or --clip-grad, or look at the"
            " data of this step (--rerun-mode validate_results replays it and names the module,"
            " --no-check-for-nan-in-loss-and-grad trains on)",
        )
    return made


def _warn(text: str) -> None:
    if torch.distributed.get_rank() == 0:
        log.warning("%s", text)
