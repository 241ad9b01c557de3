import time
from fractions import Fraction

import numpy as np
import pytest

from data import blend
from megatron_ext.errors import ConfigError


def naive_sequence(parts, length):
    """Earliest deadline among open windows, written as the definition says."""
    total, given, chosen = sum(parts), [0] * len(parts), []
    for n in range(1, length + 1):
        open_domains = [d for d, part in enumerate(parts) if Fraction(given[d] * total, part) < n]
        best = min(open_domains, key=lambda d: (-(-(given[d] + 1) * total // parts[d]), d))
        given[best] += 1
        chosen.append(best)
    return chosen


HOSTILE_PARTS = [
    [1],
    [1, 1],
    [3, 7],
    [1, 999],
    [33, 33, 33, 1, 1, 1],
    [5, 1, 1, 1, 1, 1],
    [1] * 17,
    [97, 31, 13, 7, 5, 3, 2],
]


@pytest.mark.parametrize("parts", HOSTILE_PARTS)
def test_equals_the_definition(parts):
    assert blend.interleave(parts, 500).tolist() == naive_sequence(parts, 500)


def largest_distance(parts, chosen):
    """How far a domain ever is from its weight, in samples."""
    n = np.arange(1, len(chosen) + 1)
    return max(
        np.abs(np.cumsum(chosen == d) - n * (part / sum(parts))).max()
        for d, part in enumerate(parts)
    )


@pytest.mark.parametrize("parts", HOSTILE_PARTS)
def test_never_a_whole_sample_from_the_weight(parts):
    assert largest_distance(parts, blend.interleave(parts, 5000)) < 1


def test_never_a_whole_sample_from_random_weights():
    state = np.random.RandomState(0)
    for _ in range(30):
        parts = blend.parts_of([int(x) for x in state.randint(1, 10**9, state.randint(2, 20))])
        assert sum(parts) == blend.LONGEST_PERIOD
        assert largest_distance(parts, blend.interleave(parts, 3000)) < 1


def test_parts_are_exact_or_rounded_a_little():
    assert blend.parts_of([Fraction("0.3"), Fraction("0.7")]) == [3, 7]
    assert blend.parts_of([Fraction("30"), Fraction("70")]) == [3, 7]
    assert blend.parts_of([5]) == [1]
    weights = [123456789, 987654321, 1]
    parts = blend.parts_of(weights)
    assert sum(parts) == blend.LONGEST_PERIOD
    assert parts[2] == 1
    for weight, part in zip(weights[:2], parts[:2], strict=True):
        assert abs(weight / sum(weights) - part / sum(parts)) < 2 / blend.LONGEST_PERIOD


@pytest.mark.parametrize("parts", [[3, 7], [1, 1, 2], [5]])
@pytest.mark.parametrize("num_samples", [1, 7, 10, 99, 1000])
def test_locate_repeats_the_period(parts, num_samples):
    period = blend.build_period(parts, num_samples)
    found = [blend.locate(n, parts, period) for n in range(num_samples)]
    domains = blend.interleave(parts, num_samples)
    given = [0] * len(parts)
    for (domain, index), wanted in zip(found, domains, strict=True):
        assert (domain, index) == (wanted, given[wanted])
        given[wanted] += 1
    assert blend.samples_of(parts, num_samples, period) == given


def test_a_longer_run_begins_with_the_same_samples():
    parts = blend.parts_of([10**9 + 7, 10**8 + 7, 12345])
    assert np.array_equal(blend.interleave(parts, 2000)[:700], blend.interleave(parts, 700))


def test_fast_enough_for_ten_million_samples():
    parts = blend.parts_of([10**9 + 7, 10**8 + 7, 12345, 10**7])
    started = time.perf_counter()
    blend.interleave(parts, 100_000)
    a_period_s = (time.perf_counter() - started) * blend.LONGEST_PERIOD / 100_000
    assert a_period_s < 60


def test_megatrons_syntax():
    entries = blend.parse_blend(["0.3", "a", "0.7", "b"])
    assert [(e.prefix, e.weight) for e in entries] == [
        ("a", Fraction(3, 10)),
        ("b", Fraction(7, 10)),
    ]
    assert [(e.prefix, e.weight) for e in blend.parse_blend(["a", "b", "c"])] == [
        ("a", None),
        ("b", None),
        ("c", None),
    ]
    assert [e.prefix for e in blend.parse_blend(["2024"])] == ["2024"]


@pytest.mark.parametrize(
    "words",
    [
        ["0.3", "a", "0.7"],
        ["0.3", "a", "b", "c"],
        ["0", "a", "1", "b"],
        ["-1", "a"],
        ["a", "b", "1", "c"],
        ["nan", "a", "1", "b"],
    ],
)
def test_bad_blends(words):
    with pytest.raises(ConfigError, match="--data-path"):
        blend.parse_blend(words)
