"""Bits per byte are right for every tokenizer: the sizes of a text's ids sum to its bytes."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest

from data import prepare, unigram
from data.indexed import IndexedFile
from data.piece_bytes import PieceBytes
from data.text_bytes import TextBytes
from data.tokenizer import build_tokenizer
from tests.data.small_tokenizers import (
    BY_REPORT,
    CHINESE,
    EXACT,
    HOSTILE,
    KINDS,
    SPACE_WHERE_NONE,
    TEXTS,
    trained,
    word_level,
)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """name -> (--tokenizer-type, path), trained when it is first asked for."""
    folder, made = tmp_path_factory.mktemp("tokenizers"), {}

    def get(name):
        if name not in made:
            kind, train = KINDS[name]
            content = train()
            made[name] = kind, folder / name.replace(" ", "_")
            made[name][1].write_bytes(content if isinstance(content, bytes) else content.encode())
        return made[name]

    return get


@pytest.mark.parametrize("name", EXACT)
def test_the_sizes_of_a_texts_ids_sum_to_its_bytes(built, name):
    made = build_tokenizer(*built(name))
    assert made.pieces.is_exact
    for text in [*TEXTS, *HOSTILE]:
        text = text.lstrip(" ") if name in SPACE_WHERE_NONE else text
        ids = made.encode(text)
        if made.eod in ids:  # spelled out, and this Unigram takes it: data.prepare skips the text
            assert (name, text) == ("unigram with bytes", HOSTILE[-1])
            continue
        assert made.pieces.of_text([*ids, made.eod]) == len(text.encode()), repr(text[:40])
    assert made.pieces.of_text([made.eod]) == 0
    assert made.pieces.inside_V.shape == made.pieces.first_V.shape == (made.vocab_size,)


def test_gpt2s_two_files(tmp_path):
    from tokenizers import models, pre_tokenizers, trainers

    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    trained(models.BPE(), trainer, pre_tokenizers.ByteLevel(add_prefix_space=False)).model.save(
        str(tmp_path)
    )
    files = {"vocab_file": tmp_path / "vocab.json", "merge_file": tmp_path / "merges.txt"}
    made = build_tokenizer("GPT2BPETokenizer", None, **files)
    assert made.pieces.is_exact
    for text in [*TEXTS, *HOSTILE]:
        assert made.pieces.of_text([*made.encode(text), made.eod]) == len(text.encode())


@pytest.mark.parametrize("name", [*BY_REPORT, "word level"])
def test_pieces_that_cannot_tell_say_so(tmp_path, built, name, monkeypatch):
    monkeypatch.setitem(KINDS, "word level", ("HuggingFaceTokenizer", word_level))
    assert not build_tokenizer(*built(name)).pieces.is_exact


def prepared(folder, kind, path, append_eod=True):
    """Prefix of four copies of the texts: a part of whole copies has the mean of the whole."""
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS * 4)
    (folder / "in.jsonl").write_text(lines)
    words = ["--input", str(folder / "in.jsonl"), "--output", str(folder / "p"), "--workers", "1"]
    words += ["--tokenizer-type", kind, "--tokenizer-model", str(path)]
    prepare.main([*words, *(["--append-eod"] if append_eod else [])])
    return folder / "p"


@pytest.mark.parametrize("append_eod", [True, False])
@pytest.mark.parametrize("name", KINDS)
def test_bits_per_byte_are_equal_over_tokenizers(tmp_path, built, name, append_eod, capsys):
    """A loss of one bit for each byte of the text is 1 bit a byte with every tokenizer, to 0.1%."""
    kind, path = built(name)
    prefix = prepared(tmp_path, kind, path, append_eod)
    loses_much = name in BY_REPORT and name != "unigram nfkc"  # 0.8% of these texts
    assert ("does not keep the text" in capsys.readouterr().out) == loses_much
    made = build_tokenizer(kind, path)
    file, text_bytes = IndexedFile(prefix), TextBytes.of(made)
    found = unigram.count_bytes(file, 0, len(file), text_bytes)
    right = 4 * sum(len(text.encode()) for text in TEXTS)
    assert found == pytest.approx(right, rel=1e-3 if append_eod else 2e-3)
    half = unigram.count_bytes(file, len(TEXTS), 3 * len(TEXTS), text_bytes)
    assert half == pytest.approx(right / 2, rel=2e-3)
    if append_eod and name in EXACT and name not in SPACE_WHERE_NONE:
        assert text_bytes.scale(file) == 1.0 and found == right


def test_the_issues_numbers(tmp_path, built):
    """Loss 5.7 nats a token: bits a byte by the text, not by decoding a token at a time."""
    for name in ("llama2", "gpt2"):
        made = build_tokenizer(*built(name))
        ids = made.encode(CHINESE * 9)
        right = 5.7 * len(ids) / math.log(2) / len((CHINESE * 9).encode())
        bits = 5.7 * len(ids) / math.log(2) / made.pieces.of_text(ids)
        assert bits == pytest.approx(right, rel=1e-9)
        alone = sum(len(made.decode([index]).encode()) for index in ids)
        assert abs(alone / len((CHINESE * 9).encode()) - 1) > 0.1


def test_evaluation_counts_the_bytes_of_its_labels(tmp_path, built):
    """A micro-batch of two domains, one of them by its report."""
    import torch

    from megatron_ext.train.evaluate import count_bytes

    made = build_tokenizer(*built("llama2"))
    text_bytes, texts = TextBytes.of(made), TEXTS[:2]
    streams = [[made.eod, *made.encode(text), made.eod] for text in texts]
    width = max(map(len, streams))
    rows = np.array([stream + [made.eod] * (width - len(stream)) for stream in streams])
    mask = np.ones((2, width - 1), dtype=np.float32)
    batch = SimpleNamespace(
        tokens_BS=torch.from_numpy(rows[:, :-1].copy()),
        labels_BS=torch.from_numpy(rows[:, 1:].copy()),
        loss_mask_BS=torch.from_numpy(mask),
        domain_ids_B=torch.tensor([1, 0]),
    )
    sizes = [len(text.encode()) for text in texts]
    assert count_bytes(batch, text_bytes, np.array([1.0, 1.0])) == sum(sizes)
    assert count_bytes(batch, text_bytes, np.array([2.0, 0.5])) == 0.5 * sizes[0] + 2 * sizes[1]
    batch.loss_mask_BS[0] = 0
    assert count_bytes(batch, text_bytes, np.array([1.0, 1.0])) == sizes[1]
    batch.labels_BS[1] = made.vocab_size + 3  # a padded vocabulary's id is no reason to end
    assert count_bytes(batch, text_bytes, np.array([1.0, 1.0])) >= 0


class Member:
    def __init__(self, file):
        self.file = file


class Blend:
    def __init__(self, *files):
        self.members, self.domains = [Member(file) for file in files], tuple("abc"[: len(files)])


class Made:
    domains = ("mock",)


@pytest.mark.parametrize("name", ["wordpiece", "llama3"])
def test_a_file_without_report_and_pieces_that_cannot_tell_have_no_bits_per_byte(
    tmp_path, built, name, capsys
):
    kind, path = built(name)
    prefix = prepared(tmp_path, kind, path)
    made, file = build_tokenizer(kind, path), IndexedFile(prefix)
    exact, report = TextBytes.of(made), tmp_path / "p.report.json"
    scale = exact.scale(file)
    assert exact.scales(Blend(file, file)).tolist() == [scale, scale]
    lines = exact.notes((None, Blend(file), Made()))
    assert (
        len(lines) == (name == "wordpiece") and "by its report" in "".join(lines) * 1 or not lines
    )
    words = ["--data-path", str(prefix), "--split", "50,50,0", "--out", str(tmp_path / "u.json")]
    words += ["--tokenizer-type", kind, "--tokenizer-model", str(path)]
    unigram.main(words)
    assert "bits_per_byte" in json.loads((tmp_path / "u.json").read_text())
    written = report.read_text()
    wrong = [written.replace('"pieces"', '"decoding"'), written.replace('"bytes": ', '"bytes": -')]
    for content in ("{}", "[]", *wrong):
        report.write_text(content)
        assert exact.scale(file) == (1.0 if name == "llama3" else None)
        assert (exact.scales(Blend(file)) is None) == (name == "wordpiece")
        assert (exact.scales(Made()) is None) == (name == "wordpiece")
    unigram.main(words)
    assert ("bits_per_byte" in json.loads((tmp_path / "u.json").read_text())) == (name == "llama3")
    line = "".join(exact.notes((Blend(file),)))
    assert line.startswith("warning: no bits per byte") == (name == "wordpiece")


def test_a_report_of_another_tokenizer_or_pair_is_not_taken(tmp_path, built):
    kind, path = built("wordpiece")
    file = IndexedFile(prepared(tmp_path, kind, path))
    made = build_tokenizer(kind, path)
    assert TextBytes(made.pieces, made.fingerprint).scale(file) > 1.05
    assert TextBytes(made.pieces, "another").scale(file) is None
    report = json.loads((tmp_path / "p.report.json").read_text())
    (tmp_path / "p.report.json").write_text(json.dumps({**report, "tokens": 5}))
    assert TextBytes(made.pieces, made.fingerprint).scale(file) is None


def test_numbers_of_the_null_tokenizer():
    made = build_tokenizer("NullTokenizer", None, vocab_size=1001)
    for text in ("5 17 3", "0", "999 1000 10 9"):
        assert made.pieces.of_text([*made.encode(text), made.eod]) == len(text)


def test_counting_by_hand():
    pieces = PieceBytes(np.array([0, 3, 2]), np.array([0, 2, 2]), (0,))
    assert pieces.count(np.array([0, 1, 1]), np.array([1, 1, 2])).tolist() == [2, 3, 2]
    assert pieces.of_text([1, 1, 0]) == 5 and pieces.of_text([1, 1, 0], behind_border=False) == 6
    assert pieces.of_text([]) == 0
