"""The progress bar: on a terminal only, with the time that is left."""

from __future__ import annotations

import os
import re
import sys
import threading
import time

from megatron_ext.config import parse
from megatron_ext.observe.observers import Observers
from megatron_ext.observe.run_dir import create, places
from tests.bench.observe import record_of, synthetic
from tests.ranks.tiny import TINY

STEPS, SECONDS = 12, 0.06
ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def _train(folder) -> None:
    """A training of 12 of 100 steps, without a model."""
    cfg = parse([*TINY, "--log-interval", "4", "--run-dir", str(folder)])
    where = places(cfg, folder)
    create(cfg, where)
    observers = Observers(cfg, where, first_step=0, num_steps=100, is_active=True)
    for step in range(1, STEPS + 1):
        time.sleep(SECONDS)
        observers.step(record_of(step, synthetic(False)), synthetic(False))
    observers.close()


def _shown_on_a_terminal(folder, monkeypatch) -> str:
    """What a person sees, without the escape sequences."""
    master, slave = os.openpty()
    parts: list[bytes] = []

    def read() -> None:
        while True:
            try:
                part = os.read(master, 4096)
            except OSError:  # the other side is closed
                return
            if not part:
                return
            parts.append(part)

    reader = threading.Thread(target=read)
    reader.start()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with os.fdopen(slave, "w") as terminal, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", terminal)
        _train(folder)
    reader.join(timeout=20)
    os.close(master)
    return ESCAPE.sub("", b"".join(parts).decode())


def test_a_terminal_shows_the_time_left(tmp_path, monkeypatch):
    text = _shown_on_a_terminal(tmp_path, monkeypatch)
    assert re.search(r"step +\d+/100 .*\d:\d\d:\d\d left", text)
    assert len(re.findall(r"iteration +\d+/ +100 \|", text)) == STEPS // 4


def test_a_log_file_has_lines_only(tmp_path, capfd):
    _train(tmp_path)
    text = capfd.readouterr().out
    assert " left" not in text and "\x1b" not in text and "\r" not in text
    assert len(re.findall(r"iteration +\d+/ +100 \|", text)) == STEPS // 4
    logs = "".join(path.read_text() for path in tmp_path.glob("logs/*"))
    assert "left" not in logs
