import gzip
import json

import pytest

from data.documents import Skipped, find_sources, first_texts, read_piece, single_key, whole
from data.shards import pieces_of, plan
from megatron_ext.errors import ConfigError, DataError


def read_all(inputs, key="text"):
    sources, skipped = find_sources(inputs)
    found = [text for source in sources for text in read_piece(whole(source), key, skipped)]
    return found, skipped


def test_kinds_and_order(tmp_path):
    import pyarrow
    import pyarrow.parquet
    import zstandard

    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "b.md").write_bytes("\ufeffmd\r\n".encode())
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "c.py.gz").write_bytes(gzip.compress(b"x = 1\n"))
    lines = b'{"text": "one"}\n\n{"text": "two"}'
    (tmp_path / "e.jsonl.zst").write_bytes(
        zstandard.ZstdCompressor().compress(lines[:20])
        + zstandard.ZstdCompressor().compress(lines[20:])
    )
    pyarrow.parquet.write_table(
        pyarrow.table({"text": ["p", None, "q"], "n": [1, 2, 3]}), tmp_path / "f.parquet"
    )
    (tmp_path / "g.csv").write_text("not read")
    (tmp_path / ".hidden.txt").write_text("not read")
    found, skipped = read_all([tmp_path, tmp_path / "a.txt"])
    assert found == ["text", "x = 1\n", "md\r\n", "one", "two", "p", "q"]
    assert skipped.counts == {"file name not supported": 1, "value of 'text' is not a string": 1}


def test_what_is_not_text_is_counted_with_its_place(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\x7fELF\0\0")
    (tmp_path / "b.txt").write_bytes(b"ok\xff")
    (tmp_path / "c.txt").write_bytes(b" \n")
    lines = [
        b'{"text": 5}',
        b'{"other": 1, "k": 2}',
        b"not json",
        b'{"text": "\\ud800"}',
        b'"text"',
        b"\xff\xfe",
        b'{"text": "good \\u0000"}',
        b"[" * 100_000,
    ]
    (tmp_path / "d.jsonl").write_bytes(b"\n".join(lines))
    found, skipped = read_all([tmp_path])
    assert found == ["good \0"]
    assert skipped.counts == {
        "binary (NUL byte)": 1,
        "not UTF-8": 2,
        "blank document": 1,
        "value of 'text' is not a string": 1,
        "no key 'text'": 2,
        "line is not JSON": 2,
        "not UTF-8 (lone surrogate)": 1,
    }
    assert skipped.examples["not UTF-8"][0] == f"{tmp_path}/b.txt byte 2"
    assert (
        skipped.examples["no key 'text'"][0]
        == f"{tmp_path}/d.jsonl byte 12 keys present: 'other', 'k'"
    )


@pytest.mark.parametrize("target", [1, 7, 50, 333, 10**6])
def test_pieces_of_a_jsonl_hold_each_line_once(tmp_path, target):
    path = tmp_path / "x.jsonl"
    wanted = [f"line {number} " * (number % 7 + 1) for number in range(60)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in wanted).rstrip("\n"))
    (source,), skipped = find_sources([path])
    pieces = list(pieces_of(source, target))
    assert [text for piece in pieces for text in read_piece(piece, "text", skipped)] == wanted
    assert skipped.counts == {}


def test_plan_holds_each_byte_once(tmp_path):
    for number in range(30):
        (tmp_path / f"{number:02d}.txt").write_text("x" * 100_000)
    (tmp_path / "z.jsonl").write_text('{"text": "y"}\n' * 200_000)
    sources, _ = find_sources([tmp_path])
    shards = plan(sources)
    assert sum(piece.size for shard in shards for piece in shard) == sum(
        source.size for source in sources
    )
    assert len(shards) > 3
    assert max(sum(piece.size for piece in shard) for shard in shards) <= 1 << 20


@pytest.mark.parametrize("name", ["x.jsonl.gz", "x.txt.zst"])
def test_cut_compressed_files_are_errors(tmp_path, name):
    import zstandard

    content = json.dumps({"text": "word " * 5000}).encode() + b"\n"
    packed = (
        gzip.compress(content)
        if name.endswith("gz")
        else zstandard.ZstdCompressor().compress(content)
    )
    path = tmp_path / name
    for size in range(1, len(packed)):
        path.write_bytes(packed[:size])
        with pytest.raises(DataError, match="truncated or damaged"):
            read_all([path])
    path.write_bytes(packed)
    assert len(read_all([path])[0]) == 1


def test_input_errors_name_the_file(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        find_sources([tmp_path / "missing.txt"])
    with pytest.raises(DataError, match="no file to read"):
        find_sources([tmp_path])
    (tmp_path / "x.bin").write_bytes(b"1")
    with pytest.raises(DataError, match="name that says nothing"):
        find_sources([tmp_path / "x.bin"])
    (tmp_path / "x.parquet").write_bytes(b"PAR1 no parquet at all PAR1")
    with pytest.raises(DataError, match="damaged parquet"):
        read_all([tmp_path / "x.parquet"])
    with pytest.raises(ConfigError, match="names 2 keys"):
        single_key(["a", "b"])


def test_tokenizer_texts_take_a_share_of_each_file(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text(
            "".join(json.dumps({"text": name * 90}) + "\n" for _ in range(100))
        )
    found = list(first_texts([tmp_path], "text", 4000))
    assert 15 <= found.count("a" * 90) == found.count("b" * 90) <= 25
    (tmp_path / "a.jsonl").unlink()
    with pytest.raises(DataError, match="no document has the key 'body'.*'text'"):
        list(first_texts([tmp_path], "body", 4000))


def test_skipped_merge_keeps_five_examples():
    total = Skipped()
    for part in range(4):
        skipped = Skipped()
        skipped.add("why", f"a{part}", 2)
        skipped.add("why", f"b{part}")
        total.merge(skipped)
    assert total.counts == {"why": 12}
    assert total.examples == {"why": ["a0", "b0", "a1", "b1", "a2"]}


def test_an_input_that_cannot_be_read_is_not_called_a_full_disk(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("text")
    (source,), skipped = find_sources([path])
    path.unlink()
    path.mkdir()
    with pytest.raises(DataError, match="input cannot be read: Is a directory"):
        list(read_piece(whole(source), "text", skipped))
