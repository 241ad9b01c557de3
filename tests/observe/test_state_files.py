"""What a resume rewrites: any bytes, any moment of a kill, and pipes in the place of files."""

from __future__ import annotations

import json
import os
import random
import signal
import threading

import pytest

from launch.reason import last_step
from megatron_ext import state_files
from megatron_ext.checkpoint.folder import latest_step
from megatron_ext.checkpoint.ledger import Ledger, read_ledger
from megatron_ext.checkpoint.lock import read_lease
from megatron_ext.errors import DataError
from megatron_ext.observe import routing_file
from megatron_ext.observe.ledger_events import LedgerEvents
from megatron_ext.observe.metrics import MetricsFile
from megatron_ext.observe.summary import read_records
from megatron_ext.replay.records import steps_of

TAILS = (
    b"",
    b'{"step": 4, "lm_l',
    b"\x00" * 300,
    b"\xff\xfe\x80 binary",
    b'{"step": "four"}\n',
    b'{"step": null}\n[]\n7\n\n',
    b"[" * 100_000 + b"\n",
    b'{"step": 2, "lm_loss": 1.0}',  # whole, but for its line's end
)


def _line(step: int, generator: random.Random) -> bytes:
    return json.dumps({"step": step, "lm_loss": generator.random()}).encode() + b"\n"


def _steps(data: bytes) -> list[int]:
    return [json.loads(line)["step"] for line in data.splitlines()]


@pytest.mark.parametrize("seed", range(40))
def test_a_resume_keeps_every_record_up_to_its_step_and_nothing_else(tmp_path, seed):
    generator = random.Random(seed)
    path, last = tmp_path / "metrics.jsonl", generator.randrange(8)
    steps = [generator.randrange(8) for _ in range(12)] if seed % 2 else list(range(8))
    lines = [_line(step, generator) for step in steps]
    middle = generator.choice(TAILS[1:4]) + b"\n" if seed % 3 == 0 else b""
    tail = generator.choice(TAILS)
    path.write_bytes(b"".join([*lines[:5], middle, *lines[5:]]) + tail)
    kept = [line for line, step in zip(lines, steps) if step <= last]
    kept += [tail + b"\n"] if tail is TAILS[-1] and last >= 2 else []
    file = MetricsFile(path, last)
    assert path.read_bytes() == b"".join(kept)
    file.write({"step": last + 1})
    file.close()
    assert _steps(path.read_bytes()) == [*_steps(b"".join(kept)), last + 1]


@pytest.mark.parametrize("is_mixed", [False, True])
def test_a_kill_while_it_is_cut_loses_no_record(tmp_path, is_mixed):
    """In place of the old file a new one is renamed, or one call cuts it: killed before every call
    that changes something on the disk, all records up to the step are there.
    """
    generator = random.Random(0)
    steps = [1, 2, 9, 3, 8] if is_mixed else [1, 2, 3, 8, 9]
    whole = b"".join(_line(step, generator) for step in steps)
    path = tmp_path / "metrics.jsonl"
    for point in range(8):
        path.write_bytes(whole)
        pid = os.fork()
        if pid == 0:
            _kill_before_change(point)
            MetricsFile(path, 3)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert {1, 2, 3} <= set(_steps(path.read_bytes())), point
        if status == 0:
            break
        assert status == -signal.SIGKILL
    assert status == 0 and point > 0
    assert _steps(path.read_bytes()) == [1, 2, 3]


def _kill_before_change(point: int) -> None:
    left = [point]

    def wrap(stock):
        def call(*args, **kwargs):
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1
            return stock(*args, **kwargs)

        return call

    for name in ("truncate", "replace", "fsync", "rename", "unlink"):
        setattr(os, name, wrap(getattr(os, name)))


def test_the_intervals_of_routing_are_cut_the_same_way(tmp_path):
    path = tmp_path / routing_file.NAME
    for step in (10, 20, 30):
        routing_file.append(path, step, {"counts": [[1]], "is_moe": [True]})
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"step": 40, "coun\xff')
    routing_file.cut(path, 20)
    assert path.read_bytes() == b"".join(whole.splitlines(keepends=True)[:2])
    routing_file.cut(tmp_path / "none", 20)
    assert not (tmp_path / "none").exists()


def _quickly(call):
    """What it returned or raised; fails where it waits."""
    found = []

    def run():
        try:
            found.append(call())
        except (OSError, DataError) as error:
            found.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(5)
    assert found, "it waits"
    return found[0]


READERS_AND_WRITERS = {
    "latest": lambda folder: latest_step(folder),
    "lease.json": lambda folder: read_lease(folder / "lease.json"),
    "ledger.jsonl": lambda folder: (read_ledger(folder), LedgerEvents(folder).new()),
    "ledger.jsonl (written)": lambda folder: Ledger(folder).add("requested", 1),
    "metrics.jsonl": lambda folder: MetricsFile(folder / "metrics.jsonl", 3),
    "metrics.jsonl (launcher)": lambda folder: last_step(folder),
    "metrics.jsonl (summary)": lambda folder: read_records(folder / "metrics.jsonl"),
    "metrics.jsonl (replay)": lambda folder: steps_of(folder),
    "routing.jsonl": lambda folder: routing_file.cut(folder / "routing.jsonl", 3),
    "routing.jsonl (written)": lambda folder: routing_file.append(
        folder / "routing.jsonl", 3, {"counts": [[1]]}
    ),
}


@pytest.mark.parametrize("kind", ["pipe", "pipe with a reader", "folder", "loop"])
@pytest.mark.parametrize("what", READERS_AND_WRITERS)
def test_what_is_no_file_keeps_nobody_waiting(tmp_path, what, kind):
    path = tmp_path / what.split()[0]
    if kind == "folder":
        path.mkdir()
    elif kind == "loop":
        path.symlink_to(path)
    else:
        os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK) if kind == "pipe with a reader" else None
    try:
        found = _quickly(lambda: READERS_AND_WRITERS[what](tmp_path))
    finally:
        if reader is not None:
            os.close(reader)
    nothing = (None, {}, ([], []))
    assert isinstance(found, (OSError, DataError)) or found in nothing


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "ranks.json"
    state_files.replace_text(path, "old")

    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError):
        state_files.replace_text(path, "new")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["ranks.json"]
