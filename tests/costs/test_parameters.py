"""Parameter counts against published totals and by hand."""

from __future__ import annotations

import pytest

from megatron_ext.costs.parameters import count_parameters, moe_pattern, padded_vocab_size
from tests.costs import models
from tests.costs.models import config

BILLION = 1e9


@pytest.mark.parametrize(
    ("model", "total", "active"),
    [
        (models.MIXTRAL_8X7B, 46.7, 12.9),
        (models.QWEN3_30B_A3B, 30.5, 3.3),
        (models.DEEPSEEK_V2_LITE, 15.7, 2.4),
        (models.DEEPSEEK_V3, 671.0, 37),
        (models.OLMOE_1B_7B, 6.9, 1.3),
    ],
    ids=["Mixtral-8x7B", "Qwen3-30B-A3B", "DeepSeek-V2-Lite", "DeepSeek-V3", "OLMoE-1B-7B"],
)
def test_published_totals(model, total, active):
    count = count_parameters(config(model))
    assert count.total / BILLION == pytest.approx(total, abs=0.05)
    # Papers differ on whether the tables are active: with or without one of them.
    one_table = count.embedding / 2
    near = [count.active - k * one_table for k in (0, 1, 2)]
    rounding = 0.5 if isinstance(active, int) else 0.06
    assert min(abs(n / BILLION - active) for n in near) < rounding


def test_exact_totals_of_released_weights():
    assert count_parameters(config(models.MIXTRAL_8X7B)).total == 46_702_792_704
    assert count_parameters(config(models.QWEN3_30B_A3B)).total == 30_532_122_624
    # DeepSeek-V3's files hold 58 x 256 numbers more: the expert biases, a buffer here.
    assert count_parameters(config(models.DEEPSEEK_V3)).total == 671_026_419_200 - 58 * 256


def test_a_layer_by_hand():
    hidden, width, experts, layers, rows = 64, 128, 8, 4, 1024
    attention = hidden * 3 * hidden + hidden * hidden
    expert = 3 * hidden * width
    layer = 2 * hidden + attention + experts * hidden + experts * expert
    count = count_parameters(config(models.TINY))
    assert padded_vocab_size(config(models.TINY)) == rows
    assert count.total == layers * layer + hidden + 2 * rows * hidden
    assert count.active == count.total - layers * (experts - 2) * expert
    assert count.per_stage == (count.total,)


@pytest.mark.parametrize(
    ("extra", "more"),
    [
        ("--no-untie-embeddings-and-output-weights", -1024 * 64),
        ("--qk-layernorm", 4 * 2 * 16),
        ("--normalization LayerNorm", (4 * 2 + 1) * 64),
        ("--group-query-attention --num-query-groups 2", -4 * 2 * 2 * 16 * 64),
        ("--add-qkv-bias", 4 * 3 * 64),
        ("--no-disable-bias-linear", 4 * (3 * 64 + 64 + 8 + 8 * (2 * 128 + 64))),
        ("--moe-shared-expert-intermediate-size 96", 4 * 3 * 64 * 96),
        (
            "--moe-shared-expert-intermediate-size 96 --moe-shared-expert-gate",
            4 * (3 * 64 * 96 + 64),
        ),
        ("--no-swiglu", -4 * 8 * 64 * 128),
        ("--moe-layer-freq 2", -2 * (8 * 64 + 7 * 3 * 64 * 128)),
        ("--moe-router-enable-expert-bias --moe-router-score-function sigmoid", 0),
        ("--position-embedding-type learned_absolute", 4096 * 64),
        ("--padded-vocab-size 1000", -2 * 24 * 64),
        ("--make-vocab-size-divisible-by 1", -2 * 24 * 64),
        (
            "--mtp-num-layers 1",
            2 * 64 * 64 + 3 * 64 + 2 * 64 + 4 * 64 * 64 + 8 * 64 + 8 * 3 * 64 * 128,
        ),
    ],
)
def test_what_a_flag_adds(extra, more):
    plain = count_parameters(config(models.TINY)).total
    assert count_parameters(config(models.TINY, extra)).total - plain == more


def test_dense_layers_follow_the_pattern():
    assert moe_pattern(config(models.TINY, "--moe-layer-freq 2")) == [True, False, True, False]
    assert (
        moe_pattern(config(models.TINY, "--moe-layer-freq ([0]*1+[1]*3)")) == [False] + [True] * 3
    )


@pytest.mark.parametrize(
    ("extra", "copies"),
    [
        ("--world-size 4 --pipeline-model-parallel-size 4", 1),
        (
            "--world-size 2 --pipeline-model-parallel-size 2 --global-batch-size 2"
            " --num-virtual-stages-per-pipeline-rank 2",
            1,
        ),
    ],
)
def test_pipeline_stages_add_up(extra, copies):
    count = count_parameters(config(models.TINY, extra))
    assert sum(count.per_stage) == count.total
    tied = count_parameters(
        config(models.TINY, extra + " --no-untie-embeddings-and-output-weights")
    )
    assert sum(tied.per_stage) == tied.total + copies * 1024 * 64
    mtp = count_parameters(config(models.TINY, extra + " --mtp-num-layers 1"))
    assert sum(mtp.per_stage) == mtp.total + copies * 1024 * 64


def test_tensor_and_expert_parallel_ranks():
    grid = "--world-size 8 --tensor-model-parallel-size 2 --sequence-parallel"
    grid += " --expert-model-parallel-size 4 --expert-tensor-parallel-size 1"
    count = count_parameters(config(models.TINY, grid))
    layer = 2 * 64 + 4 * 64 * 64 // 2 + 8 * 64 + 2 * 3 * 64 * 128
    assert count.per_rank == 4 * layer + 64 + 2 * 1024 * 64 // 2
    assert count.total == count_parameters(config(models.TINY)).total


def test_the_vocabulary_is_padded_by_megatrons_rule():
    cfg = config(models.TINY, "--world-size 4 --tensor-model-parallel-size 4 --sequence-parallel")
    assert padded_vocab_size(cfg) == 1024
    assert padded_vocab_size(cfg, vocab_size=50_257) == 1024
    unknown = config(
        models.TINY.replace("--vocab-size 1000", ""), "--make-vocab-size-divisible-by 8"
    )
    assert padded_vocab_size(unknown) == 0
    assert padded_vocab_size(unknown, vocab_size=50_257) == 50_264
