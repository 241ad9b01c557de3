import struct

import numpy as np
import pytest

from data.indexed import HEADER, IndexedFile, token_dtype, write_pair
from megatron_ext.errors import DataError

OFFSETS = {"magic": 0, "version": 9, "dtype": 17, "sequences": 18, "documents": 26}


def test_reads_what_was_written(pair):
    for mmap in (True, False):
        file = IndexedFile(pair, mmap)
        assert len(file) == 50
        assert file.num_tokens == file.lengths.sum()
        whole = file.read(0, file.num_tokens)
        assert np.array_equal(whole, np.concatenate([file.document(index) for index in range(50)]))
        for token in (0, 5, file.num_tokens - 1):
            document, position = file.locate(token)
            assert file.document(document)[position] == whole[token]
            assert len(file.document(document)) > position


def test_megatron_core_reads_it_too(pair):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    theirs, ours = IndexedDataset(str(pair)), IndexedFile(pair)
    assert len(theirs) == len(ours)
    for index in range(len(ours)):
        assert theirs[index].dtype == np.uint16
        assert np.array_equal(theirs[index], ours.document(index))
    assert np.array_equal(theirs.document_indices, np.arange(51))


def test_we_read_what_megatron_core_writes(tmp_path):
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(tmp_path / "m.bin"), dtype=np.int32)
    builder.add_document(np.array([1, 2, 3, 4]), [3, 1])
    builder.add_document(np.array([70000]), [1])
    builder.finalize(str(tmp_path / "m.idx"))
    file = IndexedFile(tmp_path / "m")
    assert [file.document(index).tolist() for index in range(3)] == [[1, 2, 3], [4], [70000]]


def test_type_of_ids_is_megatrons_rule():
    assert (token_dtype(65499), token_dtype(65500)) == (np.dtype(np.uint16), np.dtype(np.int32))


def patched(path, offset, content):
    data = bytearray(path.read_bytes())
    data[offset : offset + len(content)] = content
    path.write_bytes(bytes(data))


def refused(prefix, *words):
    with pytest.raises(DataError) as caught:
        IndexedFile(prefix)
    text = str(caught.value)
    assert "\n" not in text
    assert f"path={prefix}" in text
    assert " do=" in text
    for word in words:
        assert word in text, text


@pytest.mark.parametrize("field", OFFSETS)
def test_each_flipped_header_byte_is_refused(pair, field):
    idx = pair.with_suffix(".idx")
    good = idx.read_bytes()
    end = dict(zip(OFFSETS, [*list(OFFSETS.values())[1:], HEADER.size], strict=True))[field]
    for offset in range(OFFSETS[field], end):
        for bit in range(8):
            patched(idx, offset, bytes([good[offset] ^ (1 << bit)]))
            refused(pair)
            idx.write_bytes(good)
    IndexedFile(pair)


def test_every_bit_of_the_arrays_is_checked(pair):
    idx = pair.with_suffix(".idx")
    good = idx.read_bytes()
    marks = len(good) - 8 * 51
    for offset in range(HEADER.size, len(good)):
        patched(idx, offset, bytes([good[offset] ^ 0x80]))
        if offset < marks + 8 or offset >= len(good) - 8:
            refused(pair)
        else:
            with pytest.raises(DataError, match="document mark"):
                IndexedFile(pair)
        idx.write_bytes(good)


def test_messages_name_offset_and_numbers(pair):
    idx = pair.with_suffix(".idx")
    good = idx.read_bytes()
    for offset, content, words in [
        (0, b"MZ", ["not a Megatron index", "offset 0"]),
        (9, struct.pack("<Q", 2), ["version at offset 9 is 2, expected 1"]),
        (17, b"\x09", ["dtype code at offset 17 is 9"]),
        (17, b"\x07", ["float32", "not token ids"]),
        (18, struct.pack("<Q", 0), ["sequence count at offset 18 is 0"]),
        (18, struct.pack("<Q", 2**62), ["truncated", "4611686018427387904 sequences"]),
        (HEADER.size + 8, struct.pack("<i", -5), ["length of sequence 2 at offset 42 is -5"]),
        (HEADER.size + 8, struct.pack("<i", 2**31 - 1), ["pointer of sequence 3"]),
        (HEADER.size + 200, struct.pack("<q", 2), ["pointer of sequence 0 at offset 234 is 2"]),
        (HEADER.size + 600, struct.pack("<q", 1), ["document marks from offset 634"]),
        (HEADER.size + 616, struct.pack("<q", 40), ["document mark 3", "less than 40"]),
    ]:
        patched(idx, offset, content)
        refused(pair, *words)
        idx.write_bytes(good)


def test_truncations_and_extra_bytes_are_refused(pair):
    for suffix in (".idx", ".bin"):
        path = pair.with_suffix(suffix)
        good = path.read_bytes()
        for size in [*range(0, 64), *range(64, len(good), 7), len(good) - 1]:
            path.write_bytes(good[:size])
            refused(pair)
        path.write_bytes(good + b"\0")
        refused(pair, "too long")
        path.write_bytes(good)
    path.unlink()
    refused(pair, ".bin file of the data path cannot be read: No such file")


def test_wrong_pair_is_refused(tmp_path, pair):
    write_pair(tmp_path / "other", [[1, 2, 3]], np.uint16)
    (tmp_path / "other.bin").rename(pair.with_suffix(".bin"))
    refused(pair, "truncated: 6 bytes", "tokens of 2 bytes")


def test_all_empty_is_refused(tmp_path):
    write_pair(tmp_path / "e", [[], []], np.uint16)
    (tmp_path / "e.bin").write_bytes(b"")
    refused(tmp_path / "e", "empty")
