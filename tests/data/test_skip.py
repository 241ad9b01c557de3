"""--skip-samples: others take the place of what is left out, and nothing else moves."""

import numpy as np
import pytest

from data.loader import MicroBatches
from data.mock import MockDataset
from data.rules import Rules
from data.skip import parse_ranges, replaced
from megatron_ext.errors import ConfigError


def test_ranges_are_sorted_and_joined():
    assert parse_ranges("9,3-5,6-7") == [(3, 7), (9, 9)]
    assert parse_ranges(None) == []


@pytest.mark.parametrize("text", ["5-3", "x", "3-", "-4", "1;2"])
def test_what_is_no_range_is_refused(text):
    with pytest.raises(ConfigError, match="--skip-samples"):
        parse_ranges(text)


def test_the_next_takes_the_place_and_at_the_end_the_one_before():
    ranges = parse_ranges("2-3,6-9")
    assert [replaced(i, ranges, 10) for i in range(10)] == [0, 1, 4, 4, 4, 5, 5, 5, 5, 5]


def _ids(micro_batch_size, dp, consumed, skip):
    dataset = MockDataset(24, 8, 100, Rules(99, False, False, False), 1, 0)
    readers = [
        MicroBatches(dataset, micro_batch_size, rank, dp, consumed, 0, skip) for rank in range(dp)
    ]
    return np.concatenate([b.sample_ids_B for row in zip(*readers) for b in row]).tolist()


@pytest.mark.parametrize(("micro_batch_size", "dp"), [(1, 1), (2, 2), (1, 4)])
def test_every_layout_and_every_resume_reads_the_same(micro_batch_size, dp):
    skip = parse_ranges("5-7,12")
    whole = [8 if 5 <= i <= 7 else 13 if i == 12 else i for i in range(24)]
    assert _ids(micro_batch_size, dp, 0, skip) == whole
    assert _ids(micro_batch_size, dp, 12, skip) == whole[12:]
