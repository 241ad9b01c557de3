"""Published throughputs as rows that the planner predicts; docs/planner.md shows the table.

Dense rows: Narayanan et al. 2021 (arXiv:2104.04473), table 1; TP, PP, DP, batch and TFLOP/s were
checked against two public copies of the table.  What it leaves out is assumed: micro-batch 1,
interleaving by the smallest divisor of a rank's layers where the batch allows it, attention without
a fused kernel (there was none in 2021), no distributed optimizer.  Its TFLOP/s count the recomputed
forward pass: 96*B*S*l*H^2*(1 + S/6H + V/16lH) a step.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_ext.config import RunConfig, parse
from megatron_ext.costs.cluster import Cluster, load
from megatron_ext.planner.step_time import step

PTD_P = "arXiv:2104.04473 table 1"
CORE_MOE = "Megatron-Core MoE README, recipe of that release"


@dataclass(frozen=True)
class Row:
    """One published measurement.

    Attributes:
        tflops: per GPU as published; `hardware` says whether recomputation counts.
        status: checked, or recalled.
    """

    name: str
    cluster: str
    gpus: int
    flags: str
    tflops: float
    hardware: bool
    source: str
    status: str


GPT = (
    "--seq-length 2048 --max-position-embeddings 2048 --padded-vocab-size 51200"
    " --micro-batch-size {mbs} --train-iters 1 --lr 1e-4 --fp16 --dry-run --num-layers {layers}"
    " --hidden-size {hidden} --num-attention-heads {heads} --tensor-model-parallel-size {tp}"
    " --pipeline-model-parallel-size {pp} --global-batch-size {batch}"
    " --transformer-impl transformer_engine --device cuda"
    " --attention-backend unfused"
    " --recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
)


def _gpt(name, layers, hidden, heads, tp, pp, gpus, batch, tflops) -> Row:
    per_rank = layers // pp
    vpp = next((n for n in range(2, per_rank + 1) if per_rank % n == 0), 1) if pp > 1 else 1
    count = batch // (gpus // (tp * pp))
    text = GPT.format(mbs=1, layers=layers, hidden=hidden, heads=heads, tp=tp, pp=pp, batch=batch)
    if vpp > 1 and count % pp == 0:
        text += f" --num-virtual-stages-per-pipeline-rank {vpp}"
    return Row(f"GPT {name}", "dgx-a100", gpus, text, tflops, True, PTD_P, "checked")


MIXTRAL = (
    "--seq-length 4096 --max-position-embeddings 4096 --position-embedding-type rope --bf16"
    " --normalization RMSNorm --swiglu --disable-bias-linear --padded-vocab-size 32000"
    " --untie-embeddings-and-output-weights --group-query-attention --num-query-groups 8"
    " --num-experts 8 --moe-router-topk 2 --micro-batch-size 1 --train-iters 1 --lr 1e-4"
    " --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather --dry-run"
    " --transformer-impl transformer_engine --device cuda --global-batch-size 256"
    " --expert-model-parallel-size 8 --expert-tensor-parallel-size 1"
)
MIXTRAL_8X7B = (
    f"{MIXTRAL} --num-layers 32 --hidden-size 4096 --num-attention-heads 32"
    " --ffn-hidden-size 14336 --pipeline-model-parallel-size 4"
    " --num-virtual-stages-per-pipeline-rank 8"
)
MIXTRAL_8X22B = (
    f"{MIXTRAL} --num-layers 56 --hidden-size 6144 --num-attention-heads 48"
    " --ffn-hidden-size 16384 --tensor-model-parallel-size 2 --sequence-parallel"
    " --pipeline-model-parallel-size 4 --num-virtual-stages-per-pipeline-rank 14"
)

ROWS = (
    _gpt("1.7B", 24, 2304, 24, 1, 1, 32, 512, 137),
    _gpt("3.6B", 30, 3072, 32, 2, 1, 64, 512, 138),
    _gpt("7.5B", 36, 4096, 32, 4, 1, 128, 512, 142),
    _gpt("18.4B", 40, 6144, 48, 8, 1, 256, 1024, 135),
    _gpt("39.1B", 48, 8192, 64, 8, 2, 512, 1536, 138),
    _gpt("76.1B", 60, 10240, 80, 8, 4, 1024, 1792, 140),
    _gpt("145.6B", 80, 12288, 96, 8, 8, 1536, 2304, 148),
    _gpt("310.1B", 96, 16384, 128, 8, 16, 1920, 2160, 155),
    _gpt("529.6B", 105, 20480, 128, 8, 35, 2520, 2520, 163),
    _gpt("1008B", 128, 25600, 160, 8, 64, 3072, 3072, 163),
    Row("Mixtral 8x7B", "dgx-h100", 128, MIXTRAL_8X7B, 468, False, CORE_MOE, "recalled"),
    Row(
        "Mixtral 8x22B (MFU 49.3%)",
        "dgx-h100",
        128,
        MIXTRAL_8X22B,
        0.493 * 989,
        False,
        "arXiv:2504.14960 abstract",
        "checked MFU, layout assumed",
    ),
)


def config_of(row: Row) -> RunConfig:
    """The checked configuration of a row."""
    return parse([*row.flags.split(), "--world-size", str(row.gpus)], {})


def counted_flops(cfg: RunConfig, hardware: bool) -> float:
    """FLOPs of a step as the source counts them: PTD-P's formula with recomputation, or
    Megatron-LM's with whole (not causal) attention."""
    t, seq = cfg.transformer, cfg.model.seq_length
    tokens = cfg.train.global_batch_size * seq
    if hardware:
        share = 1 + seq / (6 * t.hidden_size)
        share += cfg.model.padded_vocab_size / (16 * t.num_layers * t.hidden_size)
        return 96 * tokens * t.num_layers * t.hidden_size**2 * share
    from megatron_ext.costs.flops import attention_flops, model_flops_per_token

    more = 3 * sum(attention_flops(cfg, i) for i in range(t.num_layers))
    return tokens * (model_flops_per_token(cfg) + more)


def predicted(row: Row, cluster: Cluster | None = None) -> float:
    """TFLOP/s a GPU, counted as the row counts."""
    cfg = config_of(row)
    seconds = step(cfg, cluster or load(row.cluster)).seconds
    return counted_flops(cfg, row.hardware) / seconds / row.gpus / 1e12


def errors(rows: tuple[Row, ...] = ROWS) -> list[float]:
    """Prediction over publication, less one, of each row."""
    return [predicted(row) / row.tflops - 1 for row in rows]
