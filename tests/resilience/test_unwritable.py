"""Logs on a full disk or in a place that cannot be: one warning each, the same training."""

from __future__ import annotations

import builtins
import io
import json
import logging
import pathlib

import pytest

from megatron_ext.mesh.forks import run_ranks
from megatron_ext.observe.attempt import Attempts, PatientFileHandler
from megatron_ext.observe.run_dir import create, places
from tests.ranks.tiny import pretrain

FULL = "/dev/full"


def _train(flags: list[str], full: tuple[str, ...]) -> list[tuple]:
    """Train on this rank -> what each step was, as its own train_step saw it.

    Files whose name has one of the words of `full` are on a disk without space: /dev/full.
    """
    from megatron_ext.train import loop

    stock_open, stock_path_open, stock_step = builtins.open, pathlib.Path.open, loop.train_step
    steps = []

    def lands_on_full(file, mode) -> bool:
        return any(word in str(file) for word in full) and set(mode) & set("wa+")

    def open_(file, mode="r", *args, **kwargs):
        return stock_open(FULL if lands_on_full(file, mode) else file, mode, *args, **kwargs)

    def path_open(self, mode="r", *args, **kwargs):
        target = pathlib.Path(FULL) if lands_on_full(self, mode) else self
        return stock_path_open(target, mode, *args, **kwargs)

    def step(*args, **kwargs):
        result = stock_step(*args, **kwargs)
        steps.append((result.lm_loss.hex(), result.grad_norm.hex(), result.num_tokens))
        return result

    builtins.open, io.open, pathlib.Path.open, loop.train_step = open_, open_, path_open, step
    pretrain(flags)
    return steps


def _run(tmp_path, name, flags, full=()):
    argv = [*flags, "--train-iters", "4", "--run-dir", str(tmp_path / name), "--hang-limit-s", "60"]
    return run_ranks(_train, 1, argv, full)[0]


def test_a_full_disk_for_logs_changes_nothing(tmp_path, tiny_flags, capfd):
    reference = _run(tmp_path, "usual", tiny_flags)
    capfd.readouterr()
    names = ("metrics.jsonl", "tfevents", "expert_load.json", "rank_00000.log", "ranks.json")
    full = (*names, "routing.jsonl", "schedule_step")
    flags = [*tiny_flags, "--log-routing-interval", "2", "--trace-schedule", "2"]
    assert _run(tmp_path, "full", flags, full) == reference and len(reference) == 4
    text = capfd.readouterr().err
    places = ("metrics.jsonl", "TensorBoard", "expert_load.json", "ranks.json", "routing.jsonl")
    for place in (*places, "traces"):
        warnings = [line for line in text.splitlines() if f"{place} cannot be written" in line]
        assert len(warnings) == 1 and "No space left" in warnings[0], text


def test_places_that_cannot_be_made(tmp_path, tiny_flags, capfd):
    """A file where a folder should be: no logs, no heartbeats, no TensorBoard."""
    run, blocker = tmp_path / "run", tmp_path / "file"
    run.mkdir()
    blocker.write_text("")
    (run / "logs").write_text("not a folder")
    flags = [*tiny_flags, "--tensorboard-dir", str(blocker / "board")]
    steps = _run(tmp_path, "run", flags)
    assert steps == _run(tmp_path, "usual", tiny_flags)
    text = capfd.readouterr().err
    assert text.count("no watch for hangs and stragglers") == 1
    assert text.count("TensorBoard cannot be written") == 1
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "lm_loss" in line] == [1, 2, 3, 4]


def test_only_errors_of_the_system_are_forgiven(caplog):
    attempt, calls = Attempts(), []

    def refuse():
        calls.append(1)
        raise OSError(28, "No space left on device")

    assert attempt("here", refuse) is None and attempt("here", refuse) is None
    assert len(calls) == 1 and caplog.text.count("here cannot be written") == 1
    assert attempt("there", int, "7") == 7
    with pytest.raises(ValueError):
        attempt("there", int, "seven")


def test_a_log_file_that_is_full_says_so_once(caplog):
    handler = PatientFileHandler(FULL, delay=True)
    log = logging.getLogger("tests.full")
    log.addHandler(handler)
    try:
        for _ in range(3):
            log.warning("a record")
    finally:
        log.removeHandler(handler)
    assert caplog.text.count("its records are lost") == 1


def test_the_run_itself_needs_its_folder(tmp_path):
    from megatron_ext.config import parse
    from megatron_ext.errors import DiskError
    from tests.ranks.tiny import TINY

    (tmp_path / "file").write_text("")
    cfg = parse([*TINY, "--run-dir", str(tmp_path / "file" / "run")])
    with pytest.raises(DiskError):
        create(cfg, places(cfg, cfg.observe.run_dir))
