"""The routing record: tallies, the table, and what is derived from it."""

import pytest
import torch

from megatron_ext.moe.router import loss_strength
from megatron_ext.moe.stats import LOSS_NAMES, RoutingRecord, Tally, table_to_record


def test_tally_counts_micro_batches_and_averages_losses():
    tally = Tally(3)
    maps = [
        torch.tensor([[1, 1, 0], [1, 0, 1]]).bool(),
        torch.tensor([[0, 1, 1], [0, 1, 0]]).bool(),
    ]
    for i, routing_map in enumerate(maps):
        tally.add_routing(routing_map, 4)
        tally.add_loss("z_loss", torch.tensor(float(i + 1)))
    row = tally.row()
    assert row[:3].tolist() == [2, 3, 2] and row[3] == 8
    assert row[4 + LOSS_NAMES.index("z_loss")] == 1.5
    tally.clear()
    assert tally.num_micro_batches == 0 and tally.counts_E is None


def _record(counts) -> RoutingRecord:
    table = torch.zeros(len(counts), len(counts[0]) + 1 + len(LOSS_NAMES), dtype=torch.float64)
    for layer, row in enumerate(counts):
        table[layer, : len(row)] = torch.tensor(row, dtype=torch.float64)
        table[layer, len(row)] = sum(row) + (2 if sum(row) else 0)
    return table_to_record(table, len(counts[0]))


def test_record_of_a_dense_an_even_and_a_collapsed_layer():
    record = _record([[0, 0, 0, 0], [5, 5, 5, 5], [20, 0, 0, 0]])
    assert record.is_moe_L.tolist() == [False, True, True]
    assert record.max_violation_L().tolist() == [0.0, 0.0, 3.0]
    assert record.dead_experts_L().tolist() == [0, 0, 3]
    assert record.dropped_L.tolist() == [0.0, 2.0, 2.0]


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
