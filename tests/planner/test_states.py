"""Predicted parameter, gradient and optimizer bytes are those of the real tensors, to the byte."""

from __future__ import annotations

import pytest
from megatron.core import parallel_state

from megatron_ext.costs.states import lay_out, owned, stage_states
from megatron_ext.costs.tensors import Tensor, chunk_tensors, padded_vocab_size, share_of
from megatron_ext.model import gpt
from tests.planner.fake_ranks import config, rank_of, real_states
from tests.ranks.tiny import TINY

GROUPED = "--group-query-attention --num-query-groups 2".split()
MLA = (
    "--multi-latent-attention --q-lora-rank 48 --kv-lora-rank 32 --qk-head-dim 16"
    " --qk-pos-emb-head-dim 8 --v-head-dim 16 --qk-layernorm "
)
TP, PP, CP, EP = (
    f"--{name}-parallel-size"
    for name in ("tensor-model", "pipeline-model", "context", "expert-model")
)
ETP1 = "--expert-tensor-parallel-size 1"
VPP = "--num-virtual-stages-per-pipeline-rank"
DIST = "--use-distributed-optimizer"
BUCKETS = "--overlap-grad-reduce --ddp-bucket-size 20000"
SP = "--sequence-parallel"
TIED = "TIED"

LAYOUTS = [
    (1, ""),
    (1, "--bf16"),
    (1, f"--bf16 {DIST}"),
    (1, f"{TIED} --bf16 {DIST} {BUCKETS}"),
    (2, DIST),
    (2, f"--bf16 {DIST}"),
    (2, "--bf16 --no-accumulate-allreduce-grads-in-fp32"),
    (2, f"{EP} 2 --bf16 {DIST}"),
    (2, f"{TP} 2 {SP}"),
    (2, f"{TP} 2 {SP} {ETP1} --bf16 {DIST}"),
    (2, f"{PP} 2 --bf16 {DIST}"),
    (2, f"{TIED} {PP} 2 --bf16 {DIST}"),
    (2, f"{TIED} {PP} 2 {VPP} 2 {DIST}"),
    (2, f"{CP} 2 --bf16 {DIST}"),
    (3, f"--bf16 {DIST} --global-batch-size 6"),
    (4, f"{TP} 2 {SP} {EP} 4 {ETP1} --bf16 {DIST}"),
    (4, f"{PP} 2 {VPP} 2 {EP} 2 --bf16 {DIST}"),
    (4, f"{PP} 4 --bf16"),
    (4, f"{CP} 2 {EP} 4 --bf16 {DIST} {BUCKETS}"),
    (4, f"{TP} 4 {SP} --group-query-attention --num-query-groups 4 --bf16 {DIST}"),
    (4, f"{EP} 2 {DIST} --ddp-pad-buckets-for-high-nccl-busbw --bf16 {BUCKETS}"),
    (8, f"{TP} 2 {SP} {PP} 2 {EP} 4 {ETP1} --bf16 {DIST}"),
    (8, f"{TP} 2 {SP} {PP} 2 {VPP} 2 {EP} 2 {ETP1} --bf16 {DIST} {BUCKETS}"),
    (8, f"{TP} 2 {SP} {EP} 8 {ETP1} --bf16 {DIST} {BUCKETS}"),
    (8, f"{EP} 8 --bf16 {DIST} --moe-layer-freq ([0]*1+[1]*3) --global-batch-size 16"),
    (8, f"{EP} 8 --fp16 {DIST} --moe-layer-freq ([0]*1+[1]*3) --global-batch-size 16"),
    (8, f"{PP} 2 {EP} 4 --bf16 {DIST} --mtp-num-layers 1"),
    (8, f"{TIED} {PP} 2 {EP} 4 --bf16 {DIST} --mtp-num-layers 1 {BUCKETS}"),
    (8, f"{PP} 2 --bf16 {DIST} --decoder-first-pipeline-num-layers 1"),
    (8, f"{PP} 2 --pipeline-model-parallel-layout Ettt|tL --bf16 {DIST}"),
    (16, f"{TP} 4 {SP} {PP} 2 {EP} 8 {ETP1} --num-query-groups 4 --bf16 {DIST}"),
    (16, f"{TP} 2 {CP} 2 {SP} {PP} 2 {EP} 4 {ETP1} --bf16 {DIST} {BUCKETS}"),
    (16, f"{CP} 4 {EP} 8 --bf16 {DIST} --moe-shared-expert-intermediate-size 64"),
    (2, "--bf16 --normalization LayerNorm --qk-layernorm --add-qkv-bias"),
    (4, f"{TP} 2 {SP} --qk-layernorm --qk-layernorm-over-heads --bf16 {DIST}"),
    (4, f"{TP} 2 {SP} --softmax-type learnable --bf16 {DIST}"),
    (4, f"--position-embedding-type learned_absolute --bf16 {DIST} {BUCKETS}"),
    (4, f"MLA {EP} 4 --bf16 {DIST}"),
    (4, f"MLA {TP} 2 {SP} {ETP1} --bf16 {DIST} {BUCKETS}"),
    (16, f"MLA {TP} 2 {SP} {PP} 2 {EP} 8 {ETP1} --bf16 {DIST} --mtp-num-layers 1"),
    (6, f"{EP} 2 --num-experts 6 --bf16 {DIST} --global-batch-size 12"),
    (24, f"{TP} 2 {SP} {PP} 2 {EP} 4 {ETP1} --bf16 {DIST} {BUCKETS} --global-batch-size 12"),
]


def flags(extra: str) -> list[str]:
    """TINY with `extra`; MLA and TIED stand for changes of the base."""
    words = list(TINY)
    if "MLA" in extra:
        for word in GROUPED:
            words.remove(word)
        extra = extra.replace("MLA ", MLA)
    if TIED in extra:
        words.remove("--untie-embeddings-and-output-weights")
        extra = extra.replace(TIED, "")
    return [*words, *extra.split()]


def watched_ranks(world_size: int) -> list[int]:
    """First, second, middle, last."""
    return sorted({0, min(1, world_size - 1), world_size // 2, world_size - 1})


def test_there_are_forty():
    assert len(LAYOUTS) >= 40


@pytest.mark.parametrize(("world_size", "extra"), LAYOUTS)
def test_bytes_equal_the_real_tensors(world_size, extra, monkeypatch):
    cfg = config(flags(extra), world_size)
    stages = cfg.parallel.pipeline_model_parallel_size
    largest = [stage_states(cfg, stage).optimizer for stage in range(stages)]
    for rank in watched_ranks(world_size):
        with rank_of(cfg, rank, monkeypatch):
            stage = parallel_state.get_pipeline_model_parallel_rank()
            owner = (
                parallel_state.get_data_parallel_group(True, partial_data_parallel=True).rank(),
                parallel_state.get_expert_data_parallel_group(
                    partial_expert_data_parallel=True
                ).rank(),
            )
            real = real_states(cfg)
        assert stage_states(cfg, stage, owner) == real, f"rank {rank}, stage {stage}"
        assert real.optimizer <= largest[stage]


@pytest.mark.parametrize("extra", ["", "--qk-layernorm", f"MLA {TP} 1", f"{TIED} --add-qkv-bias"])
def test_names_and_sizes_are_the_modules(extra, monkeypatch):
    cfg = config(flags(extra), 1)
    listed = chunk_tensors(cfg, cfg.stages[0][0], share_of(cfg), padded_vocab_size(cfg))
    with rank_of(cfg, 0, monkeypatch):
        (chunk,) = gpt.build_chunks(cfg, gpt.vocabulary(cfg, None))
    built = [(name, p.numel()) for name, p in chunk.named_parameters()]
    assert [(tensor.name, tensor.count) for tensor in listed] == built


def test_the_example_of_the_docstring():
    buffer = lay_out([Tensor("a", 100), Tensor("b", 30)], 2, None, sharded=True, wide=False)
    assert buffer.spans == ((0, 30), (64, 164))
    assert buffer.size == 256
    assert owned(buffer, 2) == [(94, 2), (36, 1)]
