"""The unigram baseline against counting by hand."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from data import unigram
from data.indexed import IndexedFile, write_pair
from data.piece_bytes import PieceBytes
from megatron_ext.errors import ConfigError, DataError


class Letters:
    """Ids 0 to 4; id i stands for i bytes (0: the end of a document)."""

    vocab_size, fingerprint = 5, "letters"
    pieces = PieceBytes(np.arange(5), np.arange(5), (0,))


def make(folder, name, documents):
    write_pair(folder / name, documents, np.uint16)
    return str(folder / name)


def test_counts_are_of_the_documents_asked_for(tmp_path):
    prefix = make(tmp_path, "a", [[1, 1, 2], [], [3, 0], [4]])
    file = IndexedFile(prefix)
    assert unigram.count_tokens(file, 0, 2, 5).tolist() == [0, 2, 1, 0, 0]
    assert unigram.count_tokens(file, 2, 4, 5).tolist() == [1, 0, 0, 1, 1]
    assert unigram.count_tokens(file, 4, 4, 5).tolist() == [0] * 5


def test_a_token_outside_the_vocabulary_is_refused(tmp_path):
    prefix = make(tmp_path, "a", [[1, 7]])
    with pytest.raises(DataError, match="7 is outside the vocabulary of 5"):
        unigram.count_tokens(IndexedFile(prefix), 0, 1, 5)


def test_one_domain_by_hand(tmp_path):
    """Training 1 1 2 3, validation 1 4: p(1) = 3/9, p(4) = 1/9, bytes 5."""
    prefix = make(tmp_path, "a", [[1, 1], [2, 3], [1, 4]])
    found = unigram.measure([prefix], "67,33,0", Letters())
    nats = -(math.log(3 / 9) + math.log(1 / 9)) / 2
    assert found["nats_per_token"] == pytest.approx(nats, rel=1e-12)
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / 2.5, rel=1e-12)
    assert (found["train_tokens"], found["valid_tokens"]) == (4, 2)


def test_domains_count_by_weight_not_by_size():
    """300 tokens against 100 with weights 1:3: the small domain makes three quarters."""
    large, small = np.array([300.0, 0, 0]), np.array([0, 50.0, 50.0])
    by_weight = unigram.blended([large, small], [1.0, 3.0])
    assert by_weight.tolist() == [100, 150, 150]
    assert unigram.blended([large, small], [None, None]).tolist() == [300, 50, 50]
    assert unigram.blended([large, np.zeros(3)], [1.0, 3.0]).tolist() == [300, 0, 0]


def test_even_frequencies_cost_the_logarithm_of_the_vocabulary():
    even = np.full(16, 10.0)
    assert unigram.nats_per_token(even, np.arange(1.0, 17.0)) == pytest.approx(math.log(16))


def test_the_command_writes_json_and_refuses_a_bad_split(tmp_path, bpe_path):
    prefix = make(tmp_path, "a", [[1, 1], [2, 3], [1, 4]])
    words = ["--data-path", prefix, "--out", str(tmp_path / "new" / "u.json")]
    kind = ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", str(bpe_path)]
    unigram.main([*words, *kind, "--split", "67,33,0"])
    found = json.loads((tmp_path / "new" / "u.json").read_text())
    assert found["vocab_size"] == 400 and found["valid_tokens"] == 2
    with pytest.raises(ConfigError, match="--split x"):
        unigram.main([*words, *kind, "--split", "x"])
    with pytest.raises(DataError, match="without tokens"):
        unigram.main([*words, *kind, "--split", "100,0,0"])
