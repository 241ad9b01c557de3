"""How long a save stops training, and how fast it reaches the disk, beside what else there is.

    python -m tests.bench checkpoint --ranks 2 --rounds 5 --hidden 512 --folder /some/disk --peers

Every round takes all measurements in turn on the same state and disk; shown are medians over the
rounds, of the slowest rank. Blocking is what a save adds to the loop: the call itself and, for a
lazy one, the wait before the next update. Ceilings: a plain copy of the same tensors and O_DIRECT
writes of the same bytes, as many ranks at once. --peers adds the saves of checkpoint_peers.py.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from tests.bench import table
from tests.bench.ceilings import direct_write_s
from tests.bench.checkpoint_peers import dcp_save, try_mcore
from tests.checkpoint.small_run import checkpointer, small_run
from tests.ranks.harness import run_ranks


def _timed(action) -> float:
    begin = time.perf_counter()
    action()
    return time.perf_counter() - begin


def _tensors(run) -> list[torch.Tensor]:
    """All weights and optimizer states of this rank, as a plain list."""
    found = [p.data for chunk in run.state.chunks for p in chunk.parameters()]
    for leaf in getattr(run.state.optimizer, "chained_optimizers", [run.state.optimizer]):
        states = leaf.optimizer.state.values()
        found += [v for state in states for v in state.values() if v.numel() > 1]
    return found


def _copy(tensors: list[torch.Tensor], buffers: list[torch.Tensor]) -> float:
    return _timed(lambda: [b.copy_(t) for b, t in zip(buffers, tensors)])


def _async(run, saver) -> dict[str, float]:
    """One lazy save with training going on until it is durable."""
    waits, gaps, total = [], [], time.perf_counter()
    call = _timed(lambda: saver.save(run.state))
    inner = run.state.before_update
    run.state.before_update = lambda: waits.append(_timed(inner))
    while not saver.poll():
        gaps.append(_timed(run.step))
    run.state.before_update = inner
    return {
        "lazy blocking": call + (waits[0] if waits else 0.0),
        "lazy save() alone": call,
        "lazy until durable": time.perf_counter() - total,
        "step in flight": statistics.median(gaps) if gaps else float("nan"),
    }


def _quiet(run, saver) -> dict[str, float]:
    """The same save while nothing else runs: what the writer reaches."""
    begin = time.perf_counter()
    saver.save(run.state)
    saver.poll(blocking=True)
    return {"save without training until durable": time.perf_counter() - begin}


def _measure(
    flags: str, rounds: int, folder: Path, with_peers: bool
) -> tuple[dict[str, list[float]], int, str]:
    """All rounds on one rank: name -> seconds; bytes; why megatron-core's save does not run."""
    found: dict[str, list[float]] = {}
    problem = ""

    def keep(values: dict[str, float]) -> None:
        for name, value in values.items():
            found.setdefault(name, []).append(value)

    with small_run(flags) as run, checkpointer(folder / "ours", async_save=True) as saver:
        with checkpointer(folder / "sync") as plain:
            run.steps(3)
            tensors = _tensors(run)
            buffers = [torch.empty_like(t) for t in tensors]
            num_bytes = sum(t.numel() * t.element_size() for t in tensors)
            _copy(tensors, buffers)
            _async(run, saver)
            group = torch.distributed.new_group(backend="gloo")
            for _ in range(rounds):
                torch.distributed.barrier()
                keep({"step": statistics.median(_timed(run.step) for _ in range(3))})
                keep({"plain copy": _copy(tensors, buffers)})
                saver._wait_for(2)
                keep(_async(run, saver))
                saver._wait_for(2)
                keep(_quiet(run, saver))
                saver._wait_for(2)
                torch.distributed.barrier()
                path = folder / f"direct_{torch.distributed.get_rank()}"
                keep({"O_DIRECT + fsync": direct_write_s(path, num_bytes)})
                path.unlink()
                keep({"synchronous save": _timed(lambda: plain.save(run.state))})
                plain._wait_for(2)
                if with_peers:
                    keep(dcp_save(tensors, folder, group))
                    values, problem = ({}, problem) if problem else try_mcore(run, folder)
                    keep(values)
                for name in ("ours", "sync"):
                    for old in sorted((folder / name).glob("step_*"))[:-1]:
                        shutil.rmtree(old, ignore_errors=True)
            return found, num_bytes, problem


def main(argv: list[str]) -> None:
    """Measure and print the table."""
    parser = table.parser("checkpoint", __doc__)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--folder", type=Path, help="on the disk to measure; default: TMPDIR")
    parser.add_argument("--peers", action="store_true", help="also torch's DCP and megatron-core's")
    asked = parser.parse_args(argv)
    h = asked.hidden
    flags = (
        f"--hidden-size {h} --ffn-hidden-size {4 * h} --moe-ffn-hidden-size {2 * h}"
        f" --moe-shared-expert-intermediate-size {h} --num-attention-heads 8"
        " --use-distributed-optimizer --bf16"
    )
    folder = Path(tempfile.mkdtemp(prefix="bench-", dir=asked.folder))
    work = (flags, asked.rounds, folder, asked.peers)
    try:
        results = run_ranks(_measure, asked.ranks, *work, timeout_s=900)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(_report(results))
    seconds, num_bytes, problem = zip(*results)
    content = {"seconds": seconds, "bytes_a_rank": num_bytes[0], "mcore_problem": problem[0]}
    ratios = {name: _ratio(results, *of) for name, of, _ in RATIOS}
    table.write_json(asked.json, {"table": "checkpoint", **content, "ratios": ratios})


RATIOS = (
    ("blocking / plain copy", ("lazy blocking", "plain copy"), "target 1.25"),
    (
        "persist / O_DIRECT",
        ("O_DIRECT + fsync", "save without training until durable"),
        "target 0.7",
    ),
    ("step in flight / step", ("step in flight", "step"), "target 1.05 with a free core"),
)


def _report(results: list) -> str:
    """The table and the ratios to its ceilings."""
    size, problem, where = results[0][1], results[0][2], table.machine()
    medians = {
        name: max(statistics.median(found[name]) for found, _, _ in results)
        for name in results[0][0]
    }
    rows: list[list[Any]] = [
        [name, f"{1000 * seconds:,.1f}", None if "step" in name else f"{size / seconds / 1e9:.2f}"]
        for name, seconds in medians.items()
    ]
    rows += [[f"mcore async: {problem}", None, None]] if problem else []
    lines = [
        f"{len(results)} ranks, {size / 2**20:.0f} MiB a rank, medians, slowest rank;"
        f" {where['cpu']}, {where['cores']} cores, load {where['load']}",
        "",
        table.markdown(("what", "ms", "GB/s a rank"), rows),
        "",
    ]
    lines += [f"{name}: {_ratio(results, *of):.2f} ({note})" for name, of, note in RATIOS]
    return "\n".join(lines)


def _ratio(results: list, above: str, below: str) -> float:
    """Median over the rounds of the quotient within a round, which other work on the machine hits
    alike; of the worst rank's.
    """
    return max(
        statistics.median(a / b for a, b in zip(found[above], found[below]))
        for found, _, _ in results
    )
