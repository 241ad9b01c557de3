"""A tiny run, its uninterrupted reference, the same run with a fault, and the comparison."""

from __future__ import annotations

import json
import os
import shutil
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from data.indexed import write_pair
from tests.faults import program
from tests.faults.ranks import Ending, Ranks, children, orphans
from tests.ranks.tiny import TINY

LIMIT_S = 240.0
TORCH_CACHE = "torchinductor_"
"""A folder that torch makes once for a user and keeps."""
ATTEMPTS = 4
LAYOUTS = {
    "pp2 ep2 distopt": "--pipeline-model-parallel-size 2 --expert-model-parallel-size 2 "
    "--use-distributed-optimizer",
    "tp2 pp2": "--tensor-model-parallel-size 2 --sequence-parallel "
    "--pipeline-model-parallel-size 2",
    "dp4 ep4 distopt": "--expert-model-parallel-size 4 --use-distributed-optimizer",
    "vpp2 ep2": "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2 "
    "--expert-model-parallel-size 2",
}
WORLD = 4
STEPS, INTERVAL = 8, 2
SMALL = f"""
--hidden-size 32 --num-attention-heads 2 --num-query-groups 2 --ffn-hidden-size 64
--moe-ffn-hidden-size 48 --seq-length 16 --max-position-embeddings 16 --hidden-dropout 0.1
--attention-dropout 0.1 --train-iters {STEPS} --save-interval {INTERVAL}
--eval-interval 3 --eval-iters 1 --async-save --keep-last 2 --split 90,10,0 --no-mock-data
""".split()


@dataclass(frozen=True)
class Plan:
    """What to run: flags, ranks, where."""

    out: Path
    flags: tuple[str, ...]
    world: int = WORLD

    @property
    def argv(self) -> list[str]:
        """The command line, the same for every attempt."""
        run = self.out / "run"
        save = run / "checkpoints"
        folders = ["--run-dir", run, "--save", save, "--load", save]
        folders += ["--data-cache-path", self.out / "cache"]
        return [*TINY, *SMALL, *self.flags, *map(str, folders)]


@dataclass
class Story:
    """What a run, in one or more attempts, left."""

    plan: Plan
    endings: list[Ending] = field(default_factory=list)
    residue: list[str] = field(default_factory=list)

    def lines(self, kind: str, rank: int = 0) -> list[dict]:
        """The records of a rank; a line cut by a kill is left out."""
        path = self.plan.out / f"{kind}_{rank}.jsonl"
        found = []
        for line in path.read_text().splitlines() if path.exists() else ():
            try:
                found.append(json.loads(line))
            except ValueError:
                continue  # killed while it was written
        return found

    def history(self) -> dict[int, tuple]:
        """The surviving history: of each step what its last computation gave."""
        return {line["step"]: facts(line) for line in self.lines("history")}

    def finals(self) -> list[dict | None]:
        """State of each rank after the last step."""
        paths = [self.plan.out / f"final_{rank}.json" for rank in range(self.plan.world)]
        return [json.loads(path.read_text()) if path.exists() else None for path in paths]

    def logs(self, attempt: int | None = None) -> str:
        """What the ranks printed."""
        name = "attempt_*" if attempt is None else f"attempt_{attempt}"
        paths = sorted(self.plan.out.glob(f"{name}.rank_*.log"))
        return "\n".join(path.read_text(errors="replace") for path in paths)

    def fatals(self, attempt: int | None = None) -> list[str]:
        """The FATAL lines."""
        return [line for line in self.logs(attempt).splitlines() if line.startswith("FATAL")]

    def marks(self, what: str, attempt: int | None = None) -> list[dict]:
        """Moments of all ranks."""
        found = [m for rank in range(self.plan.world) for m in self.lines("marks", rank)]
        return [m for m in found if m["what"] == what and attempt in (None, m["attempt"])]

    def step_s(self) -> float:
        """Median seconds of a step."""
        return statistics.median(line["seconds"] for line in self.lines("history"))


def facts(line: dict) -> tuple:
    """What must be equal of a step, bit for bit."""
    return line["loss"], line["grad_norm"], line["samples"]


def write_data(folder: Path, seed: int) -> Path:
    """Prefix of a pair with 60 documents of ids below 250."""
    state = np.random.RandomState(seed)
    folder.mkdir(parents=True, exist_ok=True)
    documents = [state.randint(0, 250, state.randint(8, 60)) for _ in range(60)]
    write_pair(folder / "tokens", documents, np.uint16)
    return folder / "tokens"


def attempt(
    plan: Plan,
    number: int,
    fault: program.Fault | None = None,
    each: Callable[[Ranks], None] | None = None,
    prepare: program.Prepare | None = None,
    limit_s: float = LIMIT_S,
) -> Ending:
    """Starts the ranks once and waits for their end."""
    plan.out.mkdir(parents=True, exist_ok=True)
    temporary = plan.out / "tmp"
    temporary.mkdir(exist_ok=True)

    def run() -> None:
        program.run(plan.argv, plan.out, number, fault, prepare)

    settings = {"TMPDIR": str(temporary), "OMP_NUM_THREADS": "1"}
    return Ranks(run, plan.world, plan.out, number, settings).wait(limit_s, each)


def story(
    plan: Plan,
    fault: program.Fault | None = None,
    each: Callable[[Ranks], None] | None = None,
    prepare: program.Prepare | None = None,
    attempts: int = ATTEMPTS,
    between: Callable[[Plan], None] | None = None,
) -> Story:
    """Runs until it ends well; the fault, what comes from outside and the preparation are of the
    first attempt only, ``between`` is called once after it.
    """
    told = Story(plan)
    known, memory = set(children()), shared_memory()
    for number in range(attempts):
        bad = (fault, each, prepare) if number == 0 else (None, None, None)
        told.endings.append(attempt(plan, number, *bad))
        if told.endings[-1].is_good:
            break
        if number == 0 and between is not None:
            between(plan)
    told.residue += [f"process {pid}" for pid in orphans(known)]
    shared = shared_memory() - memory  # semaphores may be of any other program's
    told.residue += [f"/dev/shm/{name}" for name in sorted(shared) if name[:4] != "sem."]
    left = [path.name for path in (plan.out / "tmp").iterdir()]
    told.residue += [f"tmp {name}" for name in left if not name.startswith(TORCH_CACHE)]
    return told


def difference(told: Story, reference: Story) -> str:
    """Where a story is not its reference, bit for bit; empty where it is."""
    expected, found = reference.history(), told.history()
    if sorted(expected) != sorted(found):
        return f"steps {sorted(found)} instead of {sorted(expected)}"
    for line in told.lines("history"):
        if facts(line) != expected[line["step"]]:
            return f"step {line['step']} of attempt {line['attempt']} is another"
    for rank, (mine, theirs) in enumerate(zip(told.finals(), reference.finals(), strict=True)):
        if mine is None or theirs is None:
            return f"rank {rank} left no final state"
        wrong = [key for key in theirs if mine.get(key) != theirs[key]]
        if wrong or len(mine) != len(theirs):
            return f"final state of rank {rank}: {len(wrong)} of {len(theirs)} differ ({wrong[:2]})"
    return ""


def shared_memory() -> set[str]:
    """Names in /dev/shm."""
    try:
        return set(os.listdir("/dev/shm"))
    except OSError:
        return set()


def times(told: Story) -> dict[str, float]:
    """Detection, recovery split and steps lost of a story whose first attempt was ended by a
    fault; see docs/reliability.md for T0 to T8.
    """
    faults = told.marks("fault", 0)
    if not faults or len(told.endings) < 2:
        return {}
    t0, ending, second = faults[0]["at"], told.endings[0], told.endings[1]
    done = [line for line in told.lines("history") if line["attempt"] == 0 and line["at"] <= t0]
    reached = max((line["step"] for line in done), default=0)
    loaded = told.marks("loaded", 1)
    found = {"detect_s": ending.detected_at - t0, "gone_s": ending.gone_at - ending.detected_at}
    if loaded:
        found["steps_lost"] = reached - loaded[0]["step"]
        found["rendezvous_s"] = _at(told.marks("groups", 1)) - second.spawned_at
        found["load_s"] = loaded[0]["at"] - _at(told.marks("groups", 1))
        found |= _after(told, t0, reached, loaded[0]["at"])
    return found


def _at(marks: Iterable[dict]) -> float:
    return max(mark["at"] for mark in marks)


def _after(told: Story, t0: float, reached: int, loaded_at: float) -> dict[str, float]:
    steps = [line for line in told.lines("history") if line["attempt"] == 1]
    if not steps:
        return {}
    found = {"first_step_s": steps[0]["at"] - loaded_at, "mttr_s": steps[0]["at"] - t0}
    beyond = [line["at"] for line in steps if line["step"] > reached]
    return found | ({"catch_up_s": beyond[0] - t0} if beyond else {})


def clear(plan: Plan) -> None:
    """Removes what a passed trial left; a failed one stays for whoever looks."""
    shutil.rmtree(plan.out, ignore_errors=True)
