"""What a run refuses without asking another rank, a dry run refuses: same code, same words."""

from __future__ import annotations

import contextlib
import io

import numpy as np
import pytest

from data.indexed import write_pair
from pretrain_moe import main
from tests.checkpoint.test_same_run import _train_in_turn
from tests.ranks.harness import run_ranks
from tests.ranks.tiny import TINY

SEPARATE = ("--mock-data", "--tokenizer-type", "--vocab-size")
NULL = ["--tokenizer-type", "NullTokenizer", "--vocab-size", "250"]


def _without(*flags: str) -> list[str]:
    kept, drops = [], False
    for word in TINY:
        drops = word in flags if word.startswith("--") else drops
        kept += [] if drops else [word]
    return kept


REAL = _without(*SEPARATE)
CASES = {
    "no vocabulary": (
        [*_without("--vocab-size"), "--padded-vocab-size", "256"],
        64,
        "--tokenizer-type NullTokenizer needs --vocab-size",
    ),
    "latent": ([*TINY, "--moe-latent-size", "32"], 64, "--moe-latent-size 32 is not built"),
    "split": ([*REAL, *NULL, "--data-path", "{data}", "--split", "abc"], 64, "--split abc"),
    "tiers": ([*TINY, "--ckpt-tiers", "foo"], 64, "--ckpt-tiers foo: foo is not a tier"),
    "no local": ([*TINY, "--ckpt-tiers", "local,store"], 64, "--ckpt-tiers local needs a folder"),
    "skip": ([*TINY, "--skip-samples", "abc"], 64, "--skip-samples abc"),
    "two ways": (
        [*REAL, *NULL, "--data-path", "{data}", "--train-data-path", "{data}"],
        64,
        "--train-data-path excludes --data-path",
    ),
    "weight": (
        [*REAL, *NULL, "--data-path", "1", "{data}", "-1", "{data}"],
        64,
        "--data-path weight -1",
    ),
    "tokenizer": (
        [*_without("--tokenizer-type"), "--tokenizer-type", "SentencePieceTokenizer"]
        + ["--tokenizer-model", "{folder}/none.model"],
        65,
        "--tokenizer-model cannot be read",
    ),
    "merges": (
        [*_without("--tokenizer-type"), "--tokenizer-type", "GPT2BPETokenizer"]
        + ["--vocab-file", "{folder}/none"],
        64,
        "needs --merge-file",
    ),
    "no tokenizer": ([*REAL, "--data-path", "{data}"], 64, "--tokenizer-type or --vocab-size"),
    "data": ([*REAL, *NULL, "--data-path", "{folder}/none"], 65, "none.idx"),
    "torn data": ([*REAL, *NULL, "--data-path", "{torn}"], 65, "torn"),
    "splits": (
        [*REAL, *NULL, "--per-split-data-args-path", "{folder}/none.json"],
        65,
        "--per-split-data-args-path cannot be read",
    ),
    "load": ([*TINY, "--load", "{folder}/none"], 65, "--load: this folder holds no checkpoint"),
    "vocabulary": (
        [*REAL, *NULL[:2], "--vocab-size", "300", "--padded-vocab-size", "128"]
        + ["--data-path", "{data}"],
        64,
        "--padded-vocab-size 128",
    ),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A pair of data files, one that is cut, and what stands for them in CASES."""
    folder = tmp_path_factory.mktemp("files")
    documents = [np.arange(100) % 250 for _ in range(40)]
    for name in ("data", "torn"):
        write_pair(folder / name, documents, np.uint16)
    (folder / "torn.bin").write_bytes((folder / "torn.bin").read_bytes()[:-8])
    return {"folder": folder, "data": folder / "data", "torn": folder / "torn"}


def _command(name: str, files) -> list[str]:
    words = [word.format(**files) for word in CASES[name][0]]
    return [*words, "--run-dir", str(files["folder"] / f"run {name}")]


def _dry(words: list[str]) -> tuple[int, str, str]:
    out, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        try:
            main([*words, "--dry-run"])
        except SystemExit as error:
            return error.code, out.getvalue(), errors.getvalue()
    return 0, out.getvalue(), errors.getvalue()


@pytest.fixture(scope="module")
def runs(files):
    """Name -> (code, stderr) of the run itself, as one rank without a launcher starts it."""
    commands = [_command(name, files) for name in CASES]
    return dict(zip(CASES, run_ranks(_train_in_turn, 1, commands, timeout_s=200)[0]))


@pytest.mark.parametrize("name", CASES)
def test_a_dry_run_refuses_what_the_run_refuses(name, files, runs):
    code, _, errors = _dry(_command(name, files))
    (line,) = errors.splitlines()
    assert (code, line.split()[:2]) == (CASES[name][1], ["FATAL", str(CASES[name][1])])
    assert CASES[name][2] in line
    run_code, run_errors = runs[name]
    told = [one for one in run_errors.splitlines() if one.startswith("FATAL")]
    assert run_code == code and CASES[name][2] in "".join(told), run_errors


def test_a_dry_run_says_what_it_looked_at_and_what_it_needs(files, tmp_path):
    run = ["--run-dir", str(tmp_path / "run")]
    code, out, _ = _dry([*REAL, *NULL, "--data-path", str(files["data"]), *run])
    assert code == 0 and "files: 1 with 4000 tokens, a tokenizer of 251" in out
    assert "memory: about 0.0" in out and "GB on the fullest rank" in out
    code, out, _ = _dry([*REAL, *NULL, "--data-path", "/none", "--no-check-files", *run])
    assert code == 0 and "not looked at" in out
    code, out, _ = _dry([*REAL, *NULL, *run])
    assert code == 0 and "needs --data-path, or --mock-data" in out
    assert not (tmp_path / "run").exists()


def test_what_a_configuration_names_on_another_machine_is_told(files, tmp_path):
    """As configs/quickstart.yaml does before the quickstart has made its folder."""
    names = {"elsewhere": "/none/here", "typo": f"{files['folder']}/none"}
    for name, prefix in names.items():
        (tmp_path / f"{name}.yaml").write_text(f"data-path: [{prefix}]\n")
    code, out, _ = _dry(["--config", str(tmp_path / "elsewhere.yaml"), *REAL, *NULL])
    assert code == 0 and "NOT THERE, a run on this machine would end with 65: /none/here" in out
    assert _dry(["--config", str(tmp_path / "typo.yaml"), *REAL, *NULL])[0] == 65


def test_kernels_without_their_device_are_refused_before_the_run(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    code, _, errors = _dry([*TINY, "--moe-kernels", "triton"])
    assert code == 64 and "--moe-kernels triton needs" in errors


def test_memory_above_the_devices_is_refused(tmp_path):
    words = [*TINY, "--run-dir", str(tmp_path / "run"), "--device-memory-gb"]
    assert _dry([*words, "80"])[0] == 0
    code, _, errors = _dry([*words, "0.0001"])
    assert code == 64 and "--device-memory-gb 0.0001 is less than the estimate of" in errors
