import gc
import threading
import time

import numpy as np
import pytest
import torch

from data import open_datasets
from data.indexed import write_pair
from data.loader import MicroBatches, document_numbers, make_batch, positions_in_documents
from data.rules import Rules
from megatron_ext.errors import DataError

EOD = 0


@pytest.fixture
def dataset(data_cfg, tmp_path):
    """Two domains, 96 samples of 8 + 1 tokens, documents ended by eod."""
    state = np.random.RandomState(3)
    for name in "ab":
        write_pair(
            tmp_path / name,
            [[*state.randint(1, 50, state.randint(1, 12)), EOD] for _ in range(80)],
            np.uint16,
        )
    cfg = data_cfg(
        data_path=["0.4", str(tmp_path / "a"), "0.6", str(tmp_path / "b")],
        split="1",
        reset_position_ids=True,
        reset_attention_mask=True,
        eod_mask_loss=True,
    )
    return open_datasets(
        cfg,
        seq_length=8,
        num_samples=(96, 0, 0),
        seed=5,
        vocab_size=50,
        eod=EOD,
        is_builder=True,
        barrier=lambda: None,
    ).train


def test_batch_holds_the_samples(dataset):
    batch = next(MicroBatches(dataset, 3, 0, 1, 6, 0))
    assert batch.sample_ids_B.tolist() == [6, 7, 8]
    for row, index in enumerate(range(6, 9)):
        tokens, domain = dataset.sample(index)
        assert batch.tokens_BS[row].tolist() == tokens[:-1].tolist()
        assert batch.labels_BS[row].tolist() == tokens[1:].tolist()
        assert batch.domain_ids_B[row] == domain
    assert (batch.tokens_BS.dtype, batch.loss_mask_BS.dtype) == (torch.int64, torch.float32)
    assert (batch.position_ids_BS.dtype, batch.document_ids_BS.dtype) == (torch.int64, torch.int64)
    assert all(
        tensor.is_contiguous()
        for tensor in (batch.tokens_BS, batch.labels_BS, batch.position_ids_BS)
    )


@pytest.mark.parametrize(
    ("micro_batch_size", "dp_size"), [(4, 1), (2, 2), (1, 4), (8, 1), (4, 2), (2, 4), (1, 1)]
)
def test_global_batches_hold_the_same_samples_for_every_layout(dataset, micro_batch_size, dp_size):
    global_batch, seen = 8, []
    ranks = [
        MicroBatches(dataset, micro_batch_size, rank, dp_size, 0, 2) for rank in range(dp_size)
    ]
    for _ in range(len(dataset) // global_batch):
        ids, domains = [], []
        for _ in range(global_batch // (micro_batch_size * dp_size)):
            for rank in ranks:
                batch = next(rank)
                ids += batch.sample_ids_B.tolist()
                domains += batch.domain_ids_B.tolist()
        seen.append((sorted(ids), [d for _, d in sorted(zip(ids, domains, strict=True))]))
    assert [ids for ids, _ in seen] == [list(range(g * 8, g * 8 + 8)) for g in range(12)]
    assert [d for _, domains in seen for d in domains] == [dataset.sample(i)[1] for i in range(96)]
    assert {rank.consumed_samples for rank in ranks} == {96}
    for rank in ranks:
        with pytest.raises(StopIteration):
            next(rank)
        assert list(rank) == []


@pytest.mark.parametrize("prefetch", [0, 1, 3])
def test_seeking_equals_iterating(dataset, prefetch):
    whole = [batch.tokens_BS for batch in MicroBatches(dataset, 2, 1, 2, 0, prefetch)]
    assert len(whole) == 24
    for skipped in (0, 1, 7, 23, 24):
        rest = [batch.tokens_BS for batch in MicroBatches(dataset, 2, 1, 2, skipped * 4, prefetch)]
        assert len(rest) == len(whole) - skipped
        assert all(torch.equal(a, b) for a, b in zip(rest, whole[skipped:], strict=True))


def test_consumed_samples_counts_what_was_delivered(dataset):
    batches = MicroBatches(dataset, 2, 0, 2, 8, 3)
    assert batches.consumed_samples == 8
    next(batches)
    time.sleep(0.05)
    assert batches.consumed_samples == 12


def naive_rules(tokens, eod):
    """Megatron-LM's loop over eod positions: (positions, documents, loss mask)."""
    positions, documents, mask = list(range(len(tokens))), [0] * len(tokens), [1.0] * len(tokens)
    for place, token in enumerate(tokens):
        if token == eod:
            mask[place] = 0.0
            for later in range(place + 1, len(tokens)):
                positions[later] = later - place - 1
                documents[later] += 1
    return positions, documents, mask


def test_document_rules_equal_the_naive_loop(dataset):
    for index in range(0, 96, 8):
        batch = make_batch(dataset, range(index, index + 8))
        for row in range(8):
            positions, documents, mask = naive_rules(batch.tokens_BS[row].tolist(), EOD)
            assert batch.position_ids_BS[row].tolist() == positions
            assert batch.document_ids_BS[row].tolist() == documents
            assert batch.loss_mask_BS[row].tolist() == mask


def test_documents_without_eod_are_told_apart_too():
    tokens = np.array([[5, 6, 7, 8], [5, 0, 0, 8]])
    numbers = document_numbers(tokens, [np.array([0, 2, 4]), np.array([], dtype=np.int64)], eod=0)
    assert numbers.tolist() == [[0, 0, 1, 1], [0, 0, 1, 2]]
    assert positions_in_documents(numbers).tolist() == [[0, 1, 0, 1], [0, 1, 0, 0]]


def test_without_rules_nothing_is_reset(dataset):
    dataset.rules = Rules(EOD)
    batch = next(MicroBatches(dataset, 4, 0, 1))
    assert batch.document_ids_BS is None
    assert batch.position_ids_BS.tolist() == [list(range(8))] * 4
    assert batch.loss_mask_BS.sum() == 32


class Failing:
    """A dataset that fails at sample 5."""

    domains, rules = ("x",), Rules(EOD)

    def __len__(self):
        return 100

    def sample_with_starts(self, index):
        if index == 5:
            raise DataError("bad sample 5")
        return np.full(9, index), 0, np.array([0])


@pytest.mark.parametrize("prefetch", [0, 2])
def test_errors_come_out_in_their_place(prefetch):
    batches = MicroBatches(Failing(), 1, 0, 1, 0, prefetch)
    assert [next(batches).sample_ids_B.item() for _ in range(5)] == list(range(5))
    with pytest.raises(DataError, match="bad sample 5"):
        next(batches)
    assert batches.consumed_samples == 5


def readers():
    return [thread for thread in threading.enumerate() if thread.name == "data-read-ahead"]


def test_the_thread_ends(dataset):
    with MicroBatches(dataset, 1, 0, 1, 0, 2) as batches:
        next(batches)
        assert len(readers()) == 1
    assert readers() == []
    dropped = MicroBatches(dataset, 1, 0, 1, 0, 2)
    next(dropped)
    del dropped
    gc.collect()
    end = time.monotonic() + 2
    while readers() and time.monotonic() < end:
        time.sleep(0.01)
    assert readers() == []
