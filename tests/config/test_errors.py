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
    for name, value in {"RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "here"}.items():
        monkeypatch.setenv(name, value)
    for error in (ConfigError("usage"), DataError("data")):
        with pytest.raises(SystemExit), exit_on_fatal():
            raise error
    assert capsys.readouterr().err == "FATAL 65 rank=3 what=data\n"


@pytest.mark.parametrize(
    ("environ", "rank"),
    [
        ({"RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "n"}, 3),
        ({"SLURM_PROCID": "2", "SLURM_NTASKS": "4", "MASTER_ADDR": "n"}, 2),
        ({"RANK": "3"}, 0),
        ({"RANK": "3", "WORLD_SIZE": "4"}, 0),
        ({"RANK": "3", "MASTER_ADDR": "n"}, 0),
        ({"RANK": "3", "WORLD_SIZE": "2", "MASTER_ADDR": "n"}, 0),
        ({"SLURM_PROCID": "2"}, 0),
        ({"SLURM_PROCID": "2", "SLURM_NTASKS": "4"}, 0),
        ({"RANK": "x", "WORLD_SIZE": "4", "MASTER_ADDR": "n"}, 0),
        ({}, 0),
    ],
)
def test_a_rank_is_one_of_a_whole_launch(environ, rank):
    """What an earlier launch has left in a shell hides no line."""
    assert errors.current_rank(environ) == rank


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
