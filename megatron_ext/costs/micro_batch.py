"""Sizes of one micro-batch on one rank, from which the bytes of activations follow.

Letters: T tokens of this rank's context part, t = T/tp with sequence parallelism, H hidden, w bytes
of a number (2 or 4), B micro-batch.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_ext.config import RunConfig

ID_BYTES = 8
FP32 = 4


@dataclass(frozen=True)
class Shape:
    """Sizes of one micro-batch on one rank; see the letters above."""

    T: int
    t: int
    w: int
    B: int
    H: int
    tp: int
    te: bool
    cpu: bool


def shape_of(cfg: RunConfig) -> Shape:
    """The micro-batch of a rank."""
    p, t = cfg.parallel, cfg.transformer
    tokens = cfg.model.seq_length * cfg.train.micro_batch_size // p.context_parallel_size
    tp = p.tensor_model_parallel_size
    return Shape(
        T=tokens,
        t=tokens // tp if p.sequence_parallel else tokens,
        w=2 if cfg.train.bf16 or cfg.train.fp16 else 4,
        B=cfg.train.micro_batch_size,
        H=t.hidden_size,
        tp=tp,
        te=cfg.model.transformer_impl == "transformer_engine",
        cpu=p.device == "cpu",
    )


def norm_bytes(cfg: RunConfig, s: Shape, width: int) -> int:
    """Of one row of `width`: the row itself and its statistics. On CUDA without Transformer Engine,
    torch's RMSNorm keeps the fp32 input, the normalised fp32 row and 1/rms."""
    if cfg.transformer.normalization == "LayerNorm" and not s.te:
        return width * s.w + 2 * s.w
    return width * s.w + FP32 if s.te or s.cpu else 2 * width * FP32 + FP32
