"""MB/s of one core for `python -m data.prepare`, with and without datatrove's executor.

    python -m tests.bench data --prepare [--rounds 5]

Ways are run in turn, each on the texts of `python -m data.corpus` with a vocabulary of 4,096.  The
figure is bytes of jsonl by CPU seconds of the process (one worker), start and tokenizer included,
so that a busy machine does not show; the median of the turns is printed.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
from pathlib import Path

WAYS = {
    "default": (),
    "--executor local": ("--executor", "local"),
    "--filter gopher-quality": ("--filter", "gopher-quality"),
    "--dedup exact": ("--dedup", "exact"),
    "--dedup minhash": ("--dedup", "minhash"),
}


def cpu_seconds(command: list[str]) -> float:
    """User and system seconds of a command and its children."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def measure(repeat: int) -> dict[str, list[float]]:
    """MB/s of each way in each turn."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = str(folder / "bpe.model")
        module = [sys.executable, "-m"]
        cpu_seconds([*module, "data.corpus", "--out", str(folder / "corpus")])
        train = ["data.tokenizer", "train", "--input", str(folder / "corpus")]
        cpu_seconds([*module, *train, "--vocab-size", "4096", "--model", model])
        inputs = sorted(map(str, (folder / "corpus").glob("*.jsonl")))
        megabytes = sum(Path(path).stat().st_size for path in inputs) / 1e6
        tokenizer = ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", model]
        base = [*module, "data.prepare", "--input", *inputs, *tokenizer, "--workers", "1"]
        found: dict[str, list[float]] = {way: [] for way in WAYS}
        for turn in range(repeat):
            for number, (way, flags) in enumerate(WAYS.items()):
                output = ["--output", str(folder / f"out-{turn}-{number}")]
                found[way].append(megabytes / cpu_seconds([*base, *output, *flags]))
    return found
