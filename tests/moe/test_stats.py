"""The routing record: tallies, the table, and what is derived from it."""

import math

import pytest
import torch

from megatron_ext.moe.router import loss_strength
from megatron_ext.moe.stats import (
    LOSS_NAMES,
    RoutingRecord,
    Tally,
    mutual_information,
    summed_rows,
    table_to_record,
    width,
)


def test_tally_counts_micro_batches_and_averages_losses():
    tally = Tally(3)
    maps = [
        torch.tensor([[1, 1, 0], [1, 0, 1]]).bool(),
        torch.tensor([[0, 1, 1], [0, 1, 0]]).bool(),
    ]
    for i, routing_map in enumerate(maps):
        tally.add_routing(routing_map, 4)
        tally.add_loss("z_loss", torch.tensor(float(i + 1)))
        tally.add_scores(torch.zeros(2, 3), "softmax")
    (row,) = summed_rows([tally])
    assert len(row) == width(3)
    assert row[:3].tolist() == [2, 3, 2]
    assert row[3:6].tolist() == pytest.approx([4 / 3] * 3)
    assert row[6:9].tolist() == pytest.approx([4 * math.log(3), 0, 0])
    assert row[9:11].tolist() == [4, 8]
    assert row[11 + LOSS_NAMES.index("z_loss")] == 1.5
    tally.clear()
    assert tally.num_micro_batches == 0 and tally.counts_E is None


def _record(counts) -> RoutingRecord:
    table = torch.zeros(len(counts), width(len(counts[0])), dtype=torch.float64)
    for layer, row in enumerate(counts):
        table[layer, : len(row)] = torch.tensor(row, dtype=torch.float64)
        table[layer, 2 * len(row) + 4] = sum(row) + (2 if sum(row) else 0)
    return table_to_record(table, len(counts[0]))


def test_record_of_a_dense_an_even_and_a_collapsed_layer():
    record = _record([[0, 0, 0, 0], [5, 5, 5, 5], [20, 0, 0, 0]])
    assert record.is_moe_L.tolist() == [False, True, True]
    assert record.max_violation_L().tolist() == [0.0, 0.0, 3.0]
    assert record.dead_experts_L().tolist() == [0, 0, 3]
    assert record.dropped_L.tolist() == [0.0, 2.0, 2.0]
    assert record.load_entropy_share_L().tolist() == pytest.approx([0, 1, 0])
    assert record.busiest_ep_rank_tokens(2) == 20 and record.busiest_ep_rank_tokens(2, 4) == 5


def test_mutual_information_of_known_tables():
    decided, free = [[6, 0, 0], [0, 3, 3]], [[2, 4, 6], [1, 2, 3]]
    assert mutual_information(torch.tensor([decided, free])).tolist() == pytest.approx([1, 0])
    assert mutual_information(torch.tensor([[[5, 5]], [[0, 0]]])).tolist() == [0, 0]
    noisy = mutual_information(torch.tensor([[[3, 1], [1, 3]]])).item()
    both = 0.75 * math.log(0.75) + 0.25 * math.log(0.25)
    assert noisy == pytest.approx((math.log(2) + both) / math.log(2))


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ({"over_global_batch": False, "exact": True, "tokens": None}, 1.0),
        ({"over_global_batch": True, "exact": True, "tokens": None}, 4.0),
        ({"over_global_batch": True, "exact": False, "tokens": None}, 1.0),
        ({"over_global_batch": False, "exact": True, "tokens": 32}, 64.0),
        ({"over_global_batch": True, "exact": True, "tokens": 32}, 256.0),
    ],
)
def test_loss_strength(kind, expected):
    assert loss_strength(shards=2, dp=4, **kind) == expected
