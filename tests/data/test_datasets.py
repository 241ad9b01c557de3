import json
import os

import numpy as np
import pytest

from data import open_datasets
from data.datasets import blends_of
from data.indexed import IndexedFile, write_pair
from megatron_ext.errors import ConfigError, DataError, DiskError

VOCAB = 1000


@pytest.fixture
def two(tmp_path):
    """Domains a (ids 0-99) and b (ids 100-199), 60 documents each."""
    state = np.random.RandomState(1)
    for base, name in enumerate("ab"):
        write_pair(
            tmp_path / name,
            [100 * base + state.randint(1, 100, state.randint(5, 60)) for _ in range(60)],
            np.uint16,
        )
    return [str(tmp_path / "a"), str(tmp_path / "b")]


def opened(
    cfg,
    num_samples=(100, 0, 0),
    *,
    seq_length=16,
    seed=1,
    vocab_size=VOCAB,
    is_builder=True,
    barrier=lambda: None,
):
    return open_datasets(
        cfg,
        seq_length=seq_length,
        num_samples=num_samples,
        seed=seed,
        vocab_size=vocab_size,
        eod=0,
        is_builder=is_builder,
        barrier=barrier,
    )


def content(dataset):
    return [(dataset.sample(i)[0].tolist(), dataset.sample(i)[1]) for i in range(len(dataset))]


def test_blend_shares_and_domain_ids(data_cfg, two):
    train = opened(
        data_cfg(data_path=["0.3", two[0], "0.7", two[1]], split="100,0,0"), (1000, 0, 0)
    ).train
    assert train.domains == ("a", "b")
    domains = np.array([train.sample(i)[1] for i in range(1000)])
    for n in (10, 100, 500, 1000):
        assert abs((domains[:n] == 1).sum() - 0.7 * n) < 1
    for i in range(100):
        tokens, domain = train.sample(i)
        assert tokens.dtype == np.int64
        assert tokens.shape == (17,)
        assert set(tokens // 100) == {domain}


def test_without_weights_shares_follow_the_size(data_cfg, two):
    train = opened(data_cfg(data_path=two, split="1"), (1000, 0, 0)).train
    sizes = [IndexedFile(prefix).num_tokens for prefix in two]
    share = sum(train.sample(i)[1] for i in range(1000)) / 1000
    assert abs(share - sizes[1] / sum(sizes)) < 2e-3


def test_splits_do_not_share_documents(data_cfg, tmp_path):
    write_pair(tmp_path / "p", [[number] * 20 for number in range(1, 101)], np.uint16)
    splits = opened(data_cfg(data_path=[str(tmp_path / "p")], split="80,15,5"), (None, None, None))
    seen = [
        {int(x) for tokens, _ in content(dataset) for x in tokens}
        for dataset in (splits.train, splits.valid, splits.test)
    ]
    assert seen == [set(range(1, 81)), set(range(81, 96)), set(range(96, 101))]
    assert len(splits.train) == 80 * 20 // 16


def test_order_does_not_depend_on_length_cache_or_builder(data_cfg, two, tmp_path):
    cfg = data_cfg(data_path=["2", two[0], "1", two[1]], data_cache_path=str(tmp_path / "c"))
    long = content(opened(cfg, (700, 0, 0)).train)
    assert content(opened(cfg, (300, 0, 0)).train) == long[:300]
    no_cache = data_cfg(
        data_path=cfg.data_path, data_cache_path=str(tmp_path / "nothing"), mmap_bin_files=False
    )
    assert content(opened(no_cache, (700, 0, 0), is_builder=False).train) == long
    assert not (tmp_path / "nothing").exists()
    assert content(opened(cfg, (700, 0, 0), seed=2).train) != long


def test_damaged_cache_is_rebuilt(data_cfg, two, tmp_path):
    cfg = data_cfg(data_path=two, data_cache_path=str(tmp_path / "c"))
    wanted = content(opened(cfg).train)
    files = sorted((tmp_path / "c").iterdir())
    assert len(files) > 8
    for path in files:
        good = path.read_bytes()
        path.write_bytes(good[: len(good) // 2])
        assert content(opened(cfg, is_builder=False).train) == wanted
        assert content(opened(cfg).train) == wanted
        assert path.read_bytes() == good


def test_changed_data_is_never_read_with_an_old_index(data_cfg, two, tmp_path):
    cfg = data_cfg(data_path=[two[0]], split="1", data_cache_path=str(tmp_path / "c"))
    opened(cfg)
    write_pair(two[0], [[1] * 7] * 3, np.uint16)
    assert {int(x) for tokens, _ in content(opened(cfg).train) for x in tokens} == {1}


def test_token_outside_the_vocabulary_stops_every_rank_with_the_same_line(data_cfg, tmp_path):
    write_pair(tmp_path / "p", [[1, 2], [3, 500, 4]], np.uint16)
    cfg = data_cfg(data_path=[str(tmp_path / "p")], split="1", data_cache_path=str(tmp_path / "c"))
    lines = []
    for is_builder in (True, False):
        calls = []
        with pytest.raises(DataError) as caught:
            opened(
                cfg,
                vocab_size=500,
                is_builder=is_builder,
                barrier=lambda calls=calls: calls.append(1),
            )
        lines.append(str(caught.value))
        assert calls == [1]
    assert lines[0] == lines[1]
    assert "token id 500 in document 1 at position 1: the vocabulary is 0 to 499" in lines[0]
    opened(cfg, vocab_size=501)


def test_token_that_appears_after_the_scan_is_caught_as_it_is_read(data_cfg, tmp_path):
    write_pair(tmp_path / "p", [[1, 2, 3], [4, 5, 6]], np.uint16)
    train = opened(data_cfg(data_path=[str(tmp_path / "p")], split="1")).train
    status = os.stat(tmp_path / "p.bin")
    with open(tmp_path / "p.bin", "r+b") as stream:
        stream.seek(8)
        stream.write(np.array([60000], np.uint16).tobytes())
    os.utime(tmp_path / "p.bin", ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(DataError, match="token id 60000 in document 1 at position 1"):
        content(train)


def test_flipped_bit_is_refused_at_the_start_on_every_rank(data_cfg, tmp_path, jsonl, bpe_path):
    from data import prepare

    prefix = tmp_path / "p"
    tokenizer = ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", str(bpe_path)]
    prepare.main(["--input", str(jsonl), "--output", str(prefix), "--workers", "1", *tokenizer])
    cfg = data_cfg(data_path=[str(prefix)], split="1", data_cache_path=str(tmp_path / "c"))
    wanted = content(opened(cfg).train)
    good = prefix.with_suffix(".bin").read_bytes()
    prefix.with_suffix(".bin").write_bytes(good[:777] + bytes([good[777] ^ 1]) + good[778:])
    lines = set()
    for is_builder in (True, False):
        with pytest.raises(DataError, match="bytes have changed: bin_sha256 is") as caught:
            opened(cfg, is_builder=is_builder)
        lines.add(str(caught.value))
    assert len(lines) == 1
    prefix.with_suffix(".bin").write_bytes(good)
    assert content(opened(cfg).train) == wanted


def test_a_builder_that_fails_still_comes_to_the_barrier(data_cfg, two, monkeypatch):
    monkeypatch.setattr("data.scan.scan", lambda file: 1 / 0)
    calls = []
    with pytest.raises(ZeroDivisionError):
        opened(data_cfg(data_path=two), barrier=lambda: calls.append(1))
    assert calls == [1]


def test_empty_splits(data_cfg, tmp_path, two):
    write_pair(tmp_path / "p", [[1, 2, 3]] * 4, np.uint16)
    splits = opened(data_cfg(data_path=[str(tmp_path / "p")]), (10, 10, 10))
    assert (splits.valid, splits.test) == (None, None)
    assert any(
        "--split 969,30,1 gives valid none of 4 documents" in line for line in splits.warnings
    )
    asked = opened(data_cfg(data_path=[str(tmp_path / "p")], split="50,50,0"), (10, 10, 10))
    assert asked.test is None and not any("none of" in line for line in asked.warnings)
    with pytest.raises(DataError, match="--split 0,1,0 gives train none of 4 documents"):
        opened(data_cfg(data_path=[str(tmp_path / "p")], split="0,1,0"), (10, 10, 10))
    assert opened(data_cfg(data_path=two), (10, 0, 0)).valid is None
    with pytest.raises(ConfigError, match="--split x must be"):
        opened(data_cfg(data_path=two, split="x"))


def test_tiny_split_repeats_with_a_warning(data_cfg, tmp_path):
    write_pair(tmp_path / "p", [[1, 2, 3]], np.uint16)
    splits = opened(data_cfg(data_path=[str(tmp_path / "p")], split="1"), (4, 0, 0))
    assert "has 3 tokens there, less than one sample of 17" in splits.warnings[0]
    assert splits.train.sample(0)[0].shape == (17,)


def test_paths_for_each_split(data_cfg, tmp_path, two):
    direct = data_cfg(train_data_path=[two[0]], valid_data_path=["1", two[1]])
    arguments = tmp_path / "args.json"
    arguments.write_text(json.dumps({"train": [two[0]], "valid": f"1 {two[1]}", "test": None}))
    for cfg in (direct, data_cfg(per_split_data_args_path=str(arguments))):
        splits = opened(cfg, (50, 20, 20))
        assert {int(x) // 100 for tokens, _ in content(splits.train) for x in tokens} == {0}
        assert {int(x) // 100 for tokens, _ in content(splits.valid) for x in tokens} == {1}
        assert splits.test is None
    arguments.write_text("[1]")
    with pytest.raises(DataError, match="--per-split-data-args-path"):
        opened(data_cfg(per_split_data_args_path=str(arguments)))


def test_sources_exclude_each_other(data_cfg, two):
    with pytest.raises(ConfigError, match="no data given"):
        blends_of(data_cfg())
    with pytest.raises(ConfigError, match="--data-path and --train/valid/test-data-path"):
        blends_of(data_cfg(data_path=two, train_data_path=two))


def test_same_name_in_two_folders(data_cfg, tmp_path):
    for folder in "xy":
        (tmp_path / folder).mkdir()
        write_pair(tmp_path / folder / "text", [[1] * 50], np.uint16)
    cfg = data_cfg(
        data_path=[str(tmp_path / "x" / "text"), str(tmp_path / "y" / "text")], split="1"
    )
    assert opened(cfg).train.domains == ("x/text", "y/text")


def test_cache_path_that_cannot_be_written(data_cfg, two, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError):
        opened(data_cfg(data_path=two, data_cache_path=str(tmp_path / "file" / "c")))


def test_missing_file_is_named(data_cfg, tmp_path):
    with pytest.raises(DataError, match="cannot be read: No such file") as caught:
        opened(data_cfg(data_path=[str(tmp_path / "no")]))
    assert str(tmp_path / "no.idx") in str(caught.value)


def test_mock_data_is_a_function_of_seed_split_and_index(data_cfg):
    splits = [
        opened(data_cfg(mock_data=True), (20, 5, 0), seq_length=300, seed=seed)
        for seed in (1, 1, 2)
    ]
    first, same, other = (content(made.train) for made in splits)
    assert first == same
    assert first != other
    assert splits[0].test is None
    assert content(splits[0].valid) != first[:5]
    for tokens, domain in first:
        assert domain == 0
        assert 0 <= min(tokens) <= max(tokens) < VOCAB
        assert 0 in tokens


def test_mock_data_can_be_learned(data_cfg):
    """The last two tokens decide the next one more than nine times in ten."""
    train = opened(data_cfg(mock_data=True), (200, 0, 0), seq_length=256).train
    following: dict[tuple[int, int], dict[int, int]] = {}
    for tokens, _ in content(train):
        for a, b, c in zip(tokens, tokens[1:], tokens[2:], strict=False):
            counts = following.setdefault((a, b), {})
            counts[c] = counts.get(c, 0) + 1
    right = sum(max(counts.values()) for counts in following.values())
    assert right / sum(sum(counts.values()) for counts in following.values()) > 0.9
