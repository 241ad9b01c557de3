import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from data import prepare, shards
from data.indexed import IndexedFile
from data.tokenizer import build_tokenizer
from megatron_ext.errors import DataError, DiskError, LockedError

ROOT = Path(__file__).parents[2]


def flags(inputs, output, model, *more):
    return [
        "--input",
        *map(str, inputs),
        "--output",
        str(output),
        "--append-eod",
        "--tokenizer-type",
        "SentencePieceTokenizer",
        "--tokenizer-model",
        str(model),
        "--workers",
        "1",
        *map(str, more),
    ]


def digests(prefix):
    return [
        hashlib.sha256(Path(f"{prefix}{suffix}").read_bytes()).hexdigest()
        for suffix in (".bin", ".idx")
    ]


@pytest.fixture
def many(tmp_path, texts):
    """Two jsonl files of 3 MB: several shards."""
    folder = tmp_path / "many"
    folder.mkdir()
    for number in range(2):
        lines = [
            json.dumps({"text": f"{number} {repeat} {text}"})
            for repeat in range(20)
            for text in texts
        ]
        (folder / f"{number}.jsonl").write_text("\n".join(lines))
    return folder


def test_megatron_core_reads_the_tokenizers_output(tmp_path, jsonl, texts, bpe_path):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    prepare.main(flags([jsonl], tmp_path / "out" / "p", bpe_path))
    tokenizer = build_tokenizer("SentencePieceTokenizer", bpe_path)
    dataset = IndexedDataset(str(tmp_path / "out" / "p"))
    assert len(dataset) == len(texts) == 300
    for index, text in enumerate(texts):
        assert dataset[index].tolist() == [*tokenizer.encode(text), tokenizer.eod]
        assert tokenizer.decode(dataset[index].tolist()) == text
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "p.bin",
        "p.idx",
        "p.report.json",
    ]


def test_report_counts(tmp_path, jsonl, texts, bpe_path):
    with open(jsonl, "a") as stream:
        stream.write('{"no": 1}\nbroken\n')
    prepare.main(flags([jsonl], tmp_path / "p", bpe_path))
    report = json.loads((tmp_path / "p.report.json").read_text())
    file = IndexedFile(tmp_path / "p")
    ids = file.read(0, file.num_tokens)
    assert report["documents"] == 300
    assert report["tokens"] == file.num_tokens == len(ids)
    assert (
        report["bytes"] == report["represented_bytes"] == sum(len(text.encode()) for text in texts)
    )
    assert report["skipped"] == {"line is not JSON": 1, "no key 'text'": 1}
    assert (report["min_token_id"], report["max_token_id"]) == (ids.min(), ids.max())
    assert [report["bin_sha256"], report["idx_sha256"]] == digests(tmp_path / "p")
    assert (report["dtype"], report["vocab_size"], report["eod"]) == ("uint16", 400, 2)


def test_same_bytes_for_any_number_of_workers(tmp_path, many, bpe_path):
    found = set()
    for workers in (1, 2, 3):
        prepare.main(flags([many], tmp_path / f"w{workers}", bpe_path, "--workers", workers))
        found.add(tuple(digests(tmp_path / f"w{workers}")))
    assert len(found) == 1
    assert IndexedFile(tmp_path / "w1").lengths.shape == (12000,)


def wait_for(condition, limit_s=30.0):
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, "the process did not come that far"
        time.sleep(0.01)


def test_goes_on_after_kill_9(tmp_path, many, bpe_path, capfd):
    prepare.main(flags([many], tmp_path / "whole", bpe_path))
    arguments = flags([many], tmp_path / "killed", bpe_path, "--workers", 2)
    journal = tmp_path / "killed.parts" / "journal.jsonl"
    process = subprocess.Popen([sys.executable, "-m", "data.prepare", *arguments], cwd=ROOT)
    wait_for(
        lambda: (
            process.poll() is not None
            or (journal.exists() and journal.read_text().count("\n") >= 2)
        )
    )
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "killed.bin").exists()
    kept = shards.finished_shards(journal.parent)
    assert len(kept) >= 1
    damaged = shards.shard_paths(journal.parent, min(kept))[0]
    damaged.write_bytes(damaged.read_bytes()[:-2])
    with open(journal, "a") as stream:
        stream.write('\n{"shard": 5, "bin_by')
    capfd.readouterr()
    prepare.main(arguments)
    assert digests(tmp_path / "killed") == digests(tmp_path / "whole")
    assert f"resume: {len(kept) - 1} of" in capfd.readouterr().err or len(kept) == 1
    assert not journal.parent.exists()


def test_second_run_does_nothing_and_other_settings_are_refused(tmp_path, jsonl, bpe_path, capfd):
    prepare.main(flags([jsonl], tmp_path / "p", bpe_path))
    before = (tmp_path / "p.bin").stat().st_mtime_ns, digests(tmp_path / "p")
    prepare.main(flags([jsonl], tmp_path / "p", bpe_path))
    assert "unchanged" in capfd.readouterr().out
    with pytest.raises(DataError, match="--output was made from other"):
        prepare.main(flags([jsonl], tmp_path / "p", bpe_path, "--no-append-eod"))
    (tmp_path / "more.txt").write_text("another document")
    with pytest.raises(DataError, match="--output was made from other"):
        prepare.main(flags([jsonl, tmp_path / "more.txt"], tmp_path / "p", bpe_path))
    assert before == ((tmp_path / "p.bin").stat().st_mtime_ns, digests(tmp_path / "p"))
    prepare.main(flags([jsonl], tmp_path / "p", bpe_path, "--no-append-eod", "--overwrite"))
    assert IndexedFile(tmp_path / "p").num_tokens > 0
    assert digests(tmp_path / "p") != before[1]


def test_a_strangers_output_is_not_touched(tmp_path, jsonl, bpe_path):
    (tmp_path / "p.bin").write_text("precious")
    with pytest.raises(DataError, match="--overwrite"):
        prepare.main(flags([jsonl], tmp_path / "p", bpe_path))
    assert (tmp_path / "p.bin").read_text() == "precious"
    assert not (tmp_path / "p.parts").exists()


def test_no_document_is_an_error_that_names_the_keys(tmp_path, bpe_path):
    (tmp_path / "x.jsonl").write_text('{"content": "a", "id": 1}\n{"content": "b"}\n')
    with pytest.raises(DataError) as caught:
        prepare.main(flags([tmp_path / "x.jsonl"], tmp_path / "p", bpe_path))
    text = str(caught.value)
    assert "no document has the key 'text'" in text
    assert f"{tmp_path}/x.jsonl byte 0 keys present: 'content', 'id'" in text
    prepare.main(flags([tmp_path / "x.jsonl"], tmp_path / "p", bpe_path, "--json-keys", "content"))
    assert len(IndexedFile(tmp_path / "p")) == 2


def test_full_disk_is_one_line(tmp_path, many, bpe_path, monkeypatch):
    monkeypatch.setattr("data.storage.free_bytes", lambda path: 1000)
    with pytest.raises(DiskError, match=r"No space left: need \d+ bytes, have 1000 bytes free"):
        prepare.main(flags([many], tmp_path / "p", bpe_path))


def test_a_write_that_fails_is_one_line_and_leaves_nothing(tmp_path, jsonl, bpe_path):
    script = (
        "import resource, sys\nfrom data import prepare\n"
        "from megatron_ext.errors import exit_on_fatal\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))\n"
        "with exit_on_fatal(): prepare.main(sys.argv[1:])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *flags([jsonl], tmp_path / "o" / "p", bpe_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 74, done.stderr
    assert done.stderr.count("\n") == 1
    assert "FATAL 74" in done.stderr
    assert "File too large" in done.stderr
    assert f"path={tmp_path}/o/p.parts/shard-000000.bin" in done.stderr
    left = sorted(path.name for path in (tmp_path / "o").rglob("*") if path.is_file())
    assert left == ["settings.json"]


def test_read_only_folder(tmp_path, jsonl, bpe_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError, match="while writing"):
        prepare.main(flags([jsonl], tmp_path / "file" / "p", bpe_path))
    with pytest.raises(DiskError):
        prepare.main(flags([jsonl], Path("/proc/nothing/p"), bpe_path))


def test_two_at_once_are_refused(tmp_path, jsonl, bpe_path):
    args = prepare.parser().parse_args(flags([jsonl], tmp_path / "p", bpe_path))
    job, _ = prepare.job_of(args)
    with prepare.locked(job), pytest.raises(LockedError, match="another python -m data.prepare"):
        prepare.main(flags([jsonl], tmp_path / "p", bpe_path))


def test_null_tokenizer_ids_outside_are_refused(tmp_path):
    (tmp_path / "n.txt").write_text("1 2 200")
    arguments = [
        "--input",
        str(tmp_path / "n.txt"),
        "--output",
        str(tmp_path / "p"),
        "--tokenizer-type",
        "NullTokenizer",
        "--workers",
        "1",
    ]
    with pytest.raises(DataError, match="gave id 200, its vocabulary is 0 to 100"):
        prepare.main([*arguments, "--vocab-size", "100"])
    prepare.main([*arguments, "--vocab-size", "70000"])
    file = IndexedFile(tmp_path / "p")
    assert file.dtype == np.int32
    assert file.document(0).tolist() == [1, 2, 200]


def test_usage_errors_are_one_line_with_code_64():
    done = subprocess.run(
        [sys.executable, "-m", "data.prepare", "--input", "x"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 64
    assert done.stderr.startswith(
        "FATAL 64 rank=0 what=the following arguments are required: --output"
    )
    assert done.stderr.count("\n") == 1


def test_data_commands_need_no_torch():
    code = "import sys, data.prepare, data.corpus, data.datasets; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "False\n"
