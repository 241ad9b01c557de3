"""How a run watches itself: hangs, stragglers, bad numbers, replicas that differ."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_ext.ranges import Count, NotNegative, Seconds, Share, SpikeWindow, Whole


@dataclass(frozen=True)
class ResilienceSection:
    """Faults: when to notice them and what to do then."""

    hang_limit_s: Seconds = 480.0
    """Seconds without progress of a rank until the run is stopped (78); 0: never. Below
    --distributed-timeout-minutes, after which a collective fails without naming anybody."""

    hang_slow_limit_s: Seconds = 3600.0
    """The same while loading, saving and in the first step, which may be silent for long, while
    the rank's beats go on."""

    straggler_interval: Whole = 4
    """Every so many steps ranks are compared over the last four times as many; one that was late in
    most of them is named. 0: off."""

    straggler_share: Share = 0.12
    """Share of the step time by which a rank must be later than its peers to be a straggler."""

    rerun_mode: Literal["disabled", "validate_results", "report_stats"] = "validate_results"
    """What happens to a step that is not finite or a spike, before its update. validate_results:
    replayed; a transient fault is passed over, a reproducible NaN stops the run (76) and names the
    module. disabled: stops at once. report_stats: every step is replayed, differences are
    warned of."""

    spike_threshold: NotNegative = 10.0
    """Robust deviations above the median of the last steps from which a loss or gradient norm is a
    spike: the step is replayed and the last steps' samples are written to RUN. 0: off."""

    spike_window: SpikeWindow = 64
    """Steps that are remembered with their samples, at least 16."""

    check_weight_hash_across_dp_replicas_interval: Count | None = None
    """Steps between comparisons of the hashes of weights and replicated optimizer states over their
    replicas; a difference stops the run (77). None: never."""

    skip_samples: str | None = None
    """Samples of the training order that are left out: 800-831,900. The next sample takes the place
    of each, so that no other sample moves."""
