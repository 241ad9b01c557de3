"""Saved in one layout, loaded in another: every whole tensor, weights and optimizer, is bit for bit
the same.
"""

import pytest

from tests.checkpoint.small_run import DIST, EP2, PP2, TP2, VPP2, checkpointer, small_run
from tests.ranks.harness import run_ranks

ETP1 = "--expert-tensor-parallel-size 1"
PAIRS = {
    "ep2 -> one rank": (2, EP2, 1, ""),
    "pp2 vpp2 -> one rank": (2, VPP2, 1, ""),
    "tp2 -> one rank": (2, TP2, 1, ""),
    "dp2 distributed bf16 -> one rank": (2, f"{DIST} --bf16", 1, "--bf16"),
    "dp2 bf16 -> dp2 distributed bf16": (2, "--bf16", 2, f"{DIST} --bf16"),
    "pp2 vpp2 ep2 distributed bf16 -> tp2 distributed bf16": (
        4,
        f"{VPP2} {EP2} {DIST} --bf16",
        2,
        f"{TP2} {DIST} --bf16",
    ),
    "one rank -> tp2 ep2 pp2": (1, "", 4, f"{TP2} {EP2} {ETP1} {PP2}"),
}


def _save(flags, folder):
    with small_run(flags) as run, checkpointer(folder) as saver:
        run.steps(2)
        saver.save(run.state)
        return run.gathered()


def _load(flags, folder):
    with small_run(flags) as run, checkpointer(None, folder) as loader:
        assert loader.load(run.state)
        gathered = run.gathered()
        run.steps(1)  # the loaded optimizer works
        return gathered, run.state.progress


@pytest.mark.parametrize("name", PAIRS)
def test_whole_tensors_are_equal(name, tmp_path):
    save_world, save_flags, load_world, load_flags = PAIRS[name]
    saved = run_ranks(_save, save_world, save_flags, tmp_path / "ckpt")[0]
    loaded, progress = run_ranks(_load, load_world, load_flags, tmp_path / "ckpt")[0]
    assert loaded == saved
    assert len(saved) == (147 if "bf16" in save_flags else 111)
    assert progress.step == 3 and progress.consumed_samples == 24


def _tables(flags, folder, is_first):
    with small_run(f"--vocab-size 126 {flags}") as run:
        with checkpointer(folder if is_first else None, None if is_first else folder) as keeper:
            if is_first:
                run.steps(2)
                keeper.save(run.state)
            else:
                assert keeper.load(run.state)
            return run.gathered(true_vocab=126)


def test_the_padding_of_the_vocabulary_may_change(tmp_path):
    """126 tokens: 126 rows on one rank, 128 on tp 2 with --make-vocab-size-divisible-by 64."""
    padded = f"{TP2} {DIST} --make-vocab-size-divisible-by 64"
    saved = run_ranks(_tables, 2, padded, tmp_path / "a", True)[0]
    assert run_ranks(_tables, 1, "", tmp_path / "a", False)[0] == saved
    saved = run_ranks(_tables, 1, "", tmp_path / "b", True)[0]
    assert run_ranks(_tables, 2, padded, tmp_path / "b", False)[0] == saved


def test_every_layer_and_the_expert_bias_are_named(tmp_path):
    names = run_ranks(_save, 1, "", tmp_path / "ckpt")[0]
    for layer in range(4):
        assert f"decoder.layers.{layer}.self_attention.linear_qkv.weight" in names
        assert (f"decoder.layers.{layer}.mlp.router.expert_bias" in names) == (layer > 0)
    assert "optimizer.state.exp_avg_sq.decoder.layers.3.mlp.experts.fc1_weight" in names
