"""Train a step of a run once more from the checkpoint before it, and show its batch.

    python -m megatron_ext.replay --run RUN --step N

RUN and its checkpoints are only read. Each replayed step is compared with RUN/metrics.jsonl; the
exit code is 1 where one differs. On the CPU the ranks of the run are forked here; on GPUs start it
as the run was: torchrun --nproc-per-node 8 -m megatron_ext.replay --run RUN --step N.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_ext.command import CommandLine, number
from megatron_ext.config import RunConfig, parse
from megatron_ext.device import start
from megatron_ext.errors import ConfigError, Fatal, exit_on_fatal, report
from megatron_ext.replay import records

TIMEOUT_S = 7 * 24 * 3600


def _parser() -> argparse.ArgumentParser:
    parser = CommandLine("python -m megatron_ext.replay", __doc__)
    parser.add_argument("--run", type=Path, required=True, help="the run's folder")
    looked_at = "the step to look at"
    parser.add_argument("--step", type=number("Whole"), required=True, help=looked_at)
    parser.add_argument(
        "--from-start", action="store_true", help="from the initial weights, not a checkpoint"
    )
    return parser


def _rank(cfg: RunConfig, asked: Any) -> tuple[int, Any]:
    """One rank: (exit code, program.Replayed or None)."""
    device = start(cfg.parallel.device, cfg.parallel.distributed_backend)

    import torch

    from megatron_ext.replay import program

    try:
        return 0, program.replay(cfg, asked, device)
    except Fatal as error:
        is_first = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
        if error.lines() and (is_first or not error.every_rank):
            report(error, int(os.environ.get("RANK", "0")))
        return error.code, None


def _forked(cfg: RunConfig, asked: Any) -> list[tuple[int, Any]]:
    if start(cfg.parallel.device).kind != "cpu":
        ranks = cfg.parallel.world_size
        raise ConfigError(
            f"a run of {ranks} ranks on GPUs is replayed on the same ranks",
            do=f"torchrun --nproc-per-node {ranks} -m megatron_ext.replay --run RUN --step N",
        )
    from megatron_ext.mesh.forks import run_ranks
    from megatron_ext.replay import program  # noqa: F401 - imported once, before the forks

    return run_ranks(_rank, cfg.parallel.world_size, cfg, asked, timeout_s=TIMEOUT_S)


def _show(replayed: Any, step: int, kept: dict[int, dict[str, Any]]) -> int:
    """Print what came out; 1 where a step is not what it was."""
    differ = {n: records.differences(v, kept.get(n)) for n, v in replayed.steps.items()}
    for one, found in differ.items():
        for text in found:
            print(f"step {one}: {text}")
    compared = [one for one in replayed.steps if one in kept]
    equal = [one for one in compared if not differ[one]]
    print(
        f"replayed to step {step} from {replayed.source}: {len(equal)} of {len(compared)} recorded"
        f" steps are equal bit for bit ({', '.join(records.COMPARED)})"
    )
    if replayed.problem:
        print(f"step {step}: {replayed.problem}")
    else:
        values = replayed.steps.get(step)
        shown = " ".join(f"{k} {v!r}" for k, v in values.items()) if values else "is skipped"
        print(f"step {step}: {shown}")
    print("\n".join(replayed.lines))
    return int(len(equal) < len(compared))


def run(argv: Sequence[str] | None = None) -> int:
    """The command of `argv`; its exit code. Raises Fatal."""
    args = _parser().parse_args(argv)
    kept = records.require_step(args.run, args.step)
    cfg = parse(records.flags_of(args.run))
    is_rank = "RANK" in os.environ
    with tempfile.TemporaryDirectory(prefix="replay-") as scratch:
        start(cfg.parallel.device)
        from megatron_ext.replay.program import Asked

        asked = Asked(args.run, args.step, Path(scratch), args.from_start)
        alone = is_rank or cfg.parallel.world_size == 1
        results = [_rank(cfg, asked)] if alone else _forked(cfg, asked)
    code = max(code for code, _ in results)
    replayed = results[0][1]
    if code or replayed is None or os.environ.get("RANK", "0") != "0":
        return code
    return _show(replayed, args.step, kept)


if __name__ == "__main__":
    with exit_on_fatal():
        sys.exit(run())
