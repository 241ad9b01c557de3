"""A tiny mixture of experts as flags, and helpers that train it on forked ranks."""

from __future__ import annotations

import json
from pathlib import Path

TINY = """
--num-layers 4 --hidden-size 64 --num-attention-heads 4 --group-query-attention --num-query-groups 2
--ffn-hidden-size 128 --moe-ffn-hidden-size 96 --num-experts 8 --moe-router-topk 2
--moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 0.01 --moe-z-loss-coeff 1e-3
--moe-token-dispatcher-type alltoall --normalization RMSNorm --swiglu --disable-bias-linear
--position-embedding-type rope --untie-embeddings-and-output-weights --moe-grouped-gemm
--hidden-dropout 0 --attention-dropout 0
--seq-length 64 --max-position-embeddings 64 --micro-batch-size 2 --global-batch-size 8
--train-iters 5 --lr 1e-3 --min-lr 1e-4 --lr-decay-style cosine --clip-grad 1.0 --weight-decay 0.1
--mock-data --tokenizer-type NullTokenizer --vocab-size 250 --eval-iters 0 --log-interval 1
--device cpu
""".split()


def pretrain(argv: list[str]) -> None:
    """pretrain_moe.py with these flags on this rank."""
    from pretrain_moe import main

    main(argv)


def read_metrics(run: Path, key: str = "lm_loss") -> list[float]:
    """The values of `key` over the steps of RUN/metrics.jsonl."""
    lines = (json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())
    return [line[key] for line in lines if key in line]
