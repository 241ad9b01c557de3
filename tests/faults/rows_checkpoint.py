"""Rows 8, 9, 10, 27 and 28 on checkpoints that a real run left: files that are damaged, missing,
exchanged or hostile. Thousands in one process (the reader must refuse each), and some through a
whole run, which must fall back to the step before and end bit for bit like its reference.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_ext.checkpoint.hashes import text_hash
from megatron_ext.checkpoint.manifest import MANIFEST
from megatron_ext.checkpoint.reader import StoredTensors
from tests.faults import program, trial
from tests.faults.bench import Bench, judge
from tests.faults.cell import Case, Wrong, bombs, refused, run_cases
from tests.faults.outcome import Outcome
from tests.faults.rows_data import flipped, patched
from tests.faults.trial import Plan, Story

BAD_NAMES = (
    "../rank_00000.safetensors",
    "/etc/passwd",
    "rank_00000.safetensors/../../x",
    "rank_00000.safetensors\0",
    "step_00000002",
    "",
    "rank_00000.safetensors\n",
    "a.tar",
)


class Checkpoint:
    """The newest checkpoint of a finished run, and the one before, restored before each case."""

    def __init__(self, bench: Bench, row: int) -> None:
        reference = bench.reference()
        self.source = reference.plan.out / "run" / "checkpoints"
        self.steps = sorted(path for path in self.source.iterdir() if path.name[:5] == "step_")
        self.path = bench.folder / f"row_{row}" / self.steps[-1].name
        self.random = random.Random(bench.seed * 1000 + row)
        self.files = {path.name: path.read_bytes() for path in self.steps[-1].iterdir()}
        self.older = {path.name: path.read_bytes() for path in self.steps[0].iterdir()}
        self.shards = sorted(name for name in self.files if name != MANIFEST)

    def restore(self) -> None:
        """The clean folder."""
        shutil.rmtree(self.path, ignore_errors=True)
        self.path.mkdir(parents=True)
        for name, content in self.files.items():
            (self.path / name).write_bytes(content)

    def open(self) -> None:
        """Reads the manifest and hashes every byte, as a resume does."""
        StoredTensors(self.path, verify=True).close()

    def case(self, name: str, change: Callable[[Path], object]) -> Case:
        """After ``change`` the folder must be refused by name."""

        def action() -> None:
            self.restore()
            change(self.path)
            refused(self.open, self.path)

        return name, action

    def clean(self) -> Case:
        """The folder as it was must be accepted."""

        def action() -> None:
            self.restore()
            try:
                self.open()
            except Exception as error:
                raise Wrong("false", f"a clean checkpoint was refused: {error}") from None

        return "clean checkpoint accepted", action


def _write(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda path: (path / name).write_bytes(content)


def _swap(one: str, other: str) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        first = (path / one).read_bytes()
        (path / one).write_bytes((path / other).read_bytes())
        (path / other).write_bytes(first)

    return change


def row_8(bench: Bench, count: int) -> list[Outcome]:
    """A flipped bit, a zeroed page, shards of two ranks exchanged, a shard of another step."""
    made = Checkpoint(bench, 8)
    cases = [made.clean()]
    for _ in range(count):
        name = made.random.choice(sorted(made.files))
        good, kind = made.files[name], made.random.choice(("bit", "bit", "page", "other", "swap"))
        if kind == "bit":
            content, offset = flipped(good, made.random)
            cases.append(made.case(f"bit: {name} byte {offset}", _write(name, content)))
        elif kind == "page":
            first = made.random.randrange(len(good))
            zeroed = patched(good, first, bytes(min(4096, len(good) - first)))
            if zeroed != good:
                cases.append(made.case(f"zeroed page: {name} byte {first}", _write(name, zeroed)))
        elif kind == "other":
            cases.append(made.case(f"of another step: {name}", _write(name, made.older[name])))
        else:
            pair = made.random.sample(made.shards, 2)
            cases.append(made.case(f"exchanged: {' '.join(pair)}", _swap(*pair)))
    return run_cases(8, [*cases, made.clean()]) + _fall_backs(bench, 8, _damage_newest, 2)


def row_9(bench: Bench, count: int) -> list[Outcome]:
    """A file that is cut, empty, missing, too many, or a link."""
    made = Checkpoint(bench, 9)
    cases = [made.clean()]
    for _ in range(count):
        name = made.random.choice(sorted(made.files))
        good, kind = made.files[name], made.random.choice(("cut", "empty", "missing", "extra"))
        if kind == "cut":
            content = good[: made.random.randrange(len(good))]
            cases.append(made.case(f"truncated: {name} {len(content)}", _write(name, content)))
        elif kind == "empty":
            cases.append(made.case(f"empty: {name}", _write(name, b"")))
        elif kind == "missing":
            cases.append(made.case(f"missing: {name}", lambda p, n=name: (p / n).unlink()))
        else:
            extra = made.random.choice(("rank_00099.safetensors", "x", ".metadata", "common.pt"))
            cases.append(made.case(f"extra: {extra}", _write(extra, good)))
    return run_cases(9, [*cases, made.clean()]) + _fall_backs(bench, 9, _cut_newest, 1)


def row_10(bench: Bench, count: int) -> list[Outcome]:
    """``latest`` is wrong, or points at a folder that is not whole: the newest whole one counts."""
    kinds = [_latest(text) for text in ("", "garbage", "step_99999999", "step_00000000", "\0" * 99)]
    kinds += [_latest_loop, _half_written]
    outcomes = []
    for change in kinds[: max(2, count)]:
        outcomes += _fall_backs(bench, 10, change, 1)
    return outcomes


def row_27(bench: Bench, count: int) -> list[Outcome]:
    """Names that lead out of the folder, links, pickles in the place of every file; a manifest
    whose own hash is right.
    """
    made = Checkpoint(bench, 27)
    outside = made.path.parent / "outside.safetensors"
    canary = made.path.parent / "canary"
    cases = [made.clean()]
    for bad in BAD_NAMES:
        for target in made.shards:
            change = _renamed(target, bad)
            cases.append(made.case(f"name in the manifest: {bad!r}", change))
    for target in sorted(made.files):
        cases.append(made.case(f"link to a file outside: {target}", _link(target, outside)))
        for number, bomb in enumerate(bombs(canary)):
            cases.append(made.case(f"pickle as {target}: {number}", _write(target, bomb)))
    for number in range(count):
        cases.append(made.case(f"hostile manifest: {number}", _hostile(made.random)))
    return run_cases(27, [*cases, made.clean()], canary)


def _rewritten(path: Path, change: Callable[[dict], object]) -> None:
    """The manifest with other content and a hash that fits it."""
    rest = (path / MANIFEST).read_bytes().partition(b"\n")[2]
    body = json.loads(b"{" + rest)["manifest"]
    change(body)
    text = f'"manifest": {json.dumps(body)}}}\n'.encode()
    (path / MANIFEST).write_bytes(f'{{"hash": "{text_hash(text)}",\n'.encode() + text)


def _renamed(name: str, bad: str) -> Callable[[Path], None]:
    def rename(body: dict) -> None:
        body["files"][bad] = body["files"].pop(name)

    return lambda path: _rewritten(path, rename)


def _link(name: str, outside: Path) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        shutil.copy(path / name, outside)
        (path / name).unlink()
        (path / name).symlink_to(outside)

    return change


def _hostile(state: random.Random) -> Callable[[Path], None]:
    """A random number, string or list of the manifest becomes something that cannot be."""
    seed = state.randrange(2**32)

    def change(body: dict) -> None:
        draw = random.Random(seed)
        tensor = body["tensors"][draw.choice(sorted(body["tensors"]))]
        value = draw.choice((-1, 2**62, 10**9, 1.5, "x", None, [], {}, [[-1]], True))
        kind = draw.choice(("shape", "piece", "file", "dtype", "version", "step"))
        if kind in ("version", "step"):
            body[kind] = value if value is not True else -1  # True is 1
        elif kind == "file":
            entry = body["files"][draw.choice(sorted(body["files"]))]
            name = draw.choice(("bytes", "block_bytes", "blocks", "hash"))
            is_larger = type(value) is int and value > 0  # the same single block
            entry[name] = -1 if name == "block_bytes" and is_larger else value
        elif kind == "dtype":
            tensor["dtype"] = value
        elif kind == "shape":
            tensor["shape"] = _impossible(draw, tensor["shape"], value)
        else:
            piece = draw.choice(tensor["pieces"])
            piece[draw.randrange(4)] = value if value not in ([], True) else -1

    return lambda path: _rewritten(path, change)


def _impossible(draw: random.Random, shape: list[int], value: Any) -> Any:
    """A shape that its pieces cannot fill."""
    if draw.random() < 0.5 and shape:
        place = draw.randrange(len(shape))
        wrong = shape[place] + draw.choice((1, 10**9, -shape[place] - 1))
        return [*shape[:place], wrong, *shape[place + 1 :]]
    return value if value != [] or not shape else [10**9] * 3


def row_28(bench: Bench, count: int) -> list[Outcome]:
    """A folder that everybody may write, or of another user: named in a warning, or refused."""
    if os.geteuid() != 0:
        return [Outcome(28, "another owner", "skipped", "only root can give a folder away")]
    outcomes = []
    for name, change in (("another owner", _foreign), ("writable by everybody", _open_to_all)):
        told = _after_kill(bench, change)

        def expect(story: Story) -> str:
            logs = story.logs(1) + "".join(
                p.read_text() for p in sorted((story.plan.out / "run/logs").glob("*.log"))
            )
            return "" if "belongs to user" in logs or "writable by everybody" in logs else "silent"

        outcomes.append(judge(28, name, told, bench.reference(), expect))
    return outcomes


def _foreign(plan: Plan) -> None:
    os.chown(plan.out / "run" / "checkpoints", 12345, 12345)


def _open_to_all(plan: Plan) -> None:
    os.chmod(plan.out / "run" / "checkpoints", 0o777)


def _after_kill(bench: Bench, change: Callable[[Plan], None]) -> Story:
    """A run killed in its last steps, changed on disk, and started again."""
    fault = program.Fault(bench.random.randrange(trial.WORLD), "forward", trial.STEPS)
    return trial.story(bench.plan(), fault, between=change)


def _fall_backs(
    bench: Bench, row: int, change: Callable[[Plan], None], count: int
) -> list[Outcome]:
    name = f"whole run, {change.__name__.strip('_')}"
    reference = bench.reference()
    return [judge(row, name, _after_kill(bench, change), reference) for _ in range(count)]


def _newest(plan: Plan) -> Path:
    folder = plan.out / "run" / "checkpoints"
    return max(path for path in folder.iterdir() if path.name[:5] == "step_")


def _damage_newest(plan: Plan) -> None:
    """One bit of one shard."""
    state = random.Random(str(plan.out))
    path = state.choice(sorted(_newest(plan).glob("rank_*")))
    path.write_bytes(flipped(path.read_bytes(), state)[0])


def _cut_newest(plan: Plan) -> None:
    path = sorted(_newest(plan).glob("rank_*"))[-1]
    path.write_bytes(path.read_bytes()[:-100])


def _half_written(plan: Plan) -> None:
    """A newer folder without its manifest, and ``latest`` points at it."""
    newest = _newest(plan)
    fake = newest.with_name("step_00000099")
    shutil.copytree(newest, fake)
    (fake / MANIFEST).unlink()
    (newest.parent / "latest").write_text("step_00000099\n")


def _latest(text: str) -> Callable[[Plan], None]:
    def wrong_latest(plan: Plan) -> None:
        (plan.out / "run" / "checkpoints" / "latest").write_text(text)

    return wrong_latest


def _latest_loop(plan: Plan) -> None:
    path = plan.out / "run" / "checkpoints" / "latest"
    path.unlink()
    path.symlink_to("latest")
