"""Rows 25 and 26 for every file that a stranger may hand us beside a checkpoint: tokenizers, YAML,
Hugging Face folders, indices. Nothing in them is executed, and a kilobyte never costs gigabytes.
"""

from __future__ import annotations

import io
import json
import random
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from data.foreign_tokenizers import special_tokens_beside
from data.indexed import HEADER, MAGIC, IndexedFile
from data.storage import read_json
from data.tokenizer import build_tokenizer
from megatron_ext.config import parse
from megatron_ext.hf.shards import INDEX, SINGLE, Shards
from megatron_ext.hf.source import CONFIG, Source
from tests.faults import rows_data
from tests.faults.cell import Case, Wrong, bombs, refused, run_cases
from tests.faults.outcome import Outcome

DEEP = 100_000
TOKENIZERS = {
    "SentencePieceTokenizer": "bpe.model",
    "Llama2Tokenizer": "bpe.model",
    "HuggingFaceTokenizer": "tokenizer.json",
    "TikTokenizer": "vocab.json",
}
YAML_CALLS = (
    "!!python/object/apply:os.system ['touch {canary}']",
    "!!python/object/apply:builtins.open ['{canary}', 'w']",
    "!!python/object/new:builtins.open ['{canary}', 'w']",
    '!!python/object/apply:builtins.eval ["open({canary!r}, chr(119))"]',
    "!!python/name:os.system",
    "!!python/module:os",
    "!!python/object:subprocess.Popen {{args: [touch, {canary}]}}",
)


def row_25(folder: Path, seed: int, count: int) -> list[Outcome]:
    """A pickle, or YAML that calls a function, in the place of any file: never executed."""
    canary = folder / "canary"
    folder.mkdir(parents=True, exist_ok=True)
    state = random.Random(seed)
    cases: list[Case] = []
    for number, bomb in enumerate(bombs(canary)):
        for wrapper in (bomb, _zipped(bomb), b"\x80\x02}" + bomb, bomb + state.randbytes(9)):
            place = folder / f"{len(cases)}"
            cases += _reader_cases(place, wrapper, number)
    cases += [
        _yaml_case(folder / f"y{number}.yaml", text.format(canary=str(canary)))
        for number, text in enumerate(YAML_CALLS)
    ]
    return run_cases(25, cases, canary) + [
        outcome
        for outcome in rows_data.row_21(folder / "cache", seed, max(10, count // 10))
        if outcome.verdict == "executed"
    ]


def _zipped(bomb: bytes) -> bytes:
    """The bomb as torch.save packs it."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("archive/data.pkl", bomb)
        archive.writestr("archive/version", "3\n")
    return stream.getvalue()


def _reader_cases(place: Path, content: bytes, number: int) -> list[Case]:
    """The bytes handed to each reader under the name that it looks for."""
    cases = [
        (f"{kind} given a pickle: {number}", _tokenizer(place / kind, kind, name, content))
        for kind, name in TOKENIZERS.items()
    ]
    for name, read in (
        (SINGLE, lambda: Shards(place / "hf")),
        (CONFIG, lambda: Source.of_folder(place / "hf")),
        ("pytorch_model.bin", lambda: Shards(place / "hf")),
    ):
        cases.append((f"{name} given a pickle: {number}", _file(place / "hf", name, content, read)))
    cases.append((f".idx given a pickle: {number}", _index(place / "idx", content)))
    return cases


def _tokenizer(folder: Path, kind: str, name: str, content: bytes) -> Callable[[], None]:
    def action() -> None:
        folder.mkdir(parents=True)
        path = folder / name
        path.write_bytes(content)
        refused(lambda: build_tokenizer(kind, path, vocab_size=None), folder)

    return action


def _file(
    folder: Path, name: str, content: bytes, read: Callable[[], object]
) -> Callable[[], None]:
    """``read`` must refuse the folder whose only file is this one."""

    def action() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.iterdir():
            path.unlink()
        (folder / name).write_bytes(content)
        refused(read, folder)

    return action


def _index(folder: Path, content: bytes) -> Callable[[], None]:
    def action() -> None:
        folder.mkdir(parents=True)
        (folder / "p.bin").write_bytes(content)
        (folder / "p.idx").write_bytes(content)
        refused(lambda: IndexedFile(folder / "p"), folder)

    return action


def _read(path: Path) -> object:
    return parse(["--config", str(path), "--print-config", "json"], {})


def _yaml_case(path: Path, value: str) -> Case:
    def action() -> None:
        for text in (value, f"seed: {value}", f"data_path: [{value}]", f"? {value}\n: 1"):
            path.write_text(text)
            refused(lambda: _read(path), codes=(64, 65))

    return f"YAML that calls: {value[:40]}", action


def row_26(folder: Path, seed: int, count: int) -> list[Outcome]:
    """Bombs: headers that promise more than the file has, nesting, aliases; bounded memory."""
    folder.mkdir(parents=True, exist_ok=True)
    state = random.Random(seed)
    cases = [_huge_index(folder / f"i{n}", state) for n in range(max(20, count // 20))]
    cases += [_huge_header(folder / f"s{n}", state) for n in range(max(20, count // 20))]
    for number, text in enumerate((b"[" * DEEP, b'{"a":' * DEEP, b"[[1]," * DEEP)):
        cases += _deep_cases(folder / f"d{number}", text, number)
    cases += [_yaml_bomb(folder / f"b{depth}.yaml", depth) for depth in (8, 12, 30)]
    cases.append(("YAML nested deep", _deep_yaml(folder / "deep.yaml")))
    cases.append(("npy with 10^9 elements", _huge_array(folder / "cache")))
    return run_cases(26, cases)


def _huge_index(folder: Path, state: random.Random) -> Case:
    counts = [state.choice((10**9, 2**40, 2**61, 2**64 - 1)) for _ in range(2)]

    def action() -> None:
        folder.mkdir()
        (folder / "p.bin").write_bytes(bytes(100))
        head = HEADER.pack(MAGIC, 1, 8, *counts)
        (folder / "p.idx").write_bytes(head + bytes(1000))
        refused(lambda: IndexedFile(folder / "p"), folder / "p.idx")

    return f".idx that promises too much: {counts}", action


def _huge_header(folder: Path, state: random.Random) -> Case:
    shape = [state.choice((10**9, 2**31, 2**62, -1)) for _ in range(state.randrange(1, 4))]
    length = state.choice((None, 10**8 + 1, 2**40, 2**63))
    entry = {"dtype": "F32", "shape": shape, "data_offsets": [0, state.choice((16, 2**62))]}
    header = json.dumps({"w": entry}).encode()

    def action() -> None:
        folder.mkdir()
        content = struct.pack("<Q", length or len(header)) + header + bytes(16)
        (folder / SINGLE).write_bytes(content)
        refused(lambda: Shards(folder), folder)

    return f"safetensors that promise too much: {shape} {length}", action


def _deep_cases(folder: Path, text: bytes, number: int) -> list[Case]:
    head = struct.pack("<Q", len(text)) + text
    cases = [
        (f"{kind} nested deep: {number}", _tokenizer(folder / kind, kind, name, text))
        for kind, name in TOKENIZERS.items()
    ]
    for name, content, read in (
        (SINGLE, head, lambda: Shards(folder / "hf")),
        (INDEX, text, lambda: Shards(folder / "hf")),
        (CONFIG, text, lambda: Source.of_folder(folder / "hf")),
    ):
        cases.append((f"{name} nested deep: {number}", _file(folder / "hf", name, content, read)))

    def beside() -> None:
        folder.mkdir(exist_ok=True)
        for name in ("note.json", "tokenizer_config.json"):
            (folder / name).write_bytes(text)
        if read_json(folder / "note.json") is not None or special_tokens_beside(folder):
            raise Wrong("silent", "accepted")

    return [*cases, (f"JSON nested deep: {number}", beside)]


def _yaml_bomb(path: Path, depth: int) -> Case:
    """Aliases of aliases: 9^depth words if anybody writes them out."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, depth)]
    text = "\n".join([*lines, f"data_path: *a{depth - 1}"])

    def action() -> None:
        path.write_text(text)
        refused(lambda: _read(path), path, codes=(64, 65))

    return f"YAML of aliases: depth {depth}", action


def _deep_yaml(path: Path) -> Callable[[], None]:
    def action() -> None:
        path.write_text("seed: " + "[" * 20_000)
        refused(lambda: _read(path), path, codes=(64, 65))

    return action


def _huge_array(folder: Path) -> Callable[[], None]:
    """The header of a .npy names 8 GB, the file has a kilobyte, its manifest is consistent."""
    from data.cache import IndexCache, manifest_of
    from data.storage import make_folder, sha256_of, write_json

    def action() -> None:
        make_folder(folder)
        path = folder / "k.a.npy"
        with open(path, "wb") as stream:
            shape = {"descr": "<i8", "fortran_order": False, "shape": (10**9,)}
            np.lib.format.write_array_header_1_0(stream, shape)
            stream.write(bytes(1000))
        facts = {"a": {"shape": [10**9], "dtype": "<i8", "sha256": sha256_of(path)}}
        write_json(folder / "k.json", manifest_of(facts))
        made = {"a": np.arange(3)}
        found = IndexCache(folder, required=True).load_or_make("k", lambda: made)
        if found is not made:
            raise Wrong("silent", "accepted")

    return action
