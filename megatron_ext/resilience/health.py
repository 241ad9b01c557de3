"""Is the run well? Looks at each step and says what is wrong; train/observed.py acts on it.

    health = Health.of(cfg)
    health.before_update(step, loss, norm, routing)     # NaN, while the weights are still good
    health.look(record, result.routing, speed)          # the rest, after the step
    worst(verdicts)                                     # None, "warn", "save" or "stop"

All numbers are the same on all ranks, so are the verdicts. A fault is reported once, again only
after a step without it. After a resume windows are empty.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from megatron_ext.config import RunConfig
from megatron_ext.moe.stats import RoutingRecord
from megatron_ext.resilience.health_rules import (
    UNEVEN,
    Cheat,
    Collapse,
    Fault,
    Limits,
    Slow,
    Spikes,
    bad_experts,
    bad_numbers,
)

ACTIONS = ("warn", "save", "stop")
SHARE_OF_WORST = 0.8
"""Of the largest possible MaxVio: the default of --health-max-violation."""

ADVICE = {
    "router_collapse": "raise --moe-aux-loss-coeff or set --moe-router-enable-expert-bias, lower"
    " --lr, or go back to a checkpoint from before it began",
    "balance_cheat": "use --moe-router-score-function softmax or --moe-router-enable-expert-bias"
    " instead of the balance loss",
    "loss_spike": "look at RUN/spike_step_*.json for its samples; lower --lr or --clip-grad if it"
    " comes again",
    "grad_spike": "look at RUN/spike_step_*.json for its samples; lower --clip-grad",
    "nan": "resume from the last checkpoint with a lower --lr, and without"
    " --no-check-for-nan-in-loss-and-grad, which names the module",
    "expert_nan": "resume from the last checkpoint with a lower --lr or --clip-grad;"
    " --rerun-mode validate_results names the samples",
    "throughput": "look at the time split and at RUN/ranks.json for the slowest rank; another"
    " program on the machine, a throttled device or a slow disk",
}


@dataclass(frozen=True)
class Verdict:
    """One fault that begins at this step. `layer` counts from 1, `expert` from 0."""

    kind: str
    action: str
    what: str
    step: int
    layer: int | None = None
    expert: int | None = None

    @property
    def do(self) -> str:
        """What to try."""
        return ADVICE[self.kind]

    def __str__(self) -> str:
        return f"health {self.kind} at step {self.step}: {self.what}; try: {self.do}"

    def record(self) -> dict[str, Any]:
        """A line of metrics.jsonl."""
        place = {"layer": self.layer, "expert": self.expert}
        return {
            "step": self.step,
            "health": self.kind,
            "action": self.action,
            "what": self.what,
            **{name: value for name, value in place.items() if value is not None},
            "do": self.do,
        }


def worst(verdicts: Sequence[Verdict]) -> str | None:
    """The strongest action asked for."""
    return max((one.action for one in verdicts), key=ACTIONS.index, default=None)


class Health:
    """The memory of all checks; made on every rank."""

    def __init__(
        self,
        actions: Mapping[str, str],
        collapse: Collapse | None,
        cheat: Cheat | None,
        spikes: Spikes,
        slow: Slow,
    ) -> None:
        self._actions = dict(actions)
        self._collapse, self._cheat, self._spikes, self._slow = collapse, cheat, spikes, slow
        self._known: dict[str, set[tuple]] = {"before": set(), "after": set()}

    @classmethod
    def of(cls, cfg: RunConfig) -> Health:
        """The health of a run."""
        h, moe = cfg.health, cfg.transformer
        experts, window = moe.num_moe_experts, h.health_window
        largest = experts / moe.moe_router_topk - 1 if experts else 0.0
        most = h.health_max_violation
        limits = Limits(
            h.health_min_load_entropy,
            SHARE_OF_WORST * largest if most is None else most,
            h.health_max_dead_share,
        )
        is_sigmoid = experts and moe.moe_router_score_function == "sigmoid"
        uneven = min(UNEVEN, largest / 2)
        actions = {
            "router_collapse": h.health_router_collapse,
            "balance_cheat": h.health_balance_cheat,
            "loss_spike": h.health_loss_spike,
            "grad_spike": h.health_grad_spike,
            "nan": h.health_nan,
            "expert_nan": h.health_expert_nan,
            "throughput": h.health_throughput,
        }
        resilience = cfg.resilience
        return cls(
            actions,
            Collapse(limits, window) if experts else None,
            Cheat(h.health_min_balance_loss, uneven, window) if is_sigmoid else None,
            Spikes(resilience.spike_threshold, resilience.spike_window, 2 * window),
            Slow(h.health_min_throughput_share, h.health_throughput_seconds, window),
        )

    def before_update(
        self,
        step: int,
        lm_loss: float,
        grad_norm: float | None,
        routing: RoutingRecord | None,
        weights_LE: Tensor | None = None,
    ) -> list[Verdict]:
        """NaN in the gradients or losses of step `step`, whose update is still to come.
        `weights_LE` [L, E]: experts whose weights are not finite, where somebody looked.
        """
        found = list(bad_numbers(lm_loss, grad_norm, routing))
        look = routing.look if routing is not None else None
        tables = {"weights": weights_LE, "outputs": look and look.bad_outputs_LE}
        if not any(fault.what.startswith("not finite: lm_loss") for fault in found):
            tables["gradients"] = look and look.bad_LE  # else all of them are bad
        return self._new("before", step, [*found, *bad_experts(tables)])

    def look(
        self,
        record: Mapping[str, Any],
        routing: RoutingRecord | None,
        speed: tuple[float, float] | None = None,
    ) -> list[Verdict]:
        """What begins to be wrong in this step. `record`: step, lm_loss, grad_norm; `speed`:
        (seconds, tokens a second) of the step before, mean over ranks.
        """
        found = list(self._spikes.find(record))
        found += self._slow.find(*speed) if speed else ()
        if routing is not None:
            found += self._collapse.find(routing) if self._collapse else ()
            found += self._cheat.find(routing) if self._cheat else ()
        return self._new("after", record["step"], found)

    def _new(self, when: str, step: int, faults: Iterable[Fault]) -> list[Verdict]:
        """The verdicts on faults that were not there in the step before and are not off."""
        here = [fault for fault in faults if self._actions[fault.kind] != "off"]
        known = self._known[when]
        self._known[when] = {(fault.kind, fault.layer) for fault in here}
        return [
            Verdict(
                fault.kind, self._actions[fault.kind], fault.what, step, fault.layer, fault.expert
            )
            for fault in here
            if (fault.kind, fault.layer) not in known
        ]
