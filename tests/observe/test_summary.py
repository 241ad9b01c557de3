"""The page about a run, from files written by hand; a real run's page is in tests/launch."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from megatron_ext.errors import DataError
from megatron_ext.observe import summary

CONFIG = """parallel:
  world_size: 4  # environment
  pipeline_model_parallel_size: 2
  expert_model_parallel_size: 2
  expert_tensor_parallel_size: 1
checkpoint: {save: null}
observe: {tensorboard_dir: null}
"""


def step(number: int, loss: float, speed: float) -> dict:
    return {
        "step": number,
        "consumed_tokens": number * 4096,
        "lm_loss": loss,
        "tokens_per_s": speed,
        "step_time_s": 4096 / speed,
        "load_balancing_loss": 1.02,
        "num_dead_experts": 0,
    }


def validation(number: int, bits: float) -> dict:
    values = {"val_loss": 2.5, "bits_per_byte": bits, "num_tokens": 16384}
    return {"step": number, "split": "validation", **values}


@pytest.fixture
def run(tmp_path):
    """Three steps, two evaluations."""
    (tmp_path / "config.yaml").write_text(CONFIG)
    records = [step(1, 8.25, 100.0), step(2, 7.5, 900.0), validation(2, 2.4), step(3, 7.25, 1000.0)]
    lines = [json.dumps(record) for record in [*records, validation(3, 2.25)]]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path


def test_first_last_and_median(run):
    page = summary.page(run)
    assert page.startswith(f"{run}: 3 steps, 12,288 tokens\n")
    assert "step      1   lm loss 8.2500" in page and "step      3   lm loss 7.2500" in page
    assert "7.5000" not in page
    assert "model              2.250 bits a byte   step 3" in page
    assert "900 tokens/s, 4.551 s a step (medians of 3 steps)" in page
    assert "4 ranks = pp 2 x dp 2 x cp 1 x tp 1 = pp 2 x edp 1 x ep 2 x etp 1" in page


def test_missing_parts_are_left_out(run):
    page = summary.page(run)
    for absent in ("unigram", "Expert load", "Sample", "resume"):
        assert absent not in page


def test_all_parts(run):
    (run / "data").mkdir()
    baseline = {"bits_per_byte": 2.8261, "nats_per_token": 6.83, "valid_tokens": 99}
    (run / "data/unigram.json").write_text(json.dumps(baseline))
    load = {"step": 3, "counts": [[0, 0], [30, 10]], "is_moe": [False, True]}
    (run / "expert_load.json").write_text(json.dumps(load))
    (run / "sample.txt").write_text("def f():\n    return 1\n")
    (run / "checkpoints").mkdir()
    (run / "checkpoints/latest_checkpointed_iteration.txt").write_text("3\n")
    page = summary.page(run)
    assert "unigram baseline   2.826 bits a byte" in page
    assert page.count("busiest") == 1 and "layer   2  busiest  75.0%  idlest  25.0%" in page
    assert "\nSample\n  def f():\n      return 1\n" in page
    assert f"--load {run}/checkpoints --train-iters 63 --override-opt-param-scheduler" in page


def test_a_torn_last_line_is_left_out_and_another_is_an_error(run):
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lm_lo')
    assert summary.page(run).startswith(f"{run}: 3 steps")
    with open(run / "metrics.jsonl", "a") as file:
        file.write("\n{}\n")
    with pytest.raises(DataError, match="line 6 is not JSON"):
        summary.page(run)


def test_a_folder_that_is_no_run_is_one_line(tmp_path):
    command = [sys.executable, "-m", "megatron_ext.observe.summary", str(tmp_path / "none")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 65
    assert done.stderr.startswith("FATAL 65") and len(done.stderr.splitlines()) == 1


def test_the_page_needs_no_torch():
    code = "import sys, megatron_ext.observe.summary; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
