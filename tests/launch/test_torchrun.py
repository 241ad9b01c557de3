"""The program under torchrun, with the flags of a Megatron-LM script."""

from __future__ import annotations

from tests.launch.programs import ROOT, fatal_lines, run
from tests.ranks.harness import free_port
from tests.ranks.tiny import read_metrics


def mixtral(tmp_path, tokens, *more: object):
    """tests/launch/mixtral.sh, finished."""
    script = ROOT / "tests/launch/mixtral.sh"
    paths = (tmp_path / "checkpoints", tokens / "bpe.model", tokens / "code")
    command = ["bash", script, *paths, ROOT / "pretrain_moe.py", free_port()]
    return run([*command, "--run-dir", tmp_path, *more])


def test_a_mixtral_script_of_megatron_lm_trains(tmp_path, tokens):
    done = mixtral(tmp_path, tokens)
    assert done.returncode == 0, done.stderr[-2000:]
    losses = read_metrics(tmp_path)
    assert len(losses) == 4
    assert 5.8 < losses[0] < 6.2  # ln 400 = 5.99
    assert losses[-1] < losses[0] - 0.05
    assert (tmp_path / "checkpoints/latest_checkpointed_iteration.txt").read_text().strip() == "4"
    assert list((tmp_path / "checkpoints/tensorboard").glob("events.*"))
    assert "2 ranks = pp 1 x dp 2 x cp 1 x tp 1 = pp 1 x edp 1 x ep 2 x etp 1" in done.stdout


def test_a_mistake_is_one_line_of_ours(tmp_path, tokens):
    """torchrun adds its own report after it and turns every code into 1."""
    done = mixtral(tmp_path, tokens, "--moe-router-topk", "9")
    assert done.returncode == 1
    (line,) = fatal_lines(done.stderr)
    assert line.startswith("FATAL 64 rank=0 what=--moe-router-topk 9")
    assert "exitcode  : 64" in done.stderr
