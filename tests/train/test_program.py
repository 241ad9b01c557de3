"""pretrain_moe.py as a user runs it: resume, evaluation only, early stops, generation."""

import json
import math
import os
import signal
import threading
import time

import pytest
import torch

from tests.ranks.harness import exit_codes, run_ranks
from tests.ranks.tiny import TINY, pretrain, read_metrics

BF16_PIPELINE = (
    "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2"
    " --expert-model-parallel-size 2 --use-distributed-optimizer --bf16"
    " --moe-router-load-balancing-type global_aux_loss --async-save"
)
RESUMES = {
    "one rank": (1, ""),
    "tp2 with dropout": (
        2,
        "--tensor-model-parallel-size 2 --sequence-parallel --hidden-dropout 0.1",
    ),
    "expert bias": (
        2,
        "--expert-model-parallel-size 2 --moe-router-score-function sigmoid"
        " --moe-router-enable-expert-bias",
    ),
    "pp2 vpp2 ep2 bf16, asynchronous": (4, BF16_PIPELINE),
}


MEASURED = ("step_time_s", "tokens_per_s", "model_tflop_per_s_per_rank", "started_unix_s")
MEASURED_PREFIXES = ("time_", "memory_")


def _lines(run_dir):
    """The records of metrics.jsonl without what is measured: seconds, rates, bytes."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in one.items() if k not in MEASURED and not k.startswith(MEASURED_PREFIXES)}
        for one in lines
    ]


@pytest.mark.parametrize("name", RESUMES)
def test_resume_is_bitwise(name, tmp_path):
    """6 steps in one go, and 3 + 3 through a checkpoint: every number of every step is the same."""
    world_size, flags = RESUMES[name]
    base = [*TINY, *flags.split(), "--train-iters", "6", "--save-interval", "3"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run_ranks(pretrain, world_size, [*base, "--run-dir", str(whole)])
    first = [*base, "--run-dir", str(parts), "--exit-interval", "3"]
    run_ranks(pretrain, world_size, first)
    assert len(_lines(parts)) == 3
    again = [*base, "--run-dir", str(parts), "--load", str(parts / "checkpoints")]
    run_ranks(pretrain, world_size, again)
    assert _lines(parts) == _lines(whole)


def test_resume_in_another_layout(tmp_path):
    """Saved on 4 ranks (pp2 vpp2 ep2), continued on one: the same curve to rounding."""
    flags = "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2".split()
    base = [*TINY, "--train-iters", "6", "--save-interval", "3"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run_ranks(pretrain, 1, [*base, "--run-dir", str(whole)])
    saved = ["--expert-model-parallel-size", "2", "--run-dir", str(parts), "--exit-interval", "3"]
    run_ranks(pretrain, 4, [*base, *flags, *saved])
    loaded = ["--run-dir", str(parts), "--load", str(parts / "checkpoints")]
    run_ranks(pretrain, 1, [*base, *loaded])
    assert read_metrics(parts) == pytest.approx(read_metrics(whole), rel=1e-5)


def test_evaluation_is_the_same_on_every_layout_and_repeats(tmp_path):
    """--eval-only from a checkpoint gives the loss that training logged, in any layout."""
    flags = [*TINY, "--eval-iters", "2", "--eval-interval", "2", "--train-iters", "4"]
    run_ranks(pretrain, 1, [*flags, "--run-dir", str(tmp_path)])
    trained = read_metrics(tmp_path, "val_loss")
    assert len(trained) == 3  # after step 2, after step 4, test
    only = ["--eval-only", "--load", str(tmp_path / "checkpoints")]
    only += ["--run-dir", str(tmp_path / "e")]
    layout = ["--tensor-model-parallel-size", "2", "--sequence-parallel"]
    run_ranks(pretrain, 2, [*flags, *layout, *only])
    assert read_metrics(tmp_path / "e", "val_loss") == pytest.approx(trained[1:], rel=1e-5)
    records = [json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    last = [record for record in records if "val_loss" in record][-1]
    nats = last["val_loss"] * last["num_tokens"]
    assert last["bits_per_byte"] == pytest.approx(nats / math.log(2) / last["num_bytes"])


def _signal_after_a_step(metrics):
    """Send SIGUSR1 to this process once a training step is on record."""
    while not (metrics.exists() and metrics.read_text()):
        time.sleep(0.05)
    os.kill(os.getpid(), signal.SIGUSR1)


def _train_until_signal(argv, metrics):
    """The program in this rank; rank 1 alone gets the signal."""
    if os.environ["RANK"] == "1":
        threading.Thread(target=_signal_after_a_step, args=(metrics,), daemon=True).start()
    pretrain(argv)


def test_a_signal_to_one_rank_saves_and_stops_all(tmp_path):
    flags = ["--train-iters", "100000", "--exit-signal-handler", "--exit-signal", "SIGUSR1"]
    argv = [*TINY, *flags, "--run-dir", str(tmp_path)]
    metrics = tmp_path / "metrics.jsonl"
    assert exit_codes(_train_until_signal, 2, argv, metrics, timeout_s=60) == [75, 75]
    step = len(read_metrics(tmp_path))
    assert 0 < step < 100000
    assert (tmp_path / "checkpoints" / "latest").read_text().strip() == f"step_{step:08d}"


def test_exit_duration(tmp_path):
    flags = ["--train-iters", "100000", "--exit-duration-in-mins", "0"]
    run_ranks(pretrain, 1, [*TINY, *flags, "--run-dir", str(tmp_path)])
    assert len(read_metrics(tmp_path)) == 1


def test_choose_follows_temperature_top_k_and_top_p():
    from megatron_ext.train.generate import choose

    logits = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05]))
    generator = torch.Generator().manual_seed(0)

    def draws(**limits):
        settings = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, **limits}
        return [choose(logits, generator=generator, **settings) for _ in range(400)]

    assert set(draws(temperature=0)) == {0}
    assert set(draws(top_k=2)) == {0, 1}
    assert set(draws(top_p=0.79)) == {0, 1}
    free = draws()
    assert set(free) == {0, 1, 2, 3} and free.count(0) / 400 == pytest.approx(0.5, abs=0.1)


def _generate(argv):
    import contextlib
    import io

    from megatron_ext.generate import main

    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        main(argv)
    return text.getvalue()


def test_generate_from_any_layout(tmp_path):
    """The checkpoint of a pp2 tp2 run continues a prompt on one rank; greedy repeats itself."""
    flags = "--tensor-model-parallel-size 2 --sequence-parallel --pipeline-model-parallel-size 2"
    run_ranks(pretrain, 4, [*TINY, *flags.split(), "--run-dir", str(tmp_path)])
    argv = ["--load", str(tmp_path / "checkpoints"), "--prompt", "1 2 3", "--temperature", "0"]
    argv += ["--max-new-tokens", "5", "--device", "cpu"]
    first, second = (run_ranks(_generate, 1, argv)[0] for _ in range(2))
    assert first == second and first.startswith("1 2 3") and len(first) > len("1 2 3\n")
