"""A limit of the shell ends a run with one line that names it, whatever broke because of it."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from launch.attempts import Launch
from launch.ranks import Failure
from megatron_ext import ulimits
from megatron_ext.checkpoint import folder
from megatron_ext.errors import DataError, ResourceError, as_fatal
from tests.ranks.tiny import TINY

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = f"PYTHON={sys.executable} bash {ROOT}/launch/run.sh 2 {' '.join(TINY)}"


def _shell(text: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", "-c", text], capture_output=True, text=True, check=False, timeout=60, cwd=ROOT
    )


def _child(code: str, limit: str) -> subprocess.CompletedProcess:
    return _shell(f"ulimit {limit}; exec {sys.executable} -c '{code}'")


def _fatal(done) -> str:
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("FATAL")]
    return line


def test_a_stack_on_which_python_cannot_start():
    """It was reported as missing torch."""
    done = _shell(f"ulimit -s 64; {EXAMPLE}")
    assert done.returncode == 69
    assert "ulimit -s is 64" in _fatal(done) and "no torch" not in done.stderr


@pytest.mark.parametrize("kib", [20_000, 300_000, 1_500_000])
def test_too_few_addresses_for_any_rank(kib):
    done = _shell(f"ulimit -v {kib}; {EXAMPLE}")
    assert done.returncode == 69, done.stderr
    assert f"ulimit -v is {kib}" in _fatal(done)


def test_terminate_says_why():
    """A thread that cannot start ends in std::terminate: one line and 69 instead of an abort."""
    code = (
        "import ctypes; from megatron_ext import ulimits; ulimits.speak_before_terminate(3, 69);"
        'ctypes.CDLL("libstdc++.so.6")._ZSt9terminatev()'
    )
    done = _child(code, "-v 4000000")
    assert done.returncode == 69
    assert "FATAL 69 rank=3 what=" in done.stderr and "ulimit -v is 4000000 KiB" in _fatal(done)
    assert "terminate called" in _child(code, "-n 1000").stderr  # without a limit nothing changes


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        ImportError("libtorch_cpu.so: failed to map segment from shared object"),
        RuntimeError("Resource temporarily unavailable\nframe #0: c10::Error"),
        RuntimeError("can't start new thread"),
        OSError(12, "Cannot allocate memory"),
    ],
)
def test_any_error_of_a_process_without_addresses_is_the_limits(error, monkeypatch):
    monkeypatch.setattr(ulimits, "_soft", lambda kind: ulimits.GIB if kind == 9 else None)
    assert resource.RLIMIT_AS == 9
    fatal = as_fatal(error)
    assert isinstance(fatal, ResourceError) and fatal.what.startswith("ulimit -v is 1048576 KiB")
    assert "frame" not in fatal.what
    assert isinstance(as_fatal(DataError("bad data")), DataError)


def test_a_wide_limit_explains_nothing(monkeypatch):
    monkeypatch.setattr(ulimits, "_soft", lambda kind: 1 << 50)
    assert as_fatal(ValueError("a bug")).code == 70 and ulimits.low_memory_limit() == ""


def test_the_launcher_explains_a_rank_that_crashed(monkeypatch, capsys):
    """SIGABRT, SIGSEGV and SIGBUS under a low limit; not SIGKILL, and not under a wide one."""

    class Reason:
        def __init__(self):
            self.codes = []

        def read(self):
            return None

        def write(self, code, *_):
            self.codes.append(code)

    launch = Launch.__new__(Launch)
    launch._reason, launch._stopped_by = Reason(), 0
    for limit, codes in ((3 << 30, [69, 69, 69, 137]), (64 << 30, [134, 139, 135, 137])):
        monkeypatch.setattr(ulimits, "_soft", lambda kind, limit=limit: limit)
        launch._reason.codes = []
        for code in (134, 139, 135, 137):
            launch._failed(Failure(1, 4242, code))
        assert launch._reason.codes == codes
    assert capsys.readouterr().err.count("FATAL 69 rank=1 what=rank 1 (process 4242) was") == 3


def test_a_limit_of_file_size_is_named(tmp_path):
    code = (
        "from pathlib import Path; from megatron_ext.checkpoint import folder;"
        f'p = Path("{tmp_path}"); print(folder.on_disk(p, lambda: folder.write_new(p / "x",'
        ' b"x" * 100000)))'
    )
    done = _child(code, "-f 64")
    assert "ulimit -f is 64 KiB" in done.stderr.splitlines()[-1]
    assert "raise the limit" in done.stderr and "bytes)" not in done.stderr.splitlines()[-1]
    assert "what=" in str(folder.disk_error(OSError(28, os.strerror(28)), tmp_path, 7))
