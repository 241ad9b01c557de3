"""How long a rank takes to its first step and what it holds by then, each in a fresh process.

    imports   torch; pretrain_moe (flags and rules, no torch); all that a rank imports
    dry run   pretrain_moe.py --dry-run of a small model, and of DeepSeek-V3 for 8,192 ranks
    rank      pretrain_moe.py until it stands before its first step, and until that step is taken
    launch    a whole run of two ranks and one step, which it saves: launch/run.sh and torchrun

Wall clock from before the process exists, CPU seconds of the process and its children, its memory
at that moment (VmRSS) and the most until then (VmHWM). Byte code is cached, as after a first start;
PYTHONDONTWRITEBYTECODE, which would keep megatron-core's from being cached for the CPU
(device/lift.py), is taken out of the environment.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from tests.bench.gate import memory_mib

ROOT = Path(__file__).parents[2]
LARGE_RANKS = 8192
LARGE = (
    *("--config", "configs/deepseek-v3.yaml", "configs/layouts/deepseek-v3.h100.yaml"),
    *("--world-size", str(LARGE_RANKS), "--global-batch-size", "16384"),
    *("--rampup-batch-size", "4096", "4096", "114501953"),
)
ONE_STEP = ("--train-iters", "1")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "pretrain_moe.py")
MEMORY = ("rss", "peak")
HEAD = ("what", "wall s", "CPU s", "RSS MiB", "peak MiB")


@dataclass(frozen=True)
class Case:
    """`marks`: the names of the moments that the process reports, in order."""

    action: str
    argv: tuple[str, ...]
    marks: tuple[str, ...]


def cases(model: str) -> list[Case]:
    """What the table measures, for a rank that trains `model`."""
    small = ("--config", model)
    return [
        Case("import", ("torch",), ("import torch",)),
        Case("import", ("pretrain_moe",), ("import pretrain_moe",)),
        Case("program", (*small, "--dry-run"), ("--dry-run",)),
        Case(
            "program",
            (*LARGE, "--dry-run"),
            (f"--dry-run of DeepSeek-V3 on {LARGE_RANKS:,} ranks",),
        ),
        Case("launch", ("launch/local.py", "2", *small, *ONE_STEP), ("launch/run.sh, 2 ranks",)),
        Case("launch", (*TORCHRUN, *small, *ONE_STEP), ("torchrun, 2 ranks",)),
        Case("rank", small, ("rank: imported", "rank: before its first step", "rank: step taken")),
    ]


def _mark(begin: float) -> None:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    found = {
        "wall": time.monotonic() - begin,
        "cpu": sum(one.ru_utime + one.ru_stime for one in used),
        "rss": memory_mib(),
        "peak": memory_mib("VmHWM"),
    }
    print(json.dumps(found), file=sys.__stderr__, flush=True)


def _rank(argv: Sequence[str], begin: float) -> None:
    """The program with a reading before the first step and after it; then it is over."""
    from launch import warm
    from megatron_ext.train import stop

    warm.load()
    _mark(begin)
    import pretrain_moe
    from megatron_ext.config import parse
    from megatron_ext.train import loop

    take_step = loop._take_step
    with tempfile.TemporaryDirectory() as folder:

        def watched(*args: Any) -> None:
            _mark(begin)
            take_step(*args)
            _mark(begin)
            shutil.rmtree(folder)
            os._exit(0)

        loop._take_step = watched
        cfg = parse([*argv, "--run-dir", folder])
        with stop.StopRequest(cfg.train) as request:
            pretrain_moe.pretrain(cfg, request)


def main(argv: list[str]) -> None:
    """BEGIN ACTION ARGV...: one case, in this process; its marks go to stderr."""
    begin, action, *rest = float(argv[0]), *argv[1:]
    if action == "rank":
        return _rank(rest, begin)
    if action == "import":
        __import__(rest[0])
    elif action == "launch":
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, *rest, "--run-dir", folder]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    else:
        import pretrain_moe

        pretrain_moe.main(rest)
    return _mark(begin)


def once(case: Case) -> list[dict[str, float]]:
    """The marks of one fresh process."""
    code = "import sys; sys.argv.insert(0, ''); from tests.bench.start_rank import main"
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    command = [sys.executable, "-c", f"{code}; main(sys.argv[2:])", str(time.monotonic())]
    done = subprocess.run(
        [*command, case.action, *case.argv],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    found = [json.loads(line) for line in done.stderr.splitlines() if line.startswith('{"wall"')]
    if len(found) != len(case.marks):
        raise RuntimeError(f"{case.action} {' '.join(case.argv)}: {done.stderr[-800:]}")
    return found


def measure(model: str, rounds: int) -> list[dict[str, Any]]:
    """One line for each mark: medians over `rounds` processes of each case, in turn."""
    all_ = cases(model)
    found: dict[tuple[str, str], list[dict[str, float]]] = {}
    for case in all_:
        once(case)
    for _ in range(rounds):
        for case in all_:
            for name, mark in zip(case.marks, once(case)):
                found.setdefault((case.action, name), []).append(mark)
    return [
        {
            "action": action,
            "what": name,
            **{key: median(mark[key] for mark in marks) for key in marks[0]},
        }
        for (action, name), marks in found.items()
    ]


def rows(lines: Sequence[dict[str, Any]]) -> list[list[Any]]:
    """Cells of the table; a launcher's own memory says nothing."""
    return [
        [
            line["what"],
            *(f"{line[key]:.2f}" for key in ("wall", "cpu")),
            *(f"{line[key]:,.0f}" if line["action"] != "launch" else None for key in MEMORY),
        ]
        for line in lines
    ]
