"""What somebody else could have put there is not executed, unpickled or loaded: each way of being
foreign in each place from which we load what we kept there ourselves.
"""

import hashlib
import importlib.util
import marshal
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_ext.checkpoint import tiers
from megatron_ext.device import lift
from megatron_ext.native import build, loops
from megatron_ext.owned import ForeignFile, read_own
from tests.checkpoint.small_disk import write_step

STRANGER = 12345
HAS_COMPILER = not loops.use("auto")


def _given_away(path: Path) -> None:
    os.chown(path, STRANGER, STRANGER)


def _linked(path: Path) -> None:
    elsewhere = path.with_name(f"elsewhere_{path.name}")
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


def _a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


WAYS = {
    "another owner": _given_away,
    "writable by the group": lambda path: path.chmod(path.stat().st_mode | 0o020),
    "writable by everybody": lambda path: path.chmod(path.stat().st_mode | 0o002),
    "a link": _linked,
}
FOLDERS = {f"folder: {way}": (True, change) for way, change in WAYS.items()}
FILES = {f"file: {way}": (False, change) for way, change in {**WAYS, "a pipe": _a_pipe}.items()}


def _cases(ways):
    """Names of ways; who is not root cannot give a file away."""
    can = os.geteuid() == 0
    needs = {name: [] if can or "another owner" not in name else [_not_root] for name in ways}
    return [pytest.param(name, id=name, marks=marks) for name, marks in needs.items()]


_not_root = pytest.mark.skip(reason="only root can give a file away")


@pytest.mark.skipif(not HAS_COMPILER, reason="no C++ compiler here")
@pytest.mark.parametrize("way", _cases(FOLDERS | FILES))
def test_a_foreign_library_is_not_executed(way, tmp_path, monkeypatch, caplog):
    """It is compiled anew in a private place, with one warning that says whose it is."""
    kept, source = _a_library(tmp_path, monkeypatch, answer=13)
    is_folder, change = (FOLDERS | FILES)[way]
    change(kept.parent if is_folder else kept)
    assert build.load(source).answer() == 7
    (line,) = caplog.messages
    assert "pretrain-moe" in line and "compiled anew" in line


def _a_library(folder: Path, monkeypatch, answer: int) -> tuple[Path, Path]:
    """(library in the cache that gives `answer`, its source, which says 7)."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    monkeypatch.setattr(build, "_foreign", [])
    source, other = folder / "seven.cpp", folder / "other.cpp"
    text = 'extern "C" int answer() { return %d; }\n'
    source.write_text(text % 7)
    other.write_text(text % answer)
    assert build.load(source).answer() == 7
    (kept,) = (folder / "pretrain-moe").glob("seven-*.so")
    build.compile_into(kept.parent, kept.name, other)
    return kept, source


@pytest.mark.skipif(not HAS_COMPILER, reason="no C++ compiler here")
def test_our_own_library_is_used(tmp_path, monkeypatch, caplog):
    """The counterpart: without a change the cache's is the one that runs."""
    _, source = _a_library(tmp_path, monkeypatch, answer=13)
    assert build.load(source).answer() == 13
    assert not caplog.messages


@pytest.mark.skipif(not HAS_COMPILER, reason="no C++ compiler here")
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_a_torn_library_is_made_again_in_its_own_process(share, tmp_path, monkeypatch):
    """Half a library is a SIGBUS where it is loaded; so is one whose pages are zeros."""
    kept, source = _a_library(tmp_path, monkeypatch, answer=13)
    content = kept.read_bytes()
    keep = int(share * len(content)) - (share == 1.0)
    kept.write_bytes(content[:keep])
    code = "import sys, pathlib; from megatron_ext.native import build;"
    code += "print(build.load(pathlib.Path(sys.argv[1])).answer())"
    command = [sys.executable, "-c", code, str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "7\n"), done.stderr
    assert build.load(source).answer() == 7  # and it is in the cache again


@pytest.mark.parametrize("way", _cases(FILES))
def test_foreign_byte_code_is_not_run(way, tmp_path, caplog, monkeypatch):
    loader, cache = _byte_code(tmp_path, monkeypatch, "answer = 13")
    FILES[way][1](cache)
    assert _answer(loader) == 7
    assert len(caplog.messages) == 1


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_byte_code_of_who_owns_the_source_is_run(tmp_path, caplog, monkeypatch):
    """An environment of another user: whose source it is, whose code runs anyway."""
    loader, cache = _byte_code(tmp_path, monkeypatch, "answer = 13")
    os.chown(cache, STRANGER, STRANGER)
    os.chown(loader.path, STRANGER, STRANGER)
    assert _answer(loader) == 13 and not caplog.messages


def test_torn_byte_code_is_made_again(tmp_path, monkeypatch):
    loader, cache = _byte_code(tmp_path, monkeypatch, "answer = 13")
    content = cache.read_bytes()
    assert _answer(loader) == 13
    for size in (0, 7, 8, 20, len(content) // 2, len(content) - 1):
        cache.write_bytes(content[:size])
        assert _answer(loader) == 7
        assert cache.stat().st_size != size


def _byte_code(folder: Path, monkeypatch, evil: str):
    """(loader of a module that says 7, its kept byte code, which does `evil`)."""
    monkeypatch.setattr(lift, "_foreign", [])
    monkeypatch.setattr("sys.dont_write_bytecode", False)
    source = folder / "module.py"
    source.write_text("# cuda\nanswer = 7\n")
    loader = lift._CpuLoader("megatron.core.module", str(source))
    assert _answer(loader) == 7
    (cache,) = (folder / "__pycache__").iterdir()
    body = marshal.dumps(compile(evil, "evil", "exec"))
    key = importlib.util.source_hash(source.read_bytes())
    cache.write_bytes(key + hashlib.sha256(body).digest() + body)
    return loader, cache


def _answer(loader) -> int:
    found: dict = {}
    exec(loader.get_code(loader.name), found)
    return found["answer"]


@pytest.fixture
def memory(tmp_path, monkeypatch):
    """A memory tier of one step, for --ckpt-tiers memory,store."""
    monkeypatch.setattr(tiers, "_SHM", tmp_path)
    cfg = SimpleNamespace(ckpt_tiers="memory,store", ckpt_memory_interval=1, ckpt_local_dir=None)
    cfg.save_interval, cfg.keep_last, cfg.keep_every = 1, None, None
    store = tmp_path / "store"
    tier = tiers.tiers_of(cfg, store)[0]
    tier.make()
    write_step(tier.directory, 4, 1.0)

    def has_step():
        return tiers.has_fast_step(cfg, store, lambda run: True)

    assert tiers.foreign(tier) == "" and has_step()
    yield tier, has_step
    shutil.rmtree(tier.directory, ignore_errors=True)


STEP_WAYS = {way: change for way, change in WAYS.items() if way != "writable by the group"}
"""The folder above is nobody else's, so a umask of 002 does no harm."""


@pytest.mark.parametrize("place", ["", "step_00000004", "step_00000004/rank_00001.safetensors"])
@pytest.mark.parametrize("way", _cases(WAYS))
def test_a_foreign_memory_tier_is_not_loaded(way, place, memory):
    tier, has_step = memory
    WAYS[way](tier.directory / place if place else tier.directory)
    if place and way not in STEP_WAYS:
        assert has_step()
        return
    assert str(tier.directory) in tiers.foreign(tier)
    assert not has_step()


def test_who_owns_a_file_is_asked_of_what_is_read(tmp_path):
    """Also of a folder and of nothing."""
    mine = tmp_path / "mine"
    mine.write_bytes(b"text")
    descriptor, content = read_own(mine)
    os.close(descriptor)
    assert content == b"text"
    with pytest.raises(ForeignFile, match="no regular file"):
        read_own(tmp_path)
    with pytest.raises(FileNotFoundError):
        read_own(tmp_path / "none")
