"""`python -m data.prepare --executor slurm` on a real Slurm of two nodes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data import prepare
from tests.launch.programs import ROOT
from tests.slurm.cluster import wait_until

pytest.importorskip("datatrove", reason="pip install -r requirements-data.txt")
FILES = 4
SLURM = ("--executor", "slurm", "--slurm-partition", "all", "--slurm-time", "10")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Four files of 0.7 MB, a shard each; one document in 50 is a copy of the first."""
    folder = tmp_path_factory.mktemp("inputs")
    state = np.random.RandomState(3)
    for number in range(FILES):
        texts = [" ".join(map(str, state.randint(0, 1000, 60))) for _ in range(2600)]
        texts[::50] = ["1 2 3 4 5 6 7 8 9"] * len(texts[::50])
        lines = (json.dumps({"text": text}) + "\n" for text in texts)
        (folder / f"{number}.jsonl").write_text("".join(lines))
    return folder


def flags(inputs, prefix, *more) -> list[str]:
    tokenizer = ("--tokenizer-type", "NullTokenizer", "--vocab-size", "1000", "--append-eod")
    return ["--input", str(inputs), "--output", str(prefix), *tokenizer, *more]


def run(cluster, *arguments, code: int = 0) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "data.prepare", *arguments]
    done = subprocess.run(
        command, cwd=ROOT, env=cluster.env, capture_output=True, text=True, check=False, timeout=240
    )
    assert done.returncode == code, done.stderr
    return done


def pair(prefix) -> tuple[bytes, bytes]:
    return Path(f"{prefix}.bin").read_bytes(), Path(f"{prefix}.idx").read_bytes()


def report(prefix) -> dict:
    return json.loads(Path(f"{prefix}.report.json").read_text())


def test_job_arrays_give_the_bytes_of_one_process(cluster, inputs, tmp_path):
    """Three stages, an array each of two jobs that do two shards; the same documents go."""
    prepare.main(flags(inputs, tmp_path / "here", "--dedup", "exact", "--workers", "1"))
    run(cluster, *flags(inputs, tmp_path / "p", *SLURM, "--dedup", "exact", "--tasks-per-job", "2"))
    assert pair(tmp_path / "p") == pair(tmp_path / "here")
    found, wanted = report(tmp_path / "p"), report(tmp_path / "here")
    assert found["skipped"] == wanted["skipped"] == {"duplicate": FILES * 52 - 1}
    assert found["bin_sha256"] == wanted["bin_sha256"]
    assert not (tmp_path / "p.parts").exists()


def test_a_killed_command_finds_its_jobs_and_a_cancelled_task_is_done_again(
    cluster, inputs, tmp_path
):
    """One shard at a time; the command is killed, then the array is cancelled in its middle."""
    prepare.main(flags(inputs, tmp_path / "here", "--workers", "1"))
    arguments = flags(inputs, tmp_path / "p", *SLURM, "--workers", "1")
    command = [sys.executable, "-m", "data.prepare", *arguments]
    parts = tmp_path / "p.parts"
    first = subprocess.Popen(command, cwd=ROOT, env=cluster.env)
    job_file = parts / "logs" / "shards" / "job.json"
    wait_until(job_file.exists, "the job is submitted")
    first.send_signal(signal.SIGKILL)
    first.wait()
    job = json.loads(job_file.read_text())["job"]
    wait_until(lambda: list(parts.glob("shard-*.json")), "the first shard is there", 120)
    assert cluster.call("squeue", "-h", "-j", job), "the job goes on without the command"
    cluster.call("scancel", job)
    wait_until(lambda: not cluster.call("squeue", "-h", "-j", job), "the job is gone", 60)
    kept = sorted(parts.glob("shard-*.json"))
    assert 1 <= len(kept) < FILES
    run(cluster, *arguments)
    assert pair(tmp_path / "p") == pair(tmp_path / "here")
    assert report(tmp_path / "p")["run"]["kept_shards"] == len(kept)


def test_what_goes_wrong_is_one_line(cluster, inputs, tmp_path):
    wrong = run(
        cluster,
        *flags(inputs, tmp_path / "p", "--executor", "slurm"),
        "--slurm-partition",
        "gpu",
        code=64,
    )
    assert wrong.stderr.count("\n") == 1 and "invalid partition" in wrong.stderr.lower()
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "bad.txt").write_text("5 5000")
    bad = run(cluster, *flags(tmp_path / "in", tmp_path / "b", *SLURM), code=65)
    assert (
        bad.stderr.count("FATAL") == 1 and "gave id 5000, its vocabulary is 0 to 1000" in bad.stderr
    )
