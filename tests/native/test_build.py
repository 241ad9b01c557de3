"""How the library is found, made and kept, and what a user reads where it cannot be."""

import os
import stat

import pytest

from megatron_ext.device.select import start
from megatron_ext.errors import ConfigError
from megatron_ext.native import build, loops

HAS_COMPILER = not loops.use("auto")
needs_compiler = pytest.mark.skipif(not HAS_COMPILER, reason="no C++ compiler here")


@pytest.fixture(autouse=True)
def _as_it_was():
    yield
    loops.use("auto")


def _compilations(monkeypatch) -> list[list[str]]:
    """What is run from now on."""
    seen, run = [], build.subprocess.run
    monkeypatch.setattr(
        build.subprocess, "run", lambda *a, **k: (seen.append(a[0]), run(*a, **k))[1]
    )
    return seen


@needs_compiler
def test_compiled_once_and_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    seen = _compilations(monkeypatch)
    assert [loops.use("auto"), loops.use("auto")] == ["", ""]
    assert len(seen) == 1
    (kept,) = (tmp_path / "pretrain-moe").iterdir()
    assert kept.name.startswith("loops-") and kept.suffix == ".so"
    assert not kept.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH)


@needs_compiler
def test_another_source_is_another_library(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    other = tmp_path / "loops.cpp"
    other.write_text(loops.SOURCE.read_text() + "\n// changed\n")
    loops.use("auto")
    monkeypatch.setattr(loops, "SOURCE", other)
    loops.use("auto")
    assert len(list((tmp_path / "pretrain-moe").iterdir())) == 2


@needs_compiler
def test_a_torn_library_is_made_again(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    loops.use("auto")
    (kept,) = (tmp_path / "pretrain-moe").iterdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    torn = build.cache_folder() / kept.name
    torn.parent.mkdir(parents=True)
    torn.write_bytes(b"\x7fELF and no more")
    assert loops.use("auto") == "" and torn.stat().st_size == kept.stat().st_size


@needs_compiler
def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    assert loops.use("auto") == ""
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@needs_compiler
@pytest.mark.parametrize("missing", ["home", "/proc"])
def test_where_a_cache_cannot_be_named(missing, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "" if missing == "home" else str(tmp_path))

    def fails(*_):
        raise RuntimeError("no home") if missing == "home" else FileNotFoundError("/proc")

    if missing == "home":
        monkeypatch.setattr(build.Path, "home", fails)
    else:
        monkeypatch.setattr(build, "_cpu", fails)
    assert loops.use("auto") == ""
    assert not list(tmp_path.iterdir())


def test_without_a_compiler(tmp_path, monkeypatch):
    """auto: torch's operations; native: refused with the reason."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert loops.use("auto") == "no C++ compiler (no-such-compiler)"
    with pytest.raises(ConfigError, match="no C\\+\\+ compiler .no-such-compiler."):
        start("cpu", cpu_kernels="native")


@needs_compiler
def test_a_compiler_that_refuses(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    broken = tmp_path / "broken.cpp"
    broken.write_text("this is not C++\n")
    monkeypatch.setattr(loops, "SOURCE", broken)
    why = loops.use("auto")
    assert "ended with 1" in why and "\n" not in why
    assert not list((tmp_path / "pretrain-moe").iterdir())


def test_torch_is_asked_for(monkeypatch):
    seen = _compilations(monkeypatch)
    assert loops.use("torch") == "--cpu-kernels torch"
    assert not seen and os.environ[loops.ASKED] == "torch"
