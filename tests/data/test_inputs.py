"""The files of a run: what is noticed while it reads them, and what their hashes find."""

import os
import random
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from data import inputs
from data.cache import IndexCache
from data.datasets import open_datasets
from data.indexed import paths_of, write_pair
from data.inputs import BY_BLOCKS, content_of, data_files, stamped
from data.tokenizer import files_of
from megatron_ext.errors import DataError


def _grown(path):
    path.write_bytes(path.read_bytes() + b"\0\0")


def _rewritten(path):
    """The same size, other bytes, the time put back by hand is what only the inode cannot see."""
    path.write_bytes(bytes(byte ^ 1 for byte in path.read_bytes()))


def _replaced(path):
    """As rsync and editors do: a new file under the old name, with the old time."""
    fresh, status = path.with_suffix(".fresh"), path.stat()
    shutil.copy(path, fresh)
    os.utime(fresh, ns=(status.st_atime_ns, status.st_mtime_ns))
    os.replace(fresh, path)


CHANGES = {
    "grown": (_grown, r"size \d+ -> \d+ bytes"),
    "rewritten": (_rewritten, "time of change .* -> "),
    "replaced": (_replaced, r"another file \(inode \d+ -> \d+\)"),
    "removed": (os.remove, "it is gone"),
}


@pytest.fixture
def files(tmp_path):
    """A pair and a tokenizer file."""
    write_pair(tmp_path / "a", [[1, 2, 3], [4, 5]], np.uint16)
    words = tmp_path / "bpe.model"
    words.write_bytes(b"words")
    for path in (*paths_of(tmp_path / "a"), words):
        os.utime(path, (1, 1))
    return [*data_files([str(tmp_path / "a")]), words]


@pytest.mark.parametrize("which", range(3))
@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_changes_under_the_run_is_named(change, which, files):
    seen = stamped(files)
    seen.check()
    alter, said = CHANGES[change]
    alter(files[which])
    with pytest.raises(DataError, match=said) as error:
        seen.check()
    assert error.value.path == str(files[which]) and error.value.code == 65


def test_a_report_that_is_garbage_is_named(files):
    prefix = str(files[0])[: -len(".bin")]
    cfg = SimpleNamespace(data_path=[prefix], split="1,0,0", data_cache_path=None)
    Path(f"{prefix}.report.json").write_text("{garbage")
    sizes = {"seq_length": 2, "num_samples": (2, 0, 0), "seed": 1, "vocab_size": 9, "eod": 0}
    splits = open_datasets(cfg, **sizes, is_builder=True, barrier=lambda: None)
    assert len([line for line in splits.warnings if "a.report.json is no report" in line]) == 1


def test_reading_and_touching_nothing_is_no_change(files):
    seen = stamped([*files, files[0].with_name("missing")])
    for path in files:
        path.read_bytes()
        path.chmod(0o600)
    seen.check()


def _content(files, cache, complete=False):
    prefix = str(files[0])[: -len(".bin")]
    return content_of([prefix], files[2:], IndexCache(cache, required=False), complete), prefix


def test_any_changed_byte_of_a_small_file_is_found(files, tmp_path):
    """Also where size, time and inode are put back: the cache of hashes sees the ctime."""
    before, prefix = _content(files, tmp_path / "cache")
    state = random.Random(1)
    for path, kind in zip(files, ("bin", "idx", "hash")):
        content, status = path.read_bytes(), path.stat()
        at = state.randrange(len(content))
        path.write_bytes(content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :])
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        after, _ = _content(files, tmp_path / "cache")
        is_data = kind != "hash"
        old = before["data_content"][prefix] if is_data else before["tokenizer_content"][path.name]
        new = after["data_content"][prefix] if is_data else after["tokenizer_content"][path.name]
        assert [name for name in old if old[name] != new[name]] == [kind]
        path.write_bytes(content)


def test_a_large_file_is_known_by_blocks(tmp_path, monkeypatch):
    """Size, first and last block for sure; half a percent of changed blocks with 0.99; every byte
    with --data-hash complete.
    """
    monkeypatch.setattr(inputs, "HASHED_WHOLE_BYTES", 1 << 20)
    monkeypatch.setattr(inputs, "BLOCK_BYTES", 64)
    generator = np.random.default_rng(1)
    tokens = generator.integers(0, 250, size=1_500_000).astype(np.uint16)
    write_pair(tmp_path / "a", [tokens], np.uint16)
    files = data_files([str(tmp_path / "a")])
    prefix = str(tmp_path / "a")
    path = files[0]

    def known(complete=False):
        found = content_of([prefix], [], IndexCache(tmp_path / "none", required=False), complete)
        return found["data_content"][prefix]

    base, whole = known(), known(complete=True)
    assert set(base) == {"path", "bytes", "idx", BY_BLOCKS} and set(whole) - set(base) == {"bin"}
    good = bytearray(path.read_bytes())
    for at in (0, len(good) - 1):
        bad = good.copy()
        bad[at] ^= 1
        path.write_bytes(bad)
        assert known()[BY_BLOCKS] != base[BY_BLOCKS]
        assert known(complete=True)["bin"] != whole["bin"]
    found = 0
    for trial in range(20):
        bad, state = good.copy(), random.Random(trial)
        for _ in range(len(good) // 64 // 200):
            bad[state.randrange(len(good) // 64) * 64 + 5] ^= 1
        path.write_bytes(bad)
        found += known()[BY_BLOCKS] != base[BY_BLOCKS]
    assert found >= 18


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (("NullTokenizer", "x.model"), []),
        (("SentencePieceTokenizer", "x.model"), ["x.model"]),
        (("HuggingFaceTokenizer", "."), ["tokenizer.json"]),
        (("GPT2BPETokenizer", None, "vocab.json", "merges.txt"), ["vocab.json", "merges.txt"]),
        ((None, None), []),
    ],
)
def test_files_of_a_tokenizer(kind, expected):
    assert [str(path) for path in files_of(*kind)] == expected
