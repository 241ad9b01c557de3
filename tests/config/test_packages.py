"""A package that is missing is one line that installs it, in every program, before main() too."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_ext.errors import MissingPackage, ResourceError, as_fatal, exit_on_fatal
from megatron_ext.packages import missing_package

ROOT = Path(__file__).parents[2]
PREPARE = "data.prepare --input {file} --output {folder}/p --workers 1 --tokenizer-type "
NUMBERS = PREPARE + "NullTokenizer --vocab-size 9"
SENTENCES = PREPARE + "SentencePieceTokenizer --tokenizer-model {model}"
PRETRAIN = "pretrain_moe --config configs/quickstart.yaml --world-size 4 --run-dir {folder}/run"
CASES = [
    ("numpy", "text.txt", SENTENCES),
    ("sentencepiece", "text.txt", SENTENCES),
    ("pyarrow", "text.parquet", NUMBERS),
    ("zstandard", "text.txt.zst", NUMBERS),
    ("datatrove", "text.txt", SENTENCES + " --dedup exact"),
    ("loguru", "text.txt", NUMBERS + " --executor local"),
    ("tokenizers", "text.txt", PREPARE + "HuggingFaceTokenizer --tokenizer-model {model}"),
    (
        "tokenizers",
        "text.txt",
        PREPARE + "GPT2BPETokenizer --vocab-file {model} --merge-file {model}",
    ),
    ("tiktoken", "text.txt", PREPARE + "TikTokenizer --tokenizer-model {model}"),
    (
        "sentencepiece",
        "text.txt",
        "data.tokenizer train --input {file} --vocab-size 300 --model {model}",
    ),
    ("numpy", "text.txt", "data.unigram --data-path p --out u --tokenizer-type NullTokenizer"),
    ("yaml", "text.txt", "megatron_ext.generate --load {folder}"),
    ("torch", "text.txt", "megatron_ext.generate --load {folder}"),
    ("torch", "text.txt", PRETRAIN),
    ("yaml", "text.txt", PRETRAIN + " --dry-run"),
    ("torch", "text.txt", "megatron_ext.checkpoint list {folder}"),
    ("numpy", "text.txt", "megatron_ext.observe.report {folder}"),
]


@pytest.mark.parametrize("package,name,words", CASES)
def test_a_missing_package_is_one_line(tmp_path, package, name, words):
    (tmp_path / name).write_bytes(b"text")
    (tmp_path / "model").write_bytes(b"model")
    places = {"file": tmp_path / name, "folder": tmp_path, "model": tmp_path / "model"}
    module, *arguments = words.format(**places).split()
    script = (
        f"import runpy, sys; sys.modules[{package!r}] = None; sys.argv = {[module, *arguments]!r}; "
        f"runpy.run_module({module!r}, run_name='__main__', alter_sys=True)"
    )
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 64, done.stderr
    assert done.stderr.startswith("FATAL 64 rank=0 what=") and done.stderr.count("\n") == 1
    assert "pip install" in done.stderr and package.lower() in done.stderr.lower()


def test_our_own_modules_and_pythons_are_not_packages_to_install():
    for name in ("megatron_ext.nothing", "data.nothing", "launch.x", "_sqlite3", "", None):
        assert missing_package(ModuleNotFoundError("no", name=name)) is None
    assert missing_package(ImportError("cannot import name", name="torch")) is None


@pytest.mark.parametrize(
    "name,listed",
    [
        ("yaml", "PyYAML is missing in .* -r requirements.txt"),
        ("megatron.core", "megatron-core is missing in .* -r requirements.txt"),
        ("datatrove.data", "datatrove is missing in .* -r requirements-data.txt"),
        ("transformers", "transformers is missing in .* -r requirements-test.txt"),
        ("ray.util", "ray is missing in .* do=pip install ray$"),
    ],
)
def test_the_line_names_the_list_that_has_the_package(name, listed):
    error = as_fatal(ModuleNotFoundError("No module", name=name))
    assert type(error) is MissingPackage and not error.every_rank
    assert re.search(listed, str(error))


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("std::bad_alloc")])
def test_memory_that_does_not_suffice_is_one_line(error, capsys):
    with pytest.raises(SystemExit) as caught, exit_on_fatal():
        raise error
    said = capsys.readouterr().err
    assert caught.value.code == ResourceError.code and said.count("\n") == 1
    assert "memory does not suffice" in said
