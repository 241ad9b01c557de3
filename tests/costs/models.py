"""Flags of published models, for counts that papers print."""

from __future__ import annotations

from megatron_ext.config import RunConfig, parse

RUN = (
    " --seq-length 4096 --max-position-embeddings 4096 --position-embedding-type rope"
    " --micro-batch-size 1 --train-iters 1 --lr 1e-4 --normalization RMSNorm --swiglu"
    " --disable-bias-linear --untie-embeddings-and-output-weights --dry-run"
)
MIXTRAL_8X7B = (
    "--num-layers 32 --hidden-size 4096 --num-attention-heads 32 --group-query-attention"
    " --num-query-groups 8 --ffn-hidden-size 14336 --num-experts 8 --moe-router-topk 2"
    " --padded-vocab-size 32000"
)
QWEN3_30B_A3B = (
    "--num-layers 48 --hidden-size 2048 --num-attention-heads 32 --group-query-attention"
    " --num-query-groups 4 --kv-channels 128 --qk-layernorm --ffn-hidden-size 6144"
    " --moe-ffn-hidden-size 768 --num-experts 128 --moe-router-topk 8 --padded-vocab-size 151936"
)
OLMOE_1B_7B = (
    "--num-layers 16 --hidden-size 2048 --num-attention-heads 16 --qk-layernorm"
    " --ffn-hidden-size 1024 --num-experts 64 --moe-router-topk 8 --padded-vocab-size 50304"
)
DEEPSEEK_V2_LITE = (
    "--num-layers 27 --hidden-size 2048 --num-attention-heads 16 --multi-latent-attention"
    " --kv-lora-rank 512 --qk-layernorm --ffn-hidden-size 10944 --moe-ffn-hidden-size 1408"
    " --num-experts 64 --moe-router-topk 6 --moe-shared-expert-intermediate-size 2816"
    " --moe-layer-freq ([0]*1+[1]*26) --padded-vocab-size 102400"
)
DEEPSEEK_V3 = (
    "--num-layers 61 --hidden-size 7168 --num-attention-heads 128 --multi-latent-attention"
    " --q-lora-rank 1536 --kv-lora-rank 512 --qk-layernorm --ffn-hidden-size 18432"
    " --moe-ffn-hidden-size 2048 --num-experts 256 --moe-router-topk 8"
    " --moe-shared-expert-intermediate-size 2048 --moe-layer-freq ([0]*3+[1]*58)"
    " --moe-router-score-function sigmoid --moe-router-enable-expert-bias"
    " --padded-vocab-size 129280"
)
TINY = (
    "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --ffn-hidden-size 128"
    " --num-experts 8 --moe-router-topk 2 --vocab-size 1000"
)


def config(model: str, extra: str = "") -> RunConfig:
    """The checked configuration of a model with further flags."""
    return parse((model + RUN + " " + extra).split(), {})
