"""When a run is unwell and what it does then."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_ext.ranges import NotNegative, Seconds, Share, Size


@dataclass(frozen=True)
class HealthSection:
    """What is watched while training; each `warn`s once when it begins, `save`s, or saves and
    `stop`s (76).
    """

    health_window: Size = 20
    """Steps in which a fault must last (router) or with which a step is compared (throughput)."""

    health_router_collapse: Literal["off", "warn", "save", "stop"] = "warn"
    """A layer sends its tokens to few experts over the whole window: entropy, MaxVio or dead
    experts beyond the thresholds below."""

    health_min_load_entropy: Share = 0.6
    """Entropy of a layer's load / ln E (1 is even) below which its router has collapsed."""

    health_max_violation: NotNegative | None = None
    """max load / mean load - 1 of a layer above which its router has collapsed. Default: 0.8 of the
    largest possible, E / top-k - 1."""

    health_max_dead_share: Share = 0.25
    """Share of a layer's experts without a token in a step above which its router has collapsed."""

    health_balance_cheat: Literal["off", "warn", "save", "stop"] = "warn"
    """A sigmoid router lowers its balance loss below that of an even load: it gives probability to
    experts that it does not choose."""

    health_min_balance_loss: NotNegative = 0.98
    """Balance loss / coefficient, mean over the window, below which a sigmoid router cheats; an
    even load has 1."""

    health_loss_spike: Literal["off", "warn", "save", "stop"] = "warn"
    """The loss is a spike by --spike-threshold."""

    health_grad_spike: Literal["off", "warn", "save", "stop"] = "warn"
    """The gradient norm is a spike by --spike-threshold."""

    health_nan: Literal["off", "warn", "save", "stop"] = "warn"
    """Loss, gradient norm or a router is not finite. save, stop: the state before that step's
    update is saved. Such a step ends the run (76) whatever this says, but with
    --no-check-for-nan-in-loss-and-grad, where warn and save train on."""

    health_expert_nan: Literal["off", "warn", "save", "stop"] = "warn"
    """An expert's output or gradient is not finite (looked at every --log-routing-interval steps).
    save, stop: the state before that step's update is saved."""

    health_throughput: Literal["off", "warn", "save", "stop"] = "warn"
    """Tokens a second lie below a share of the usual for half of the window."""

    health_min_throughput_share: Share = 0.5
    """That share, of the median of the steps before that were not slow."""

    health_throughput_seconds: Seconds = 60.0
    """Seconds that a drop must last, however short the steps are."""
