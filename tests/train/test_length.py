"""A run ends after its last whole batch, with 0 and saved: a batch ramp that does not fill
--train-samples, and a resume with a smaller batch.
"""

import json
import os

import pytest

from tests.ranks.harness import next_port, run_ranks
from tests.ranks.tiny import TINY, pretrain

SMALL = [*TINY, "--num-layers", "1", "--seq-length", "16"]
BY_SAMPLES = [word for word in SMALL if word not in ("--train-iters", "5")]


def _in_turn(commands):
    for argv in commands:
        os.environ["MASTER_PORT"] = next_port()
        pretrain(argv)


def _end(run):
    """(step, samples, learning rate) of the last line, and the step that `latest` names."""
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    saved = int((run / "checkpoints/latest_checkpointed_iteration.txt").read_text())
    return (last["step"], last["consumed_samples"]), last["learning_rate"], saved


def test_the_last_partial_batch_is_dropped_and_the_run_is_saved(tmp_path):
    ramp, plain, smaller = tmp_path / "ramp", tmp_path / "plain", tmp_path / "smaller"
    by_samples = [*BY_SAMPLES, "--train-samples", "29"]
    steps = [*SMALL, "--train-iters", "12", "--run-dir", str(smaller)]
    taken = ["--global-batch-size", "4", "--accept-change", "global_batch_size"]
    taken += ["--load", str(smaller / "checkpoints"), "--override-opt-param-scheduler"]
    commands = [
        [*by_samples, "--rampup-batch-size", "2", "2", "12", "--run-dir", str(ramp)],
        [*by_samples, "--run-dir", str(plain)],
        [*steps, "--exit-interval", "6"],
        [*steps, *taken],
    ]
    run_ranks(_in_turn, 1, commands)
    assert _end(ramp)[::2] == ((5, 22), 5)  # 2 2 4 6 8, and 7 are left
    assert _end(plain)[::2] == ((3, 24), 3)
    at, rate, saved = _end(smaller)
    assert (at, saved) == ((12, 6 * 8 + 6 * 4), 12)
    assert rate == pytest.approx(1e-4)  # --min-lr at the last step, not from the resume on
