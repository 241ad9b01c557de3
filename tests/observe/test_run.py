"""A real run: its records are documented, its board has what it shows, health stops a planted
collapse in a stated number of steps.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.ranks.harness import run_ranks
from tests.ranks.tiny import TINY, pretrain, read_metrics

DOCUMENT = Path(__file__).parents[2] / "docs" / "metrics.md"
WINDOW, PLANTED_AT = 5, 6
EVERYTHING = (
    "--train-iters 12 --log-interval 4 --log-routing-interval 4 --eval-iters 1 --eval-interval 6"
    " --log-params-norm --peak-tflops 1 --expert-model-parallel-size 2 --mtp-num-layers 1"
    " --moe-router-load-balancing-type aux_loss seq_aux_loss global_aux_loss"
    " --moe-aux-loss-coeff 0.01 0.01 0.01 --log-num-zeros-in-grad"
)


def documented() -> set[str]:
    """Keys in the tables of metrics.jsonl in docs/metrics.md."""
    part = DOCUMENT.read_text().partition("## RUN/metrics.jsonl")[2].partition("\n## ")[0]
    rows = [line.split("|")[1] for line in part.splitlines() if line.startswith("| `")]
    return {key for row in rows for key in re.findall(r"`(\w+)`", row)}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    run_ranks(pretrain, 2, [*TINY, *EVERYTHING.split(), "--run-dir", str(folder)])
    return folder


def _records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


RARE = {
    # of a fault
    "health", "action", "what", "do", "layer", "expert", "straggler", "rank", "host", "group",
}  # fmt: skip


def test_every_key_is_documented_and_every_documented_key_appears(run):
    written = {key for record in _records(run) for key in record}
    assert written - documented() == set()
    from_faults = {key for key in documented() if key in RARE or key.startswith("straggler")}
    assert documented() - written - from_faults == set()


def test_the_healthy_run_has_no_verdict(run):
    assert not [record for record in _records(run) if "health" in record]
    assert read_metrics(run, "tokens_seen_per_domain")[-1] == {"mock": 12 * 8 * 64}


def _pretrain_with_a_pushed_router(argv: list[str]) -> None:
    """From step PLANTED_AT on the logits of layer 2 favour experts 0 and 1."""
    import torch

    from megatron_ext.moe.router import Router

    stock = Router.routing
    calls = {"steps": 0}

    def routing(self, logits, padding_mask=None):
        if self.layer_number == 2:
            calls["steps"] += torch.is_grad_enabled() and self.training
            if calls["steps"] > (PLANTED_AT - 1) * 4:  # 4 micro-batches a step
                push = torch.zeros_like(logits)
                push[..., :2] = 50.0
                logits = logits + push
        return stock(self, logits, padding_mask=padding_mask)

    Router.routing = routing
    pretrain(argv)


def test_a_planted_collapse_is_named_saved_and_stops_the_run(tmp_path, capfd):
    flags = f"--health-window {WINDOW} --health-router-collapse stop --train-iters 40"
    flags += " --moe-router-load-balancing-type none --moe-layer-freq ([0]*1+[1]*3)"
    argv = [*TINY, *flags.split(), "--run-dir", str(tmp_path)]
    with pytest.raises(AssertionError, match="exit code 76"):
        run_ranks(_pretrain_with_a_pushed_router, 1, argv)
    assert read_metrics(tmp_path, "lm_loss")[PLANTED_AT + WINDOW - 2 :] != []
    found = [record for record in _records(tmp_path) if "health" in record]
    (first,) = [one for one in found if one["health"] == "router_collapse"]
    assert first["step"] == PLANTED_AT + WINDOW - 1 and first["layer"] == 2
    assert first["expert"] in (0, 1)
    steps = read_metrics(tmp_path)
    assert len(steps) == PLANTED_AT + WINDOW - 1
    assert (tmp_path / "checkpoints" / f"step_{len(steps):08d}").is_dir()
    shown = capfd.readouterr()
    assert "FATAL 76" in shown.err and "layer 2" in shown.err
    assert "warning: health router_collapse" in shown.out
