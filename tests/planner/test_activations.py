"""Predicted activation bytes against what autograd really keeps, within 3%."""

from __future__ import annotations

import pytest

from megatron_ext.config import parse
from megatron_ext.costs.activations import chunk_saved, layer_saved
from megatron_ext.device import Device
from megatron_ext.mesh.groups import process_groups
from megatron_ext.model import gpt
from tests.planner.fake_ranks import config, rank_of
from tests.planner.saved import one_micro_batch
from tests.planner.test_states import CP, EP, ETP1, PP, SP, TP, VPP, flags
from tests.ranks.harness import run_ranks

SIZE = " --num-layers 2 --seq-length 256 --max-position-embeddings 256"
DENSE = "--moe-layer-freq ([0]*2)"
MIXED = "--moe-layer-freq ([0]*1+[1]*1)"
FULL = "--recompute-granularity full --recompute-num-layers 1 --recompute-method"
SELECT = "--recompute-granularity selective --recompute-modules"
TOLERANCE = 0.03

ONE_RANK = [
    "",
    "--bf16",
    f"--bf16 {MIXED}",
    f"--bf16 {DENSE}",
    "--bf16 --qk-layernorm",
    "--qk-layernorm",
    "--bf16 --qk-layernorm --qk-layernorm-over-heads",
    "--normalization LayerNorm --qk-layernorm",
    "--bf16 --normalization LayerNorm",
    "MLA --bf16",
    "MLA ",
    "MLA --v-head-dim 24 --bf16",
    "--bf16 --num-query-groups 4",
    "--num-query-groups 4 --qk-layernorm",
    "--bf16 --moe-shared-expert-intermediate-size 160",
    "--bf16 --hidden-dropout 0.1 --attention-dropout 0.1",
    "--bf16 --window-size (31,0)",
    "--bf16 --softmax-type learnable",
    "--bf16 --position-embedding-type learned_absolute",
    "--bf16 --moe-router-dtype fp32",
    "--bf16 --num-experts 32 --moe-router-topk 4",
    "--bf16 --mtp-num-layers 1",
    "--bf16 --vocab-size 4000",
    f"--bf16 {FULL} uniform --micro-batch-size 4",
    f"--bf16 {FULL} block",
    f"--bf16 {SELECT} core_attn",
    f"--bf16 {SELECT} moe",
    f"--bf16 {SELECT} moe_act",
    f"--bf16 {SELECT} layernorm",
    f"--bf16 {MIXED} {SELECT} mlp",
]


@pytest.mark.parametrize("extra", ONE_RANK)
def test_one_rank(extra, monkeypatch):
    cfg = config(flags(extra + SIZE), 1)
    with rank_of(cfg, 0, monkeypatch):
        (chunk,) = gpt.build_chunks(cfg, gpt.vocabulary(cfg, None))
        real, blocks = one_micro_batch(cfg, chunk)
    assert chunk_saved(cfg, cfg.stages[0][0], blocks=blocks) == pytest.approx(real, rel=TOLERANCE)


@pytest.mark.parametrize(
    "extra", [f"{PP} 2 --bf16", f"{PP} 2 {VPP} 2 --num-layers 4 --micro-batch-size 4"]
)
def test_every_chunk_of_a_pipeline(extra, monkeypatch):
    cfg = config(flags(SIZE + " " + extra), 2)
    for stage, table in enumerate(cfg.stages):
        with rank_of(cfg, stage, monkeypatch):
            for number, chunk in enumerate(gpt.build_chunks(cfg, gpt.vocabulary(cfg, None))):
                real, blocks = one_micro_batch(cfg, chunk, not table[number].embedding)
                predicted = chunk_saved(cfg, table[number], blocks=blocks)
                assert predicted == pytest.approx(real, rel=TOLERANCE)


def measured(argv: list[str]) -> tuple[int, float | None]:
    """Real bytes of this rank in a real gloo layout, and the rows of its experts' blocks."""
    cfg = parse(argv)
    with process_groups(cfg.parallel, Device("cpu", "gloo"), 1):
        (chunk,) = gpt.build_chunks(cfg, gpt.vocabulary(cfg, None))
        return one_micro_batch(cfg, chunk)


@pytest.mark.parametrize(
    "extra",
    [
        f"{TP} 2 {SP} {ETP1} --bf16",
        f"{TP} 2 {SP} --bf16",
        f"{EP} 2 --bf16",
        f"{CP} 2 --bf16",
        f"{TP} 2 {SP} {EP} 2 {ETP1} --bf16 --moe-shared-expert-intermediate-size 64",
    ],
)
def test_the_mean_of_two_real_ranks(extra):
    argv = flags(extra + SIZE)
    real = run_ranks(measured, 2, argv)
    cfg = config(argv, 2)
    predicted = (chunk_saved(cfg, cfg.stages[0][0], blocks=blocks) for _, blocks in real)
    assert sum(predicted) == pytest.approx(sum(saved for saved, _ in real), rel=TOLERANCE)


def test_an_imbalance_fills_experts_and_dispatch_only():
    cfg = config(flags("--bf16" + SIZE), 1)
    even, full = (layer_saved(cfg, True, imbalance) for imbalance in (1.0, 4.0))
    assert {name for name in even if full[name] != even[name]} == {"dispatch", "experts"}
