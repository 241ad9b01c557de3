"""The rules of health.py: each remembers what it must and says what is wrong in a step.

A rule is fed once a step with numbers that all ranks have alike, so all find the same.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_ext.moe.stats import RoutingRecord
from megatron_ext.resilience import spikes

BALANCE_LOSSES = ("global_load_balancing_loss", "load_balancing_loss", "seq_load_balancing_loss")
LASTING = 0.9
"""Share of the window's steps in which a layer must be out of a limit: a step within it now and
then is no recovery."""
UNEVEN = 1.0
"""MaxVio above which a load is uneven, so that a balance loss below an even load's is a lie."""
MOST_NAMED = 3
"""Experts that are named one by one."""


@dataclass(frozen=True)
class Fault:
    """Something that is wrong in a step. `layer` counts from 1, `expert` from 0."""

    kind: str
    what: str
    layer: int | None = None
    expert: int | None = None


@dataclass(frozen=True)
class Limits:
    """Thresholds of a layer's load; see the flags --health-*."""

    min_entropy: float
    max_violation: float
    max_dead_share: float

    def problems_L(self, routing: RoutingRecord) -> Tensor:
        """[3, L] bool: load entropy too low, MaxVio too high, too many dead experts. Of experts
        with m tokens on average a fair draw leaves the share exp(-m) without any: it is allowed.
        """
        dead_L = routing.dead_experts_L() / routing.num_experts
        by_chance_L = torch.exp(-routing.counts_LE.mean(dim=1))
        found = torch.stack(
            (
                routing.load_entropy_share_L() < self.min_entropy,
                routing.max_violation_L() > self.max_violation,
                dead_L > self.max_dead_share + by_chance_L,
            )
        )
        return found & routing.is_moe_L


class Collapse:
    """Layers that have been out of a limit in LASTING of the last `window` steps."""

    def __init__(self, limits: Limits, window: int) -> None:
        self.limits, self.window = limits, window
        self.needed = math.ceil(LASTING * window)
        self._last: deque[Tensor] = deque(maxlen=window)

    def find(self, routing: RoutingRecord) -> Iterator[Fault]:
        """The layers that are out now and have been for long, with their busiest expert."""
        self._last.append(self.limits.problems_L(routing))
        if len(self._last) < self.needed:
            return
        lasting = torch.stack(tuple(self._last)).sum(dim=0) >= self.needed
        for layer in (lasting & self._last[-1]).any(dim=0).nonzero().flatten().tolist():
            yield self._described(routing, layer)

    def _described(self, routing: RoutingRecord, layer: int) -> Fault:
        counts_E = routing.counts_LE[layer]
        busiest = int(counts_E.argmax())
        dead = int(routing.dead_experts_L()[layer])
        what = (
            f"layer {layer + 1} for {self.needed} steps: expert {busiest} gets"
            f" {float(counts_E[busiest] / counts_E.sum().clamp(min=1)):.0%} of the load, MaxVio"
            f" {float(routing.max_violation_L()[layer]):.2f}, load entropy"
            f" {float(routing.load_entropy_share_L()[layer]):.2f} of an even one,"
            f" {dead} of {routing.num_experts} experts dead"
        )
        return Fault("router_collapse", what, layer + 1, busiest)


class Cheat:
    """Layers whose balance loss says "better than even" over the window while their load is uneven.
    An even load with a loss below 1 is what an expert bias does, and no fault.
    """

    def __init__(self, least: float, uneven: float, window: int) -> None:
        self.least, self.uneven = least, uneven
        self._last: deque[Tensor] = deque(maxlen=window)

    def find(self, routing: RoutingRecord) -> Iterator[Fault]:
        """The layers that cheat."""
        used = [name for name in BALANCE_LOSSES if routing.losses_L[name].any()]
        if not used:
            return
        self._last.append(torch.stack((routing.losses_L[used[0]], routing.max_violation_L())))
        if len(self._last) < self._last.maxlen:
            return
        loss_L, violation_L = torch.stack(tuple(self._last)).mean(dim=0)
        found_L = (loss_L < self.least) & (violation_L > self.uneven) & routing.is_moe_L
        for layer in found_L.nonzero().flatten().tolist():
            what = (
                f"layer {layer + 1} has balance loss {float(loss_L[layer]):.3f} x coefficient over"
                f" {len(self._last)} steps, below the 1 of an even load, at MaxVio"
                f" {float(violation_L[layer]):.2f}"
            )
            yield Fault("balance_cheat", what, layer + 1)


class Spikes:
    """Loss and gradient norm by the rule of --spike-threshold, once `needed` steps are known: the
    norms of the first steps are wild in every healthy run.
    """

    def __init__(self, threshold: float, window: int, needed: int) -> None:
        self.threshold, self.needed = threshold, max(spikes.FEWEST, needed)
        size = max(window, self.needed)
        self._before = {name: deque(maxlen=size) for name in ("lm_loss", "grad_norm")}

    def find(self, record: Mapping[str, Any]) -> Iterator[Fault]:
        """A step's spikes."""
        for name, kind in (("lm_loss", "loss_spike"), ("grad_norm", "grad_spike")):
            value, before = record[name], self._before[name]
            if not math.isfinite(value):
                continue
            if self.threshold and len(before) >= self.needed:
                distance = spikes.deviations(value, before)
                if distance > self.threshold:
                    usual = statistics.median(before)
                    what = f"{name} {value:.4g}, {distance:.0f} deviations above {usual:.4g}"
                    yield Fault(kind, what)
            before.append(value)


class Slow:
    """A drop of tokens a second that lasts: half of the last `window` steps, and `seconds`, below
    `share` of the median of the steps before it that were not slow.
    """

    def __init__(self, share: float, seconds: float, window: int) -> None:
        self.share, self.seconds, self.window = share, seconds, window
        self._usual: deque[float] = deque(maxlen=4 * window)
        self._last: deque[float] = deque(maxlen=window)  # seconds of a slow step, 0 of others
        self._slow_s = 0.0

    def find(self, step_s: float, tokens_per_s: float) -> Iterator[Fault]:
        """Feed one step."""
        usual = statistics.median(self._usual) if len(self._usual) >= self.window else 0.0
        is_slow = tokens_per_s < self.share * usual
        self._last.append(step_s if is_slow else 0.0)
        if not is_slow:
            self._usual.append(tokens_per_s)
        count = sum(map(bool, self._last))
        lasts = 2 * count >= self.window
        self._slow_s = self._slow_s + self._last[-1] if lasts else sum(self._last)
        if lasts and is_slow and self._slow_s >= self.seconds:
            yield Fault(
                "throughput",
                f"{tokens_per_s:,.0f} tokens/s, {usual:,.0f} before;"
                f" {count} of the last {len(self._last)} steps were as slow",
            )


def bad_numbers(
    lm_loss: float, grad_norm: float | None, routing: RoutingRecord | None
) -> Iterator[Fault]:
    """What is not finite in a step; the first layer whose router gives NaN is named."""
    values = {"lm_loss": lm_loss, "grad_norm": grad_norm or 0.0}
    found = [name for name, value in values.items() if not math.isfinite(value)]
    if routing is not None:
        layers = (~torch.isfinite(routing.entropy_L)).nonzero().flatten().tolist()
        found += [f"the router of layer {layers[0] + 1}"] if layers else []
    if found:
        yield Fault("nan", f"not finite: {', '.join(found)}")


def bad_experts(tables: Mapping[str, Tensor | None]) -> Iterator[Fault]:
    """The experts that began it, of `tables` ("weights", "outputs", "gradients" -> [L, E], not 0
    is bad), the first that has any. What is not finite spreads up with outputs and down with
    gradients: the first layer with bad weights or outputs is named, the last with bad gradients.
    """
    for what, table in tables.items():
        if table is None or not table.any():
            continue
        layers = table.any(dim=1).nonzero().flatten().tolist()
        layer = layers[-1] if what == "gradients" else layers[0]
        experts = table[layer].nonzero().flatten().tolist()
        more = f" ({len(experts)} experts)" if len(experts) > MOST_NAMED else ""
        for expert in experts[:MOST_NAMED]:
            text = f"layer {layer + 1} expert {expert} has {what} that are not finite{more}"
            yield Fault("expert_nan", text, layer + 1, expert)
        return
