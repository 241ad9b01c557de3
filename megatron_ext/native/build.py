"""A C++ file -> a shared library for this machine's CPU, kept in the user's cache.

The name in the cache is a hash of the source, the command and the CPU, so that machines of two
kinds may share a home directory and an old library is never used. A rank that finds none, or a torn
one, compiles it (about a second) and moves it there in one step; ranks that start together may do
so twice. A library ends with the hash of its bytes, which is looked at before it is loaded: a torn
one would be a SIGBUS. Where the cache cannot be written, or belongs to somebody else (owned.py:
whoever may write there decides what runs here; one warning), the library lives in a private folder
while it is loaded.

OpenMP: g++ links libgomp.so.1, and the one that torch has loaded already is the one that is used,
so both share one pool of threads.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from megatron_ext.owned import ForeignFile, read_own, require_own_folder

OPTIONS = "-O3 -march=native -fno-math-errno -fno-trapping-math -ffp-contract=fast".split()
COMPILE_LIMIT_S = 120
HASH = hashlib.sha256
_foreign: list[Path] = []  # for one warning; ranks that are forked later know it, too


class BuildError(Exception):
    """Why there is no library; one line."""


def command() -> list[str]:
    """The compiler and its options, without files: $CXX, else g++.

    Raises BuildError where there is no such compiler, or where this is not Linux.
    """
    if sys.platform != "linux":
        raise BuildError("compiled on Linux only")
    compiler = shutil.which(os.environ.get("CXX") or "g++")
    if compiler is None:
        raise BuildError(f"no C++ compiler ({os.environ.get('CXX') or 'g++'})")
    wide = ["-mprefer-vector-width=512"] if platform.machine() == "x86_64" else []
    return [compiler, *OPTIONS, *wide, "-fopenmp", "-shared", "-fPIC"]


def _cpu() -> str:
    """What -march=native looks at, as text. Raises OSError where /proc is hidden."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    wanted = ("model name", "flags", "CPU part", "Features")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/pretrain-moe, by default ~/.cache/pretrain-moe. Raises RuntimeError for a
    user without a home.
    """
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pretrain-moe"


def compile_into(folder: Path, name: str, source: Path, options: Sequence[str] = ()) -> Path:
    """Compile to folder/name, which appears whole or not at all. Raises BuildError, OSError."""
    handle, fresh = tempfile.mkstemp(dir=folder, suffix=".so")
    os.close(handle)
    try:
        done = subprocess.run(
            [*command(), str(source), *options, "-o", fresh],
            capture_output=True,
            text=True,
            timeout=COMPILE_LIMIT_S,
        )
        if done.returncode:
            said = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise BuildError(f"{command()[0]} ended with {done.returncode}: {said}")
        _seal(Path(fresh))
        os.replace(fresh, folder / name)
    except subprocess.TimeoutExpired as error:
        raise BuildError(f"{command()[0]} took over {COMPILE_LIMIT_S} s") from error
    finally:
        Path(fresh).unlink(missing_ok=True)
    return folder / name


def _seal(library: Path) -> None:
    """Put the hash of its bytes behind them (the loader of programs does not mind) and wait until
    both are on the disk.
    """
    with open(library, "r+b") as file:
        digest = HASH(file.read()).digest()
        file.write(digest)
        file.flush()
        os.fchmod(file.fileno(), 0o700)  # the linker made it by the umask
        os.fsync(file.fileno())


def load(source: Path, options: Sequence[str] = ()) -> ctypes.CDLL:
    """The library of `source`, from the cache or compiled now with `options` more (among them what
    it is linked with). Raises BuildError.
    """
    try:
        made_of = f"{source.read_text()}\n{command()}\n{options}\n{_cpu()}"
        name = f"{source.stem}-{hashlib.sha256(made_of.encode()).hexdigest()[:20]}.so"
        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        require_own_folder(folder)
        found = _opened(folder / name)
        return (
            found
            or _opened(compile_into(folder, name, source, options))
            or _load_uncached(source, options)
        )
    except ForeignFile as error:
        if not _foreign and os.environ.get("LOCAL_RANK", "0") == "0":
            logging.getLogger(__name__).warning(
                "%s: its libraries are not used; compiled anew for this start"
                " (chown and chmod go-w, or remove it, or name another with XDG_CACHE_HOME)",
                error,
            )
        _foreign.append(folder)
        return _load_uncached(source, options)
    except (OSError, RuntimeError):
        return _load_uncached(source, options)


def _opened(path: Path) -> ctypes.CDLL | None:
    """None where there is no library, or a torn one. Raises ForeignFile.

    It is loaded through the descriptor of the file that was looked at. That stays open: the loader
    takes two libraries of one name for the same.
    """
    try:
        descriptor, content = read_own(path)
    except OSError:
        return None
    size = HASH().digest_size
    if HASH(content[:-size]).digest() == content[-size:]:
        with suppress(OSError):  # another machine's, or the memory does not suffice
            return ctypes.CDLL(f"/proc/self/fd/{descriptor}")
    os.close(descriptor)
    return None


def _load_uncached(source: Path, options: Sequence[str]) -> ctypes.CDLL:
    try:
        with tempfile.TemporaryDirectory(prefix="pretrain-moe-") as folder:
            return ctypes.CDLL(str(compile_into(Path(folder), "library.so", source, options)))
    except OSError as error:
        raise BuildError(f"the library cannot be written or loaded: {error}") from error
