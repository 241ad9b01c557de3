"""Samples that are left out of the training order (`--skip-samples 800-831,900`).

Each sample that is left out is replaced by the next one after it that is not (at the end of the
data, by the one before), which is therefore read once more. Nothing shifts: every other sample
keeps its step, the count of consumed samples and with it every resume stay exact, whenever the flag
is added or dropped and whatever the layout is.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_ext.errors import ConfigError


def parse_ranges(text: str | None) -> list[tuple[int, int]]:
    """ "800-831,900" -> [(800, 831), (900, 900)], ends included, sorted, touching ones joined."""
    joined: list[tuple[int, int]] = []
    for first, last in sorted(_range(part) for part in (text or "").split(",") if part.strip()):
        if joined and first <= joined[-1][1] + 1:
            joined[-1] = (joined[-1][0], max(last, joined[-1][1]))
        else:
            joined.append((first, last))
    return joined


def _range(part: str) -> tuple[int, int]:
    first, dash, last = part.strip().partition("-")
    if not first.isdigit() or (dash and not last.isdigit()) or int(last or first) < int(first):
        raise ConfigError(
            f"--skip-samples {part}: sample numbers A or A-B with A <= B, separated by commas",
            do="take them from sample_ids of RUN/nonfinite_step_N.json or RUN/spike_step_N.json",
        )
    return int(first), int(last or first)


def replaced(sample: int, ranges: Sequence[tuple[int, int]], num_samples: int) -> int:
    """The sample that is read in the place of `sample`."""
    for first, last in ranges:
        if first <= sample <= last:
            after = last + 1
            return after if after < num_samples else max(first - 1, 0)
    return sample
