"""What a record gets beyond the result of its step, and what its health asks the loop to do.

A NaN is found before the update (`_before_update`, called by train_step): `save` and `stop` then
keep the state of the step before, which is still good. Everything else is judged after the step.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from megatron.core import parallel_state

from data.samples import given
from data.skip import parse_ranges, replaced
from megatron_ext.config import RunConfig
from megatron_ext.errors import NumericError
from megatron_ext.mesh.agree import FailedElsewhere
from megatron_ext.moe.close_look import bad_weights
from megatron_ext.observe.metrics import routing_values
from megatron_ext.optim.params_norm import params_norm
from megatron_ext.resilience.health import Health, Verdict, worst
from megatron_ext.resilience.watch import entering
from megatron_ext.train.finite import check_finite
from megatron_ext.train.step import Attempt, StepResult, StepSettings


def read_of_domains(
    dataset: Any, first: int, stop: int, skip: Sequence[tuple[int, int]]
) -> list[int]:
    """Samples of each domain that are read for samples [first, stop) of the training order, where
    those of `skip` (data.skip) are replaced.
    """
    counts = given(dataset, first, stop)
    for begin, end in skip:
        for sample in range(max(begin, first), min(end + 1, stop)):
            instead = replaced(sample, skip, len(dataset))
            for domain, is_left_out in enumerate(given(dataset, sample, sample + 1)):
                counts[domain] -= is_left_out
            for domain, is_read in enumerate(given(dataset, instead, instead + 1)):
                counts[domain] += is_read
    return counts


class Observed:
    """The health and the domains of one run; the same on all ranks. Without `run` (its state,
    checkpointer and observers) a NaN is not judged.
    """

    def __init__(
        self, cfg: RunConfig, dataset: Any, consumed_samples: int, run: Any = None
    ) -> None:
        self._cfg, self._dataset, self._run = cfg, dataset, run
        self._health = Health.of(cfg)
        self._skip = parse_ranges(cfg.resilience.skip_samples)
        self._seen = read_of_domains(dataset, 0, consumed_samples, self._skip)
        self._consumed = consumed_samples
        self._last_s = self._last_tokens = 0.0
        self.saved_step = run.state.progress.step if run else 0
        self.verdicts: list[Verdict] = []

    def settings(self, step: int) -> StepSettings:
        """Those of step number `step`: with a close look every --log-routing-interval."""
        interval = self._cfg.observe.log_routing_interval
        looks = bool(interval) and step % interval == 0 and self._cfg.transformer.num_moe_experts
        settings = replace(
            StepSettings.of(self._cfg),
            look_domains=len(self._dataset.domains) if looks else 0,
            last_step_s=self._last_s,
        )
        return replace(settings, judge=self._before_update) if self._run else settings

    def values(self, result: StepResult, state: Any, tflop_per_s: float) -> dict[str, Any]:
        """Routing, MFU, norm of the weights and tokens by domain. Collective with
        --log-params-norm.
        """
        values = routing_values(
            result.routing,
            parallel_state.get_expert_model_parallel_world_size(),
            parallel_state.get_expert_data_parallel_world_size(),
        )
        if self._cfg.observe.peak_tflops:
            values["mfu_share"] = tflop_per_s / self._cfg.observe.peak_tflops
        if self._cfg.observe.log_params_norm:
            values["params_norm"] = params_norm(state.chunks)
        consumed = state.progress.consumed_samples
        read = read_of_domains(self._dataset, self._consumed, consumed, self._skip)
        self._seen = [before + count for before, count in zip(self._seen, read)]
        self._consumed = consumed
        length = self._cfg.model.seq_length
        names = self._dataset.domains
        values["tokens_seen_per_domain"] = {n: c * length for n, c in zip(names, self._seen)}
        return values

    def judge(self, record: Mapping[str, Any], result: StepResult) -> list[Verdict]:
        """What begins to be wrong in this step; slow steps are found a step later, when all ranks
        know them.
        """
        seconds = result.mean_step_s
        speed = (seconds, self._last_tokens / seconds) if seconds else None
        self._last_s, self._last_tokens = record["step_time_s"], result.num_tokens
        self.verdicts = self._health.look(record, result.routing, speed)
        return self.verdicts

    def _before_update(self, made: Attempt) -> None:
        """Show, save and stop as the flags say where a step is not finite. Raises NumericError on
        all ranks.
        """
        state, routing = self._run.state, made.routing
        weights_LE = None
        if routing is not None and not math.isfinite(made.lm_loss):
            layers = state.chunks[0].config.num_layers
            weights_LE = bad_weights(state.chunks, layers, routing.counts_LE.shape)
        norm = made.grad_norm if made.is_norm_finite else math.nan
        step = state.progress.step + 1
        found = self._health.before_update(step, made.lm_loss, norm, routing, weights_LE)
        for verdict in found:
            self._run.observers.verdict(verdict)
        if worst(found) in ("save", "stop"):
            self._save_last_good()
        self._stop(found, f"step {step - 1} is saved")

    def _save_last_good(self) -> None:
        """A checkpoint of the state before this step's update, unless there is one. Collective."""
        step = self._run.state.progress.step
        if self.saved_step != step:
            entering("save")
            check_finite(self._run.state)
            self._run.checkpointer.save(self._run.state)
            self._run.checkpointer.finish()
            self.saved_step = step

    @contextlib.contextmanager
    def rescuing(self) -> Iterator[None]:
        """With --health-nan save or stop, a step inside that ends the run because its numbers are
        not finite leaves a checkpoint of the state before it.
        """
        step = self._run.state.progress.step
        try:
            yield
        except (NumericError, FailedElsewhere) as error:
            is_before_update = self._run.state.progress.step == step
            is_asked = self._cfg.health.health_nan in ("save", "stop")
            if error.code == NumericError.code and is_before_update and is_asked:
                self._save_last_good()
            raise

    @property
    def must_save(self) -> bool:
        """True where health asks for a checkpoint of this step."""
        return worst(self.verdicts) in ("save", "stop")

    @property
    def must_stop(self) -> bool:
        """True where health asks to stop."""
        return worst(self.verdicts) == "stop"

    def stop_if_asked(self) -> None:
        """Raise NumericError (76) on all ranks where health asks to stop."""
        self._stop(self.verdicts, "saved")

    def _stop(self, verdicts: list[Verdict], saved: str) -> None:
        asked = [one for one in verdicts if one.action == "stop"]
        if asked:
            what = f"health: {asked[0].what} (--health-{asked[0].kind.replace('_', '-')} stop)"
            if torch.distributed.get_rank():
                raise FailedElsewhere(NumericError.code, what)
            raise NumericError(what, do=f"{saved}; {asked[0].do}")
