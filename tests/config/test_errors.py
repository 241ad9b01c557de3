"""One FATAL line per cause, the exit code, no traceback."""

from __future__ import annotations

import pytest

from megatron_ext import errors
from megatron_ext.errors import ConfigError, DataError, Violation, exit_on_fatal


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("ConfigError", 64),
        ("DataError", 65),
        ("RendezvousError", 69),
        ("LockedError", 73),
        ("DiskError", 74),
        ("Preempted", 75),
        ("NumericError", 76),
        ("CorruptionError", 77),
        ("HangError", 78),
    ],
)
def test_codes(name, code, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(SystemExit) as end, exit_on_fatal():
        raise getattr(errors, name)("a\ncause", do="this", path="/x")
    assert end.value.code == code
    assert capsys.readouterr().err == f"FATAL {code} rank=0 what=a cause path=/x do=this\n"


def test_shared_errors_come_from_rank_0_only(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    for error in (ConfigError("usage"), DataError("data")):
        with pytest.raises(SystemExit), exit_on_fatal():
            raise error
    assert capsys.readouterr().err == "FATAL 65 rank=3 what=data\n"


def test_violations_are_all_printed(capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    rules = [
        Violation("--a", 1, "must be 2", "use 2"),
        Violation("--b", None, "is required", "give it"),
    ]
    with pytest.raises(SystemExit), exit_on_fatal():
        raise ConfigError(violations=rules)
    assert capsys.readouterr().err.splitlines() == [
        "FATAL 64 rank=0 what=--a 1 must be 2 do=use 2",
        "FATAL 64 rank=0 what=--b is required do=give it",
    ]


def test_bugs_keep_their_traceback(capsys):
    with pytest.raises(SystemExit) as end, exit_on_fatal():
        _ = 1 / 0
    first, *rest = capsys.readouterr().err.splitlines()
    assert end.value.code == 70
    assert first.startswith("FATAL 70 rank=0 what=ZeroDivisionError: division by zero")
    assert rest[0] == "Traceback (most recent call last):"
