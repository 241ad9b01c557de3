import json
import os

import numpy as np
import pytest

from data import scan
from data.indexed import IndexedFile, write_pair
from data.storage import sha256_of
from megatron_ext.errors import DataError


def with_bad(prefix, token, dtype=np.int32):
    documents = [[1, 2, 3], [], [4, 5, 6, 7], [8]]
    documents[2][1] = token
    write_pair(prefix, documents, dtype)
    return IndexedFile(prefix)


def test_scan_finds_the_range(pair):
    file = IndexedFile(pair)
    ids = file.read(0, file.num_tokens)
    found = scan.scan(file)
    assert (found["min_token_id"], found["max_token_id"]) == (ids.min(), ids.max())
    assert (ids[found["min_at"]], ids[found["max_at"]]) == (ids.min(), ids.max())


def test_scan_in_chunks(pair, monkeypatch):
    whole = scan.scan(IndexedFile(pair))
    for size in (1, 7, 1000):
        monkeypatch.setattr(scan, "SCAN_TOKENS", size)
        assert scan.scan(IndexedFile(pair)) == whole


@pytest.mark.parametrize(
    ("token", "vocab_size"), [(100, 100), (2**31 - 1, 70000), (-1, 70000), (-(2**31), 100)]
)
def test_an_id_outside_is_named_with_document_and_position(tmp_path, token, vocab_size):
    file = with_bad(tmp_path / "p", token)
    with pytest.raises(DataError) as caught:
        scan.require_range(file, scan.scan(file), vocab_size)
    text = str(caught.value)
    assert (
        f"token id {token} in document 2 at position 1: the vocabulary is 0 to {vocab_size - 1}"
        in text
    )
    assert f"path={tmp_path}/p.bin" in text


def test_inside_is_accepted(tmp_path):
    file = with_bad(tmp_path / "p", 99)
    scan.require_range(file, scan.scan(file), 100)


@pytest.mark.parametrize("hashed_whole", [0, 1 << 32])
def test_report_is_believed_only_for_its_own_bytes(tmp_path, monkeypatch, hashed_whole):
    monkeypatch.setattr(scan, "HASHED_WHOLE_BYTES", hashed_whole)
    file = with_bad(tmp_path / "p", 50)
    path = tmp_path / "p.report.json"
    report = {
        "bin_bytes": (tmp_path / "p.bin").stat().st_size,
        "bin_sha256": sha256_of(tmp_path / "p.bin"),
        "spot_sha256": scan.spot_sha256(tmp_path / "p.bin"),
        "min_token_id": 1,
        "max_token_id": 50,
    }
    path.write_text(json.dumps(report))
    assert scan.examine(file) == {"min_token_id": 1, "max_token_id": 50}
    good = (tmp_path / "p.bin").read_bytes()
    for offset in range(len(good)):
        for bit in (0, 7):
            flipped = good[:offset] + bytes([good[offset] ^ (1 << bit)]) + good[offset + 1 :]
            (tmp_path / "p.bin").write_bytes(flipped)
            with pytest.raises(DataError, match="bytes have changed"):
                scan.require_whole(file, scan.examine(file))
    (tmp_path / "p.bin").write_bytes(good)
    scanned = scan.scan(file)
    for content in (
        "",
        "[]",
        "{}",
        json.dumps({**report, "max_token_id": "50"}),
        json.dumps({**report, "bin_bytes": 1}),
    ):
        path.write_text(content)
        assert scan.examine(file) == scanned


def test_another_content_has_another_key_even_with_the_old_time(tmp_path):
    file = with_bad(tmp_path / "p", 50)
    status, key = os.stat(tmp_path / "p.bin"), scan.cache_key(file)
    with_bad(tmp_path / "p", 51)
    os.utime(tmp_path / "p.bin", ns=(status.st_atime_ns, status.st_mtime_ns))
    assert scan.cache_key(file) != key


def test_needs_no_scan():
    class File:
        dtype = np.dtype("<u2")

    assert scan.needs_no_scan(File, 65536)
    assert not scan.needs_no_scan(File, 65535)
    File.dtype = np.dtype("<i4")
    assert not scan.needs_no_scan(File, 2**40)


def test_first_outside():
    tokens = np.array([0, 5, 9], dtype=np.int32)
    assert scan.first_outside(tokens, 10) is None
    assert scan.first_outside(tokens, 9) == 2
    assert scan.first_outside(np.array([0, -1], dtype=np.int32), 9) == 1
    assert scan.first_outside(np.array([], dtype=np.uint16), 9) is None


def report_of(prefix, **given):
    """What data.prepare writes beside a pair of ids 1 to 50."""
    return {
        "bin_bytes": prefix.with_suffix(".bin").stat().st_size,
        "bin_sha256": sha256_of(prefix.with_suffix(".bin")),
        "idx_sha256": sha256_of(prefix.with_suffix(".idx")),
        "spot_sha256": scan.spot_sha256(prefix.with_suffix(".bin")),
        "min_token_id": 1,
        "max_token_id": 50,
        **given,
    }


def test_an_index_that_is_consistent_and_another_is_found_by_its_hash(tmp_path):
    file = with_bad(tmp_path / "p", 50)
    (tmp_path / "p.report.json").write_text(json.dumps(report_of(tmp_path / "p")))
    scan.require_whole(file, scan.examine(file))
    idx = tmp_path / "p.idx"
    content = bytearray(idx.read_bytes())
    content[-16:-8] = content[-24:-16]  # the last but one document mark: still in order
    idx.write_bytes(content)
    with pytest.raises(DataError, match=r"idx_sha256 is .* path=.*p\.idx"):
        scan.require_whole(file, scan.examine(IndexedFile(tmp_path / "p")))


def test_complete_reads_every_byte_of_a_large_file(tmp_path, monkeypatch):
    monkeypatch.setattr(scan, "HASHED_WHOLE_BYTES", 0)
    monkeypatch.setattr(scan, "SPOT_BYTES", 1)
    monkeypatch.setattr(scan, "SPOTS", 2)
    file = with_bad(tmp_path / "p", 50)
    (tmp_path / "p.report.json").write_text(json.dumps(report_of(tmp_path / "p")))
    content = bytearray((tmp_path / "p.bin").read_bytes())
    content[4] ^= 1
    (tmp_path / "p.bin").write_bytes(content)
    assert "error" not in scan.examine(file), "between the spots"
    assert "bin_sha256" in scan.examine(file, complete=True)["error"]
    assert scan.cache_key(file) != scan.cache_key(file, complete=True)
