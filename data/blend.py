"""Several domains by weight: which domain gives sample n, and which of its samples.

At every length n each domain has given floor(n * w) or ceil(n * w) samples: never a whole sample
away from its weight. Megatron-LM's greedy rule (take the domain furthest behind) keeps this for two
domains only.  The j-th sample of a domain of weight w has a window: not before (j - 1)/w, not after
j/w.  Serving, among the open windows, the one that closes first meets every window (unit jobs with
total load 1 on one machine: Liu and Layland 1973; Baruah et al. 1996, "Proportionate Progress").
The choice at n never looks ahead, so a longer run begins with the same samples.

Weights are fractions with a common denominator, the period, after which the sequence repeats: one
period is stored and any n is found at once.  Weights whose denominator exceeds `LONGEST_PERIOD`
(for instance sizes in tokens) are rounded to 1/`LONGEST_PERIOD`: at n samples this moves a domain
by n/8,388,608 samples at most.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import gcd, lcm

import numpy as np

from megatron_ext.errors import ConfigError

LONGEST_PERIOD = 1 << 22


@dataclass(frozen=True)
class BlendEntry:
    """One domain of a --data-path."""

    prefix: str
    weight: Fraction | None
    """As written, not normalised; None: by size."""


def parse_blend(words: Sequence[str], flag: str = "--data-path") -> list[BlendEntry]:
    """Megatron-LM's syntax: ``0.3 prefixA 0.7 prefixB``, or prefixes alone.

    Raises:
        ConfigError: weights and prefixes do not alternate, a weight is not above 0.
    """
    words = [str(word) for word in words]
    weights = [_number(word) for word in words]
    if not any(weight is not None for weight in weights[::2]) or len(words) == 1:
        return [BlendEntry(word, None) for word in words]
    if len(words) % 2 or any(weight is None for weight in weights[::2]):
        bad = next(
            (word for word, weight in zip(words[::2], weights[::2], strict=True) if weight is None),
            words[-1],
        )
        raise ConfigError(
            f"{flag} {' '.join(words)}: weights and prefixes must alternate, '{bad}' breaks it",
            do="write: weight prefix weight prefix ..., or prefixes alone",
        )
    entries = [
        BlendEntry(prefix, weight) for weight, prefix in zip(weights[::2], words[1::2], strict=True)
    ]
    for entry in entries:
        if entry.weight is not None and entry.weight <= 0:
            raise ConfigError(
                f"{flag} weight {float(entry.weight):g} of {entry.prefix} must be above 0",
                do="leave the domain out or give it a weight",
            )
    return entries


def _number(word: str) -> Fraction | None:
    try:
        return Fraction(word)
    except (ValueError, ZeroDivisionError):
        return None


def parts_of(weights: Sequence[Fraction | int], longest: int = LONGEST_PERIOD) -> list[int]:
    """Whole parts in the ratio of the weights, with no common divisor; their sum is the period,
    ``longest`` at most.

    Rounding is by largest remainder, and each domain keeps at least one part.
    """
    fractions = [Fraction(weight) for weight in weights]
    scale = lcm(*(fraction.denominator for fraction in fractions))
    whole = [int(fraction * scale) for fraction in fractions]
    divisor = gcd(*whole)
    whole = [part // divisor for part in whole]
    total = sum(whole)
    if total <= longest:
        return whole
    parts = [max(1, part * longest // total) for part in whole]
    by_remainder = sorted(range(len(whole)), key=lambda d: (-(whole[d] * longest % total), d))
    for domain in by_remainder[: max(0, longest - sum(parts))]:
        parts[domain] += 1
    return parts


def interleave(parts: Sequence[int], length: int) -> np.ndarray:
    """int16 [length]: the domain of each sample; domain d has weight parts[d] / sum(parts).

    Earliest deadline first over windows; about a microsecond a sample.
    """
    total = sum(parts)
    waiting = [(1, -(-total // part), domain, 1) for domain, part in enumerate(parts)]
    heapq.heapify(waiting)
    ready: list[tuple[int, int, int]] = []
    chosen = np.empty(length, dtype=np.int16)
    for n in range(1, length + 1):
        while waiting and waiting[0][0] <= n:
            _, deadline, domain, job = heapq.heappop(waiting)
            heapq.heappush(ready, (deadline, domain, job))
        _, domain, job = heapq.heappop(ready)
        chosen[n - 1] = domain
        opens = job * total // parts[domain] + 1
        heapq.heappush(waiting, (opens, -(-(job + 1) * total // parts[domain]), domain, job + 1))
    return chosen


def build_period(parts: Sequence[int], num_samples: int) -> dict[str, np.ndarray]:
    """One period, or its beginning where fewer samples are wanted.

    Returns:
        ``domains`` int16 [P] and ``indices`` int64 [P]: sample n of the blend is sample
        ``indices[n]`` of its domain.
    """
    domains = interleave(parts, min(sum(parts), num_samples))
    indices = np.empty(len(domains), dtype=np.int64)
    for domain in range(len(parts)):
        mine = np.flatnonzero(domains == domain)
        indices[mine] = np.arange(len(mine))
    return {"domains": domains, "indices": indices}


def locate(sample: int, parts: Sequence[int], period: dict[str, np.ndarray]) -> tuple[int, int]:
    """(domain, sample of the domain) of a sample of the blend."""
    repeat, place = divmod(sample, sum(parts))
    domain = int(period["domains"][place])
    return domain, repeat * parts[domain] + int(period["indices"][place])


def samples_of(parts: Sequence[int], num_samples: int, period: dict[str, np.ndarray]) -> list[int]:
    """How many samples each domain gives to ``num_samples``."""
    repeats, rest = divmod(num_samples, sum(parts))
    begun = np.bincount(period["domains"][:rest], minlength=len(parts))
    return [repeats * part + int(more) for part, more in zip(parts, begun, strict=True)]
