"""Weights & Biases and Prometheus: what they get, and what happens where they are not there."""

from __future__ import annotations

import logging
import sys
import urllib.error
import urllib.request
from types import SimpleNamespace

import pytest

from megatron_ext.config import parse
from megatron_ext.observe import sinks
from tests.ranks.tiny import TINY

STEP = {"step": 4, "lm_loss": 2.5, "num_zeros": None, "max_violation_per_layer": [0.5]}
EVALUATION = {"step": 4, "split": "validation", "val_loss": 3.0}


class Recorded:
    """Stands for the wandb package: init, log, finish."""

    def __init__(self) -> None:
        self.calls: list = []

    def init(self, **settings):
        self.calls.append(("init", settings))
        return SimpleNamespace(
            log=lambda values, step: self.calls.append(("log", values, step)),
            finish=lambda: self.calls.append(("finish",)),
        )


def config(*flags: str):
    return parse([*TINY, "--log-interval", "2", *flags])


def test_wandb_gets_numbers_by_step_and_the_config(tmp_path, monkeypatch):
    package = Recorded()
    monkeypatch.setitem(sys.modules, "wandb", package)
    flags = "--wandb-project p --wandb-exp-name e --wandb-entity team".split()
    (sink,) = sinks.open_sinks(config(*flags), tmp_path)
    sink.write(STEP)
    sink.write(EVALUATION)
    sink.close()
    init, *rest = package.calls
    assert init[1]["config"]["train"]["global_batch_size"] == 8
    asked = {key: init[1][key] for key in ("project", "name", "entity", "dir")}
    assert asked == {"project": "p", "name": "e", "entity": "team", "dir": str(tmp_path)}
    evaluated = {"validation/val_loss": 3.0}
    assert rest == [("log", {"lm_loss": 2.5}, 4), ("log", evaluated, 4), ("finish",)]


def test_a_missing_wandb_is_one_warning(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with caplog.at_level(logging.WARNING):
        assert sinks.open_sinks(config("--wandb-project", "p"), tmp_path) == []
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "pip install wandb" in caplog.text


def test_the_real_wandb_works_without_network(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is not installed: pip install wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    (sink,) = sinks.open_sinks(config("--wandb-project", "p"), tmp_path)
    sink.write(STEP)
    sink.close()
    assert list(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))


def test_without_flags_nothing_is_opened(tmp_path):
    assert sinks.open_sinks(config(), tmp_path) == []


def test_the_text_of_prometheus():
    text = sinks.prometheus_text({"b/c d": 2, "a_s": 0.5, "worst": float("inf")})
    assert text == (
        "# TYPE pretrain_moe_a_s gauge\npretrain_moe_a_s 0.5\n"
        "# TYPE pretrain_moe_b_c_d gauge\npretrain_moe_b_c_d 2.0\n"
        "# TYPE pretrain_moe_worst gauge\npretrain_moe_worst +Inf\n"
    )


def test_the_textfile_has_the_newest_values_of_the_interval(tmp_path):
    path = tmp_path / "collector" / "moe.prom"
    (sink,) = sinks.open_sinks(config("--prometheus-textfile", str(path)), tmp_path)
    sink.write({**STEP, "step": 1})
    assert not path.exists()
    sink.write(EVALUATION)
    sink.write({**STEP, "step": 6, "lm_loss": 2.0})
    sink.close()
    lines = path.read_text().splitlines()
    assert "pretrain_moe_lm_loss 2.0" in lines and "pretrain_moe_step 6.0" in lines
    assert "pretrain_moe_validation_val_loss 3.0" in lines
    assert [one.name for one in path.parent.iterdir()] == ["moe.prom"]


def test_the_port_answers_on_the_loopback_only(tmp_path):
    (sink,) = sinks.open_sinks(config("--prometheus-port", "0"), tmp_path)
    try:
        sink.write(STEP)
        address = f"http://127.0.0.1:{sink.port}"
        with urllib.request.urlopen(f"{address}/metrics", timeout=10) as answer:
            assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
            assert "pretrain_moe_lm_loss 2.5" in answer.read().decode()
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(f"{address}/", timeout=10)
        assert sink._server.server_address[0] == "127.0.0.1"
    finally:
        sink.close()
    with pytest.raises(OSError):
        urllib.request.urlopen(f"{address}/metrics", timeout=2)


def test_a_training_renews_the_textfile(trained):
    text = (trained / "moe.prom").read_text()
    assert "pretrain_moe_step 8.0\n" in text and "pretrain_moe_time_forward_s " in text
