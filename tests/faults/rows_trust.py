"""Rows 43 and 44: what is kept for the next start is another user's or torn; a fast tier fails."""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import marshal
import os
import random
from collections.abc import Callable
from pathlib import Path

from megatron_ext.checkpoint import tiers
from megatron_ext.device import lift
from megatron_ext.native import build
from megatron_ext.owned import GROUP_AND_OTHERS
from tests.checkpoint.small_disk import write_step
from tests.faults import trial
from tests.faults.bench import COMMON_LAYOUT, Bench, judge
from tests.faults.cell import Case, Wrong, run_cases
from tests.faults.outcome import Outcome
from tests.faults.rows_limits import failing
from tests.faults.trial import Story

MEMORY = r"/dev/shm/pretrain_moe\..*/(\.writing|\.reports|ledger|latest)"
RUNS_CODE = "open({canary!r}, 'w').close()"


def row_43(folder: Path, seed: int, count: int) -> list[Outcome]:
    """A library, byte code or a memory tier that another user made, may write, or that is a link;
    a library and byte code cut anywhere. Never executed, never loaded, never a crash.
    """
    folder.mkdir(parents=True)
    canary, state, cases = folder / "canary", random.Random(seed), []
    places: list[Callable[[Path, Path], Place]] = [ByteCode, Memory]
    places += [] if why_no_compiler() else [Library]
    for number in range(count):
        place = places[number % len(places)](folder / f"{number}", canary)
        cases.append(_case(place, state.randrange(1 << 30)))
    return run_cases(43, cases, canary)


def why_no_compiler() -> str:
    """Why libraries are left out."""
    try:
        build.command()
    except build.BuildError as error:
        return str(error)
    return ""


def _case(place: Place, seed: int) -> Case:
    draw = random.Random(seed)
    ways = ["mode", "link", *(["owner"] if os.geteuid() == 0 else []), *place.more]
    way, is_folder = draw.choice(ways), draw.random() < 0.4
    is_folder = is_folder and place.looks_at_folder and way != "torn"

    def action() -> None:
        place.prepare()
        spoil(place.file.parent if is_folder else place.file, way, draw)
        if not place.is_safe():
            raise Wrong("silent", "it was taken")

    what = "folder" if is_folder else "file"
    return f"{type(place).__name__} {what}: {way} ({seed})", action


def spoil(path: Path, way: str, draw: random.Random) -> None:
    """Make it somebody else's, or cut it."""
    if way == "owner":
        os.chown(path, draw.randrange(1, 60_000), -1)
    elif way == "mode":
        bits = draw.choice((0o002, 0o022))
        path.chmod(path.stat().st_mode | bits)
    elif way == "link":
        elsewhere = path.with_name(f"{path.name}.elsewhere")
        path.rename(elsewhere)
        path.symlink_to(elsewhere)
    else:
        content = path.read_bytes()
        path.write_bytes(content[: draw.randrange(len(content))])


class Place:
    """Something that is kept; `more`: ways beside those of every place."""

    looks_at_folder = True
    more: tuple[str, ...] = ("torn",)

    def __init__(self, folder: Path, canary: Path) -> None:
        self.folder, self.canary = folder, canary
        self.file = folder

    def prepare(self) -> None:
        """Make it, with `file`."""
        raise NotImplementedError

    def is_safe(self) -> bool:
        """Use it as a start would; whether what was planted stayed out."""
        raise NotImplementedError


class Library(Place):
    """A compiled library, whose planted form gives 13."""

    def prepare(self) -> None:
        self.folder.mkdir()
        os.environ["XDG_CACHE_HOME"] = str(self.folder)
        self.source, other = self.folder / "seven.cpp", self.folder / "other.cpp"
        for path, number in ((self.source, 7), (other, 13)):
            path.write_text(f'extern "C" int answer() {{ return {number}; }}\n')
        build.load(self.source)
        (self.file,) = (self.folder / "pretrain-moe").glob("seven-*.so")
        build.compile_into(self.file.parent, self.file.name, other)

    def is_safe(self) -> bool:
        return build.load(self.source).answer() == 7


class ByteCode(Place):
    """Rewritten byte code, whose planted form touches the canary."""

    looks_at_folder = False  # the file's owner is asked through its descriptor

    def prepare(self) -> None:
        self.folder.mkdir()
        source = self.folder / "module.py"
        source.write_text("# cuda\nanswer = 7\n")
        self.loader = lift._CpuLoader("megatron.core.module", str(source))
        name = importlib.util.cache_from_source(
            str(source), optimization=f"cpu{lift.REWRITER_VERSION}"
        )
        self.file = Path(name)
        self.file.parent.mkdir()
        body = marshal.dumps(compile(RUNS_CODE.format(canary=str(self.canary)), "evil", "exec"))
        key = importlib.util.source_hash(source.read_bytes())
        self.file.write_bytes(key + hashlib.sha256(body).digest() + body)
        self.file.chmod(0o644)

    def is_safe(self) -> bool:
        found: dict = {}
        exec(self.loader.get_code(self.loader.name), found)
        return found.get("answer") == 7


class Memory(Place):
    """A step in the memory tier."""

    more = ()

    def prepare(self) -> None:
        self.tier = tiers.Tier("memory", self.folder, 1, 1)
        self.tier.make()
        self.file = write_step(self.folder, 4, 1.0)
        assert not self.folder.stat().st_mode & GROUP_AND_OTHERS

    def is_safe(self) -> bool:
        return bool(tiers.foreign(self.tier))


def row_44(bench: Bench, count: int) -> list[Outcome]:
    """/dev/shm refuses to be written, once or for ever, on some ranks: the run ends as without."""
    outcomes = []
    kinds = (errno.ENOSPC, errno.EROFS, errno.EIO, errno.EACCES, errno.EDQUOT)
    for _ in range(count):
        kind, times = bench.random.choice(kinds), bench.random.choice((1, 3, 10_000))
        ranks = tuple(bench.random.sample(range(trial.WORLD), bench.random.randrange(1, 5)))
        flags = ("--ckpt-tiers", "memory,store", "--ckpt-memory-interval", "1")
        told = trial.story(
            bench.plan(COMMON_LAYOUT, *flags), prepare=failing(MEMORY, kind, times, ranks)
        )
        case = f"{errno.errorcode[kind]} x{times} in /dev/shm on ranks {sorted(ranks)}"
        outcomes.append(judge(44, case, told, bench.reference(), _once))
    return outcomes


def _once(told: Story) -> str:
    return "" if len(told.endings) == 1 else f"it ended: {told.fatals(0)[:1]}"
