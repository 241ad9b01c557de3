"""One document never ends the job: it is named, skipped and counted, however it fails, is read or
filtered, and in whatever process.
"""

from __future__ import annotations

import base64
import gzip
import json
import tracemalloc
from importlib.util import find_spec

import numpy as np
import pytest

from data import foreign_tokenizers, prepare, shards
from data.documents import Skipped, find_sources, read_piece, whole
from data.indexed import IndexedFile
from data.piece_bytes import PieceBytes
from data.tokenizer import build_tokenizer
from megatron_ext.errors import DataError
from tests.data.test_tokenizers import bytelevel

TIKTOKEN = "TikTokenizer"


class Panic(BaseException):
    """As pyo3 raises it: no Exception."""


FAILURES = (
    Panic("StackOverflow"),
    MemoryError(),
    RecursionError("too deep"),
    ValueError("two\nlines"),
    OSError("no file"),
    DataError("the tokenizer gave id 9"),
)


class Failing:
    """A tokenizer of letters that raises on a text that begins with a number."""

    vocab_size, eod, bos, fingerprint = 300, 299, None, "letters"
    pieces = PieceBytes(np.ones(300, np.int64), np.ones(300, np.int64), (299,))

    def encode(self, text):
        if text[0].isdigit():
            raise FAILURES[int(text[0])]
        if text == "stop":
            raise KeyboardInterrupt
        return list(text.encode())


def write_jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def shard_of(folder, texts):
    (source,), _ = find_sources([write_jsonl(folder / "in.jsonl", texts)])
    return shards.write_shard(shards.Recipe(folder, "text", True), 0, [whole(source)], Failing())


@pytest.mark.parametrize("number", range(len(FAILURES)))
def test_whatever_the_tokenizer_raises_ends_one_document(tmp_path, number):
    facts = shard_of(tmp_path, ["one", f"{number} fails", "two"])
    error = FAILURES[number]
    assert facts.skipped.counts == {f"tokenizer: {type(error).__name__}": 1}
    ((place,),) = facts.skipped.examples.values()
    said = " ".join(str(getattr(error, "what", error)).split())
    assert place == f"{tmp_path}/in.jsonl byte 16" + (f": {said}" if said else "")
    assert (facts.documents, facts.tokens, facts.text_bytes) == (2, 8, 6)


def test_asking_to_stop_is_no_fault_of_a_document(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        shard_of(tmp_path, ["one", "stop", "two"])


def vocabulary(folder):
    tokens = [bytes([byte]) for byte in range(256)] + [b" " * n for n in range(2, 81)] + [b" the"]
    lines = [f"{base64.b64encode(token).decode()} {rank}" for rank, token in enumerate(tokens)]
    (folder / "v.tiktoken").write_text("\n".join(lines))
    return folder / "v.tiktoken"


@pytest.mark.parametrize("pattern", list(foreign_tokenizers.TIKTOKEN_PATTERNS))
def test_tiktoken_encodes_a_run_of_spaces_that_its_engine_cannot(tmp_path, pattern, monkeypatch):
    made = build_tokenizer(TIKTOKEN, vocabulary(tmp_path), tiktoken_pattern=pattern)
    text = "x" + " " * 400_000 + " the\n\n"
    ids = made.encode(text)
    assert made.decode(ids) == text and len(ids) < 7000
    texts = ["a  b\n\n the\t\tx ", "\u00a0\u3000 the,\r\n\n", "  12345 don't  ", " ", ""]
    texts.append("the" + " " * 120_000 + "x\n" + "\t" * 110_000)
    plain = [made.tokenizer.encode_ordinary(text) for text in texts]
    monkeypatch.setattr(foreign_tokenizers, "LONGEST_SPACE", 0)
    assert [made.encode(text) for text in texts] == plain


def test_prepare_skips_and_counts_with_workers_and_executors(tmp_path, texts, capsys):
    """A tokenizer whose end of a document is an ordinary token: a text can spell it."""
    (tmp_path / "t").mkdir()
    made = bytelevel(tmp_path / "t", texts)
    settings = json.loads(made.to_str())
    settings["added_tokens"][0]["special"] = False
    (tmp_path / "t" / "tokenizer.json").write_text(json.dumps(settings))
    for number in range(2):
        write_jsonl(tmp_path / f"{number}.jsonl", ["fine", "a <|endoftext|> b", "also" * 300_000])
    words = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(tmp_path / "t")]
    words += ["--append-eod", "--input", str(tmp_path / "0.jsonl"), str(tmp_path / "1.jsonl")]
    ways = [["--workers", "1"], ["--workers", "2"]]
    if find_spec("datatrove") is not None:
        ways.append(["--executor", "local", "--workers", "2"])
    found = set()
    for number, way in enumerate(ways):
        prefix = tmp_path / f"p{number}"
        prepare.main([*words, *way, "--output", str(prefix)])
        report = json.loads((tmp_path / f"p{number}.report.json").read_text())
        assert report["skipped"] == {"tokenizer: DataError": 2} and report["documents"] == 4
        found.add((prefix.with_suffix(".bin").read_bytes(), str(report["skipped_examples"])))
        assert (
            f"2 tokenizer: DataError (first: {tmp_path}/0.jsonl byte 17" in capsys.readouterr().out
        )
    assert len(found) == 1
    write_jsonl(tmp_path / "0.jsonl", ["a <|endoftext|> b"])
    with pytest.raises(DataError, match=r"skipped: tokenizer: DataError: 1 .*spells the end"):
        prepare.main(
            [*words[:5], "--input", str(tmp_path / "0.jsonl"), "--output", str(tmp_path / "q")]
        )


def test_a_filter_that_fails_on_a_document_leaves_it_out(tmp_path, bpe_path, monkeypatch):
    pytest.importorskip("datatrove", reason="pip install -r requirements-data.txt")
    from datatrove.pipeline.filters import RegexFilter

    def filter_(self, doc):
        if "bad" in doc.text:
            raise RecursionError("deep")
        return True

    monkeypatch.setattr(RegexFilter, "filter", filter_)
    path = write_jsonl(tmp_path / "x.jsonl", ["fine", "bad", "good"])
    words = ["--input", str(path), "--output", str(tmp_path / "p"), "--filter", "regex:lorem"]
    words += ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", str(bpe_path)]
    prepare.main([*words, "--workers", "1"])
    report = json.loads((tmp_path / "p.report.json").read_text())
    assert report["skipped"] == {"regex: RecursionError": 1}
    assert report["skipped_examples"] == {"regex: RecursionError": [f"{path} byte 17: deep"]}
    assert len(IndexedFile(tmp_path / "p")) == 2


def packed(path, content: bytes) -> None:
    """Writes content the way the last suffix says."""
    if path.suffix == ".gz":
        content = gzip.compress(content, 1)
    elif path.suffix == ".zst":
        import zstandard

        content = zstandard.ZstdCompressor().compress(content)
    path.write_bytes(content)


BOMB_BYTES = 40_000_000
LIMIT = 100_000


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz", "x.jsonl.zst", "x.txt.gz", "x.txt.zst"])
def test_a_document_beyond_the_limit_is_counted_and_never_held(tmp_path, name):
    bomb = b"word " * (BOMB_BYTES // 5)
    if "jsonl" in name:
        bomb = b'{"text": "before"}\n{"text": "' + bomb + b'"}\n{"text": "after"}\n'
    packed(tmp_path / name, bomb)
    del bomb
    (source,), skipped = find_sources([tmp_path / name])
    tracemalloc.start()
    found = list(read_piece(whole(source), "text", skipped, LIMIT))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found == (["before", "after"] if "jsonl" in name else [])
    place = f"{tmp_path}/{name}" + (" byte 19" if "jsonl" in name else "")
    reason = f"larger than --max-document-bytes {LIMIT}"
    assert (skipped.counts, skipped.examples) == ({reason: 1}, {reason: [place]})
    assert peak < 16 << 20, f"{peak} bytes for a limit of {LIMIT}"


@pytest.mark.parametrize("target", [1, 7, 50, 333])
def test_pieces_agree_about_a_line_beyond_the_limit(tmp_path, target):
    texts = [f"line {number} " * (100 if number % 5 == 2 else 2) for number in range(30)]
    (source,), skipped = find_sources([write_jsonl(tmp_path / "x.jsonl", texts)])
    pieces = shards.pieces_of(source, target)
    found = [text for piece in pieces for text in read_piece(piece, "text", skipped, 200)]
    assert found == [text for text in texts if len(text) < 200]
    assert list(skipped.counts.values()) == [6]


@pytest.mark.parametrize("limit,kept", [(10, ["a" * 10]), (11, ["a" * 10, "b" * 11])])
def test_the_limit_itself_is_allowed(tmp_path, limit, kept):
    (tmp_path / "a.txt").write_text("a" * 10)
    (tmp_path / "b.txt").write_text("b" * 11)
    sources, skipped = find_sources([tmp_path])
    assert [t for s in sources for t in read_piece(whole(s), "text", skipped, limit)] == kept


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_values_of_parquet_beyond_the_limit_or_not_utf8_are_counted(tmp_path, suffix):
    import pyarrow
    import pyarrow.parquet

    wrong = pyarrow.array([b"\xff\xfe"]).view(pyarrow.string())
    table = pyarrow.table({"text": ["p", "x" * 5000, None]})
    table = pyarrow.concat_tables([table, pyarrow.table({"text": wrong})])
    pyarrow.parquet.write_table(table, tmp_path / "x")
    content = (tmp_path / "x").read_bytes()
    packed(tmp_path / f"x.parquet{suffix}", content)
    (source,), skipped = find_sources([tmp_path / f"x.parquet{suffix}"])
    assert list(read_piece(whole(source), "text", skipped, 1000)) == ["p"]
    assert skipped.counts == {
        "larger than --max-document-bytes 1000": 1,
        "value of 'text' is not a string": 1,
        "not UTF-8 (lone surrogate)": 1,
    }


def test_memory_that_does_not_suffice_for_a_line_is_counted(tmp_path, monkeypatch):
    def short_of_memory(text):
        raise MemoryError

    (source,), skipped = find_sources([write_jsonl(tmp_path / "x.jsonl", ["a"])])
    monkeypatch.setattr("data.documents.json.loads", short_of_memory)
    assert list(read_piece(whole(source), "text", skipped)) == []
    assert skipped.counts == {"reader: MemoryError": 1}


def test_skipped_keeps_what_was_said_in_one_line():
    skipped = Skipped()
    with skipped.one_document("stage", "place"):
        raise ValueError("x\n" * 500)
    assert skipped.examples == {"stage: ValueError": ["place: " + "x " * 100]}
