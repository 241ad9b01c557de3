"""Bytes that a run writes about itself, by layers and experts.

Two runs of a tiny model of each size, a short and a long one; what the long one wrote more, by its
more steps. A line of the console is of every --log-interval (100) steps, TensorBoard and
metrics.jsonl of every step, a record of the routing (routing.jsonl, pictures and tables in
TensorBoard) of every --log-routing-interval (100) steps. "A step" adds these up with the default
intervals.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_ext.mesh.forks import run_ranks

SHORT, LONG, RECORD, LINE = 4, 24, 10, 100
TINY = (
    *("--device", "cpu", "--mock-data", "--tokenizer-type", "NullTokenizer", "--vocab-size", "127"),
    *("--hidden-size", "32", "--num-attention-heads", "2", "--ffn-hidden-size", "32"),
    *("--moe-ffn-hidden-size", "16", "--moe-router-topk", "2", "--moe-grouped-gemm", "--swiglu"),
    *("--moe-router-load-balancing-type", "aux_loss", "--moe-aux-loss-coeff", "0.01"),
    *("--moe-token-dispatcher-type", "alltoall", "--disable-bias-linear"),
    *("--position-embedding-type", "rope", "--normalization", "RMSNorm"),
    *("--seq-length", "16", "--max-position-embeddings", "16", "--micro-batch-size", "1"),
    *("--global-batch-size", "1", "--lr", "1e-3", "--eval-iters", "0", "--log-interval", "1"),
)
HEAD = (
    *("layers", "experts", "console a line", "metrics.jsonl a step", "TensorBoard a step"),
    *("routing a record", "bytes a step", "by layer and expert"),
)


def _train(flags: Sequence[str], folder: str) -> None:
    """One run of this process, its console in a file."""
    import pretrain_moe
    from megatron_ext.config import parse
    from megatron_ext.train.stop import StopRequest

    cfg = parse([*flags, "--run-dir", f"{folder}/run"])
    with (
        open(Path(folder) / "console", "w") as console,
        contextlib.redirect_stdout(console),
        StopRequest(cfg.train) as stop,
    ):
        pretrain_moe.pretrain(cfg, stop)


def _written(layers: int, experts: int, steps: int, record: int) -> dict[str, int]:
    flags = [*TINY, "--num-layers", str(layers), "--num-experts", str(experts)]
    flags += ["--train-iters", str(steps), "--log-routing-interval", str(record)]
    with tempfile.TemporaryDirectory() as name:
        run_ranks(_train, 1, flags, name)
        run = Path(name) / "run"
        events = sum(path.stat().st_size for path in run.glob("tensorboard/**/events*"))
        routing = run / "routing.jsonl"
        return {
            "console": (Path(name) / "console").stat().st_size,
            "metrics": (run / "metrics.jsonl").stat().st_size,
            "tensorboard": events,
            "routing": events + (routing.stat().st_size if routing.exists() else 0),
        }


def measure(layers: int, experts: int) -> dict[str, float]:
    """Bytes: console of a line, metrics and tensorboard of a step, routing of a record."""
    short, long = (_written(layers, experts, steps, 0) for steps in (SHORT, LONG))
    more = {name: (long[name] - short[name]) / (LONG - SHORT) for name in short}
    with_records = _written(layers, experts, LONG, RECORD)
    records = LONG // RECORD
    found = {
        "layers": layers,
        "experts": experts,
        **{name: more[name] for name in ("console", "metrics", "tensorboard")},
        "record": (with_records["routing"] - long["routing"]) / records,
    }
    total = found["metrics"] + found["tensorboard"] + (found["console"] + found["record"]) / LINE
    return found | {"step": total}


def lines(sizes: Sequence[tuple[int, int]]) -> list[dict[str, Any]]:
    """`measure` of each (layers, experts)."""
    from launch import warm

    warm.load()  # the runs are forked from here
    return [measure(*size) for size in sizes]


def rows(found: Sequence[dict[str, Any]]) -> list[list[Any]]:
    """Cells of the table."""
    names = ("console", "metrics", "tensorboard", "record", "step")
    return [
        [
            *(line["layers"], line["experts"], *(f"{line[name]:,.0f}" for name in names)),
            f"{line['step'] / line['layers'] / line['experts']:.1f}",
        ]
        for line in found
    ]
