"""Small data for the tests of the data package."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from data import sentencepiece_model
from data.indexed import write_pair

WORDS = "the quick brown fox jumps over a lazy dog def return self for in range ( ) : = [ ]".split()


def make_texts(count: int, seed: int = 0) -> list[str]:
    """Texts of a few hundred bytes with lines and indents."""
    state = np.random.RandomState(seed)

    def line() -> str:
        return "    " * state.randint(3) + " ".join(state.choice(WORDS, 8))

    return ["\n".join(line() for _ in range(8)) for _ in range(count)]


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """300 documents."""
    return make_texts(300)


@pytest.fixture(scope="session")
def bpe_path(tmp_path_factory, texts) -> Path:
    """A sentencepiece model of 400 ids."""
    path = tmp_path_factory.mktemp("bpe") / "bpe.model"
    sentencepiece_model.train(texts, 400, path)
    return path


@pytest.fixture
def jsonl(tmp_path, texts) -> Path:
    """The 300 documents, one a line."""
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps({"text": text, "n": 1}) + "\n" for text in texts))
    return path


@pytest.fixture
def pair(tmp_path) -> Path:
    """Prefix of a pair of 50 documents of 0 to 40 tokens below 100, one of them empty."""
    state = np.random.RandomState(7)
    documents = [state.randint(0, 100, state.randint(1, 41)) for _ in range(50)]
    documents[3] = []
    write_pair(tmp_path / "pair", documents, np.uint16)
    return tmp_path / "pair"


@pytest.fixture
def data_cfg():
    """Makes the attributes of cfg.data, with Megatron-LM's defaults."""

    def make(**given) -> SimpleNamespace:
        defaults = dict(
            data_path=None,
            train_data_path=None,
            valid_data_path=None,
            test_data_path=None,
            per_split_data_args_path=None,
            split=None,
            mock_data=False,
            data_cache_path=None,
            mmap_bin_files=True,
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
        )
        return SimpleNamespace(**{**defaults, **given})

    return make
