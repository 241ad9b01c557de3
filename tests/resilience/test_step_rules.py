"""What a step does with bad numbers in unusual settings: no replay, fp16, overlap, interleaving,
recomputation, an expert without tokens, steps that are skipped.
"""

import json

import pytest
import torch

from tests.ranks.fingerprint import history, recorded, state_digests
from tests.ranks.harness import run_ranks
from tests.ranks.tiny import TINY, pretrain, read_metrics
from tests.resilience.numeric_faults import Fault, train

EP2 = "--num-layers 2 --expert-model-parallel-size 2".split()


def _recorded(folder, argv: list[str], faults: list[Fault]) -> int:
    with recorded(folder):
        return train(argv, faults)


def test_disabled_stops_at_the_first_attempt(tmp_path):
    """A replay would have found it gone."""
    argv = ["--num-layers", "2", "--rerun-mode", "disabled", "--run-dir", str(tmp_path)]
    fault = Fault("loss", step=2, rank=0, micro_batch=1, times=1)
    assert run_ranks(train, 1, argv, [fault]) == [76]
    assert list(history(tmp_path)) == [1]
    assert list(tmp_path.glob("nonfinite_step_*")) == []
    assert "lm loss is nan at step 2" in (tmp_path / "exit_reason.json").read_text()


def test_replays_with_overlapped_communication_are_bitwise(tmp_path):
    """Two faults of the forward and the backward pass, while buckets are being reduced."""
    flags = "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"
    argv = ["--num-layers", "2", "--train-iters", "4", *flags.split(), "--run-dir"]
    faults = [
        Fault("loss", step=2, rank=1, micro_batch=1, times=1),
        Fault("expert gradient", step=3, rank=0, micro_batch=1, layer=1, expert=2, times=1),
    ]
    for name, planted in (("whole", []), ("again", faults)):
        folder = tmp_path / name
        codes = run_ranks(_recorded, 2, folder / "state", [*argv, str(folder)], planted)
        assert codes == [0, 0]
    assert history(tmp_path / "again") == history(tmp_path / "whole")
    digests = state_digests(tmp_path / "whole" / "state")
    assert len(digests) == 2
    assert state_digests(tmp_path / "again" / "state") == digests


@pytest.mark.parametrize(
    "extra",
    ["--recompute-granularity full --recompute-method uniform --recompute-num-layers 1", ""],
)
def test_blame_in_interleaved_stages(extra, tmp_path):
    """pp 2 with 2 virtual stages: layer 2 of 4 is in rank 0's second chunk."""
    flags = f"--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2 {extra}"
    fault = Fault("expert", step=2, rank=0, micro_batch=1, layer=2, expert=5)
    argv = [*flags.split(), "--run-dir", str(tmp_path)]
    assert run_ranks(train, 2, argv, [fault]) == [76, 76]
    report = json.loads((tmp_path / "nonfinite_step_2.json").read_text())
    assert report["first_bad"] == (
        "decoder.layers.2.mlp.experts expert 5 (global): output, forward"
    )
    assert (report["rank"], report["sample_ids"]) == (0, [10, 11])


def _shunned(argv: list[str], expert: int) -> None:
    """pretrain_moe.py; no token of any layer chooses `expert`."""
    from megatron_ext.moe.router import Router

    stock = Router.gating

    def gating(self, hidden):
        column = torch.arange(self.config.num_moe_experts) == expert
        return stock(self, hidden).masked_fill(column, -1e4)

    Router.gating = gating
    try:
        pretrain([*TINY, *argv])
    finally:
        Router.gating = stock


def test_an_expert_without_tokens_is_no_error(tmp_path):
    argv = [*EP2, "--train-iters", "2", "--moe-z-loss-coeff", "0", "--run-dir", str(tmp_path)]
    run_ranks(_shunned, 2, argv, 3)
    assert len(history(tmp_path)) == 2
    load = json.loads((tmp_path / "expert_load.json").read_text())
    assert len(load["counts"]) == 2
    for counts in load["counts"]:
        assert counts[3] == 0
        assert sum(counts) > 0
    assert list(tmp_path.glob("*_step_*.json")) == []


def _in_one_piece(argv: list[str]) -> None:
    """pretrain_moe.py with megatron-core's own optimizer step, which is not in two halves."""
    from megatron_ext.optim import update

    stock, done = (update.prepare, update.apply), []

    def prepare(optimizer):
        succeeded, norm, zeros = optimizer.step()
        done[:] = [(succeeded, zeros)]
        return float(norm) if succeeded else None

    update.prepare, update.apply = prepare, lambda optimizer, norm: done.pop()
    try:
        pretrain([*TINY, *argv])
    finally:
        update.prepare, update.apply = stock


def test_fp16_skips_as_megatron_core_does(tmp_path):
    """Overflows lower the loss scale; the step counts as skipped, without an update and without a
    step of the schedule; everything is what megatron-core's undivided step gives, bit for bit.
    """
    flags = (
        "--num-layers 2 --fp16 --initial-loss-scale 1e9 --hysteresis 1 --train-iters 14"
        " --loss-scale-window 4 --lr-warmup-iters 4"
    ).split()
    run_ranks(pretrain, 1, [*TINY, *flags, "--run-dir", str(tmp_path / "ours")])
    run_ranks(_in_one_piece, 1, [*flags, "--run-dir", str(tmp_path / "stock")])
    assert history(tmp_path / "ours") == history(tmp_path / "stock")
    for key in ("loss_scale", "learning_rate", "num_skipped"):
        ours = read_metrics(tmp_path / "ours", key)
        assert ours == read_metrics(tmp_path / "stock", key)
        assert len(set(ours)) > 2
    skipped = read_metrics(tmp_path / "ours", "num_skipped")
    rates = read_metrics(tmp_path / "ours", "learning_rate")
    first = next(step for step in range(14) if skipped[step] == skipped[step - 1] > 0)
    assert 1 <= skipped[-1] < 14
    assert rates[first - 1] == rates[0], "the schedule waits for the first update"


def test_skipped_iterations_only_read_their_data(tmp_path):
    """Steps 2 and 3: no record, no save, no update, no step of the schedule; their samples are
    gone, also after a resume in the middle of them.
    """
    base = ["--num-layers", "2", "--train-iters", "6"]
    skip = [*base, "--save-interval", "1", "--iterations-to-skip", "2", "3", "--run-dir"]
    for name, argv in (("plain", [*base, "--run-dir"]), ("skip", skip)):
        run_ranks(pretrain, 1, [*TINY, *argv, str(tmp_path / name)])
    plain, skipped = history(tmp_path / "plain"), history(tmp_path / "skip")
    assert list(skipped) == [1, 4, 5, 6]
    assert skipped[1] == plain[1]
    assert skipped[4].split()[2:] == plain[4].split()[2:], "the same samples"
    assert skipped[4].split()[0] != plain[4].split()[0], "other weights"
    rates = {name: read_metrics(tmp_path / name, "learning_rate") for name in ("plain", "skip")}
    assert rates["skip"] == rates["plain"][:4]
    assert read_metrics(tmp_path / "skip", "num_skipped") == [0, 2, 2, 2]
    saved = sorted(path.name for path in (tmp_path / "skip" / "checkpoints").glob("step_*"))
    assert saved == [f"step_{step:08d}" for step in (1, 4, 5, 6)]
    load = ["--load", str(tmp_path / "skip" / "checkpoints"), "--ckpt-step", "1"]
    run_ranks(pretrain, 1, [*TINY, *skip, str(tmp_path / "again"), *load])
    assert history(tmp_path / "again") == {step: skipped[step] for step in (4, 5, 6)}
