"""The whole training step of ours and of what people would use instead, interleaved.

    python -m tests.bench step --model bench-moe --dtype bf16 --peers --json step.json
    python -m tests.bench step --model bench-moe-L --peers --at-once 3  # 5 GiB each: few at a time
    python -m tests.bench step --ranks 2                # dp2 and ep2 against one process, no peers

Ours is the real training loop with its default flags (tests/bench/ours.py); a peer is forward,
backward, clipping and AdamW (tests/bench/peers), with ours' numbers (tests/bench/recipe.py). Where
its curve is not ours' to a tolerance and nothing explains it, the bench ends with 1. All see the
same batches of --mock-data. Peers run in the Python of --peers-python (or $PEERS_PYTHON, or
.venv-peers), which has requirements-peers.txt.

--at-once N: peers in groups of N, each group interleaved with ours and the ceilings; "ours is" is
taken within a group, ours' own line is over all rounds. --tune-peers: peers get what our trainer
does to a process on a CPU (blocks of memory kept, fp32 products through oneDNN).

tokens/s: tokens of a step by the median over the rounds of a round's median step; several ranks
take a micro-batch each. MFU: model FLOPs of a token (megatron_ext.costs.flops: no recomputation,
causal half of attention, the router and the output counted, padding not) times tokens/s by the
dense matrix product's FLOP/s measured in this run. Peak: VmHWM of the process, of the largest rank;
"- imports" is less what the process held after its imports.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from tests.bench import table
from tests.bench.driver import Candidate, Result, interleaved, started
from tests.bench.peers import candidates as peers
from tests.bench.recipe import disagreements, recipe_of
from tests.bench.shapes import Shape, add_flags, flags_of, shape_of
from tests.bench.step_table import Found, report

OURS, LIMITS = "ours", "ceilings"
BATCHES = 64
SECONDS_TO_LOAD, SECONDS_OF_A_TURN = 900, 300


def write_batches(cfg: Any, path: Path) -> None:
    """The first batches of the run, int64 [BATCHES, B, S + 1], for the peers."""
    import numpy as np

    from data.mock import MockDataset
    from data.rules import Rules
    from megatron_ext.train import setup

    words = setup.tokenizer(cfg)
    sequence, seed = cfg.model.seq_length, cfg.train.seed
    count = BATCHES * cfg.train.global_batch_size
    samples = MockDataset(count, sequence, words.vocab_size, Rules(eod=words.eod), seed, 0)
    batch = cfg.train.global_batch_size
    rows = [samples.sample(index)[0] for index in range(BATCHES * batch)]
    np.save(path, np.stack(rows).reshape(BATCHES, batch, -1))


def own_candidates(args: argparse.Namespace, flags: list[str]) -> list[Candidate]:
    """Ceilings, ours, ours on several ranks."""
    found = [
        Candidate(LIMITS, "limits", threads=args.threads),
        Candidate(OURS, "ours", "one", threads=args.threads, more={"flags": flags}),
    ]
    parts = {"ep": ["--expert-model-parallel-size", str(args.ranks)], "dp": []}
    return found + [
        Candidate(
            f"{OURS}, {name}{args.ranks}",
            "ours",
            name,
            threads=max(1, args.threads // args.ranks),
            ranks=args.ranks,
            more={"flags": [*flags[:-1], str(args.sequences * args.ranks), *more]},
        )
        for name, more in parts.items()
        if args.ranks > 1
    ]


def options() -> argparse.ArgumentParser:
    """The flags."""
    parser = table.parser("step", __doc__)
    add_flags(parser)
    parser.add_argument("--steps", type=int, default=4, help="timed steps of a turn")
    parser.add_argument("--warm", type=int, default=4, help="steps before the first round")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--ranks", type=int, default=1, help="also ours on so many gloo ranks")
    peers.add_flags(parser)
    parser.add_argument("--at-once", type=int, default=100, help="peers that are loaded together")
    return parser


def measured(args: argparse.Namespace, flags: list[str] | None = None) -> tuple[Found, Shape]:
    """The results of the asked comparison."""
    from megatron_ext.config import parse

    flags = flags or flags_of(args.model, args.dtype, args.sequences)
    with tempfile.TemporaryDirectory() as name:
        cfg = parse([*flags, "--run-dir", name])
        shape, data = shape_of(cfg), Path(name) / "batches.npy"
        write_batches(cfg, data)
        spec = {
            "shape": shape.to_dict(),
            "dtype": args.dtype,
            "threads": args.threads,
            "data": str(data),
            "recipe": recipe_of(cfg),
            "tune": args.tune_peers,
        }
        own = own_candidates(args, flags)
        others = peers.candidates(args, "peers.training")
        found = Found(Result(own[0]), Result(own[1]))
        for first in range(0, max(1, len(others)), args.at_once):
            group = [*own, *others[first : first + args.at_once]]
            with started(group, spec, SECONDS_TO_LOAD, args.warm) as all_:
                found.add(interleaved(all_, args.rounds, args.steps, SECONDS_OF_A_TURN))
            own = own[:2]  # several ranks once
        return found, shape


def main(argv: list[str]) -> int:
    """Measure and print; 1 where ours did not run."""
    args = options().parse_args(argv)
    found, shape = measured(args)
    print(report(found, shape, args))
    wrong = disagreements(found.ours, [other for other, _ in found.others])
    for line in wrong:
        print(f"curves: {line}")
    return 1 if found.ours.error or wrong else 0
