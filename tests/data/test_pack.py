import numpy as np
import pytest

from data import pack


def naive_stream(lengths, seed, epochs):
    """(document, position) of every token of the first epochs, one by one."""
    return [
        (int(document), position)
        for epoch in range(epochs)
        for document in pack.shuffled(len(lengths), seed, epoch, pack.DOCUMENT_ORDER)
        for position in range(lengths[document])
    ]


def naive_samples(lengths, seq_length, seed, epochs):
    """Samples in the order of serving, by cutting the written-out stream."""
    tokens = sum(lengths)
    stream = naive_stream(lengths, seed, epochs + seq_length // tokens + 2)
    served = []
    for epoch in range(epochs):
        begins = [
            b
            for b in range(0, epochs * tokens, seq_length)
            if epoch * tokens <= b < (epoch + 1) * tokens
        ]
        order = pack.shuffled(len(begins), seed, epoch, pack.SAMPLE_ORDER)
        served += [stream[begins[k] : begins[k] + seq_length + 1] for k in order]
    return served


def fast_sample(sample, lengths, seq_length, seed):
    pieces = pack.fragments(
        sample,
        lengths,
        int(sum(lengths)),
        seq_length,
        lambda epoch: pack.build_epoch(np.array(lengths), seq_length, seed, epoch),
    )
    return [(document, offset + k) for document, offset, count in pieces for k in range(count)]


@pytest.mark.parametrize(
    "lengths", [[5], [1], [3, 0, 4, 1, 0], [7, 9, 2, 30, 1, 1, 1], [0, 0, 63], [2] * 20]
)
@pytest.mark.parametrize("seq_length", [1, 2, 4, 7, 16, 64])
def test_cutting_equals_the_naive_concatenation(lengths, seq_length):
    for seed in (0, 1234):
        epochs = 3
        wanted = naive_samples(lengths, seq_length, seed, epochs)
        assert pack.samples_before(epochs, sum(lengths), seq_length) == len(wanted)
        assert [fast_sample(i, lengths, seq_length, seed) for i in range(len(wanted))] == wanted


def test_each_epoch_serves_each_token_once_as_input():
    lengths, seq_length = [7, 9, 2, 30, 16], 8
    tokens = sum(lengths)
    count = pack.samples_before(seq_length, tokens, seq_length)
    assert count * seq_length == seq_length * tokens
    inputs = [token for i in range(count) for token in fast_sample(i, lengths, seq_length, 5)[:-1]]
    _, times = np.unique(np.array(inputs), axis=0, return_counts=True)
    assert set(times) == {seq_length}


def test_epochs_are_shuffled_differently_and_depend_on_the_seed():
    orders = {
        tuple(pack.shuffled(50, seed, epoch, purpose))
        for seed in (1, 2**33 + 1)
        for epoch in (0, 1)
        for purpose in (1, 2)
    }
    assert len(orders) == 8
    assert all(sorted(order) == list(range(50)) for order in orders)


def test_the_order_is_frozen():
    """A change here changes what every resumed run reads next."""
    assert pack.shuffled(10, 1234, 0, pack.DOCUMENT_ORDER).tolist() == FROZEN_DOCUMENTS
    index = pack.build_epoch(np.array([5, 3, 8, 1]), 4, 1234, 1)
    assert (
        index.documents.tolist(),
        index.entries.tolist(),
        index.offsets.tolist(),
        index.order.tolist(),
    ) == FROZEN


FROZEN_DOCUMENTS = [7, 4, 2, 3, 0, 5, 9, 1, 6, 8]
FROZEN = ([0, 1, 3, 2], [0, 1, 3, 3], [3, 2, 2, 6], [2, 3, 1, 0])


@pytest.mark.parametrize("tokens", [1, 9, 63, 64, 65, 1000])
@pytest.mark.parametrize("seq_length", [1, 8, 64])
def test_epoch_of_inverts_samples_before(tokens, seq_length):
    for epoch in range(6):
        for sample in range(
            pack.samples_before(epoch, tokens, seq_length),
            pack.samples_before(epoch + 1, tokens, seq_length),
        ):
            assert pack.epoch_of(sample, tokens, seq_length) == epoch


@pytest.mark.parametrize(
    "split", ["969,30,1", "99,1,0", "100,0,0", "1", "0.9,0.1", "949/50/1", "98,2", "1,1,1"]
)
@pytest.mark.parametrize("documents", [1, 2, 3, 10, 441, 12345])
def test_split_is_megatrons_arithmetic(split, documents):
    from megatron.core.datasets.blended_megatron_dataset_config import (
        convert_split_vector_to_split_matrix,
        parse_and_normalize_split,
    )

    matrix = convert_split_vector_to_split_matrix(parse_and_normalize_split(split))
    theirs = [
        (0, 0) if part is None else tuple(int(round(edge * float(documents))) for edge in part)
        for part in matrix
    ]
    ours = pack.split_ranges(split, documents)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine == other or (mine[0] == mine[1] and other[0] == other[1])


@pytest.mark.parametrize("split", ["", "0,0,0", "1,2,3,4", "a", "-1,2", "nan", "inf"])
def test_bad_splits(split):
    with pytest.raises(ValueError):
        pack.split_ranges(split, 10)
