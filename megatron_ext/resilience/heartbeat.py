"""RUN/logs/rank_R.heartbeat: what a rank does now, in a file that it maps into memory.

    main thread   phase, step, micro-batch, each collective  -> progress + 1
    beat thread   every BEAT_S                                -> beats + 1

An event is a few stores into the mapped page, no system call, so a reader (another rank's watcher,
`read`) sees the last state of a rank that is stopped, holds the GIL or sits in a collective. The
two counters say different things: beats, that the process is alive and its GIL is free; progress,
that the main thread gets on. Readers compare counters with their own clock: hosts' clocks may
differ.

    0     HEAD    who: rank, world size, process, host, token of the launch
    192   STATE   beats, progress, step, phase, entry of the collective it waits in
    320   GROUPS  64 group names: desc|name|ranks
    12608 STEPS   the last 256 steps: number, seconds, seconds blocked in collectives
    20800 RING    the last 512 collectives: group, op, sequence number, bytes, enter, exit
"""

from __future__ import annotations

import mmap
import os
import socket
import struct
import threading
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from megatron_ext.resilience.members import expand

MAGIC = b"HBEAT01\n"
PHASES = (
    "start",
    "load",
    "data",
    "forward",
    "backward",
    "all-reduce",
    "optimizer",
    "save",
    "evaluate",
    "idle",
    "end",
)
SLOW_PHASES = ("start", "load", "save")
"""Phases in which nothing may be recorded for long; so is the first step, which compiles."""

BEAT_S = 0.25
HEAD = struct.Struct("<8siiqqQ64s64s")
STATE = struct.Struct("<QQddqiiqQq")
GROUP = struct.Struct("<192s")
STEP = struct.Struct("<qddd")
ENTRY = struct.Struct("<HHiQQddii")
NUM_GROUPS, NUM_STEPS, NUM_ENTRIES = 64, 256, 512
AT_STATE, AT_GROUPS = 192, 320
AT_STEPS = AT_GROUPS + NUM_GROUPS * GROUP.size
AT_RING = AT_STEPS + NUM_STEPS * STEP.size
SIZE = AT_RING + NUM_ENTRIES * ENTRY.size
# where the fields of STATE lie
BEATS, PROGRESS, MONO, STEP_NOW, WAITING, DONE = (AT_STATE + at for at in (0, 8, 16, 32, 48, 64))
OPS = (
    "all_reduce",
    "all_gather",
    "reduce_scatter",
    "all_to_all",
    "broadcast",
    "reduce",
    "gather",
    "scatter",
    "barrier",
    "send",
    "recv",
)
POINT_TO_POINT = ("send", "recv")
STOPPED = ("T", "t")
"""States of /proc/PID/stat of a process that is stopped, by a signal or a debugger."""


@dataclass(frozen=True)
class Collective:
    """One call of a collective on one rank. Times are this rank's monotonic clock, exit 0 while it
    is not over; on NCCL enter is when the host enqueued it and exit when the host went on.
    """

    group: str  # description, as megatron-core names it
    group_id: str  # torch's name, unique in the launch
    members: tuple[int, ...]  # () where they are too many to list
    op: str
    peer: int  # of a send or recv, else -1
    seq: int
    num_bytes: int
    t_enter: float
    t_exit: float
    step: int
    phase: str

    def __str__(self) -> str:
        peer = f" with rank {self.peer}" if self.peer >= 0 else ""
        return f"{self.op} #{self.seq}{peer} of group {self.group} ({self.num_bytes} B)"


@dataclass(frozen=True)
class Heartbeat:
    """What the file of one rank says."""

    rank: int
    world_size: int
    pid: int
    start_ticks: int  # of /proc/PID/stat, so that a reused number is not taken for the rank
    token: int
    host: str
    beats: int
    progress: int
    monotonic_s: float
    wall_s: float
    step: int
    micro_batch: int
    phase: str
    num_steps: int  # finished by this process
    num_entries: int
    waiting_entry: int
    data: bytes  # the file; the rest is read from it where it is asked for

    @cached_property
    def _groups(self) -> list[tuple[str, str, tuple[int, ...]]]:
        return _groups_of(self.data)

    @cached_property
    def waiting(self) -> Collective | None:
        """The collective in which the main thread is blocked."""
        is_kept = self.waiting_entry >= max(0, self.num_entries - NUM_ENTRIES)
        return _collective(self.data, self.waiting_entry, self._groups) if is_kept else None

    @cached_property
    def ring(self) -> tuple[Collective, ...]:
        """The last collectives, oldest first."""
        numbers = range(max(0, self.num_entries - NUM_ENTRIES), self.num_entries)
        return tuple(_collective(self.data, number, self._groups) for number in numbers)

    def steps_after(self, step: float) -> dict[int, tuple[float, float]]:
        """Step -> (seconds, seconds blocked) of the kept steps behind `step`, newest first."""
        found = {}
        for number in reversed(range(max(0, self.num_steps - NUM_STEPS), self.num_steps)):
            at = AT_STEPS + number % NUM_STEPS * STEP.size
            one, seconds, blocked, _ = STEP.unpack_from(self.data, at)
            if one <= step:
                break
            found[one] = (seconds, blocked)
        return found

    @property
    def is_slow(self) -> bool:
        """True where a long time without a sign is normal."""
        return self.phase in SLOW_PHASES or self.num_steps == 0


def start_ticks(pid: int) -> int:
    """When a process started, in clock ticks after boot; 0 where it is gone."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, IndexError, ValueError):
        return 0


def process_state(pid: int) -> str:
    """The letter of /proc/PID/stat: R runs, S sleeps, T is stopped, Z is dead; "" where gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""


def heartbeat_path(logs: Path, rank: int) -> Path:
    """Where a rank's record is."""
    return logs / f"rank_{rank}.heartbeat"


class HeartbeatFile:
    """The writing side; the main thread calls all of it except `beat`."""

    def __init__(self, path: Path, rank: int, world_size: int, token: int) -> None:
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_bytes(bytes(SIZE))
        with temporary.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), SIZE)
        pid, host = os.getpid(), socket.gethostname().encode()[:64]
        HEAD.pack_into(
            self._map, 0, MAGIC, rank, world_size, pid, start_ticks(pid), token, host, b""
        )
        self._steps = 0
        self._entries = 0
        self._progress = 0
        self._beats = 0
        self._groups: list[str] = []
        self._state = [0, 0, -1]  # step, micro-batch, phase
        self.beat()
        os.replace(temporary, path)  # readers see a whole file or none

    def beat(self) -> None:
        """The process is alive and got the GIL (beat thread)."""
        self._beats += 1
        struct.pack_into("<Q", self._map, BEATS, self._beats)
        struct.pack_into("<dd", self._map, MONO, time.monotonic(), time.time())

    def flush(self) -> None:
        """Send the page to a shared file system, for readers on other hosts."""
        self._map.flush()

    def _sign(self) -> None:
        self._progress += 1
        struct.pack_into("<Q", self._map, PROGRESS, self._progress)

    def enter(self, phase: int, step: int, micro_batch: int) -> None:
        """The main thread is in `phase` (an index of PHASES) of a step from here on."""
        self._state = [step, micro_batch, phase]
        struct.pack_into("<qii", self._map, STEP_NOW, step, micro_batch, phase)
        self._sign()

    def step_done(self, step: int, seconds: float, blocked_s: float) -> None:
        """A step is over; `blocked_s` of it was spent inside collectives."""
        at = AT_STEPS + self._steps % NUM_STEPS * STEP.size
        STEP.pack_into(self._map, at, step, seconds, blocked_s, 0.0)
        self._steps += 1
        struct.pack_into("<q", self._map, DONE, self._steps)
        self._sign()

    def add_group(self, desc: str, name: str, ranks: str) -> int:
        """The number of a group in this file; the last place stands for all that do not fit."""
        index = min(len(self._groups), NUM_GROUPS - 1)
        self._groups.append(name)
        text = f"{desc[:60]}|{name[:40]}|{ranks}".encode()
        GROUP.pack_into(self._map, AT_GROUPS + index * GROUP.size, text[: GROUP.size])
        return index

    def enter_collective(self, group: int, op: int, peer: int, seq: int, num_bytes: int) -> int:
        """Record a call -> the number of its entry."""
        number = self._entries
        self._entries += 1
        at = AT_RING + number % NUM_ENTRIES * ENTRY.size
        step, _, phase = self._state
        ENTRY.pack_into(
            self._map, at, group, op, peer, seq, num_bytes, time.monotonic(), 0.0, step, phase
        )
        self._progress += 1
        struct.pack_into("<qQ", self._map, WAITING, number + 1, self._entries)
        struct.pack_into("<Q", self._map, PROGRESS, self._progress)
        return number

    def wait(self, number: int) -> None:
        """The main thread blocks until entry `number` is over; -1: it does not block any more."""
        struct.pack_into("<q", self._map, WAITING, number + 1)

    def exit_collective(self, number: int) -> None:
        """Entry `number` is over."""
        at = AT_RING + number % NUM_ENTRIES * ENTRY.size
        if number >= self._entries - NUM_ENTRIES:
            struct.pack_into("<d", self._map, at + 32, time.monotonic())
        self._progress += 1
        struct.pack_into("<q", self._map, WAITING, 0)
        struct.pack_into("<Q", self._map, PROGRESS, self._progress)

    def close(self) -> None:
        """The rank leaves: nobody waits for its beats any more."""
        self.enter(PHASES.index("end"), *self._state[:2])
        self.flush()


def beat_for_ever(file: HeartbeatFile, stopped: threading.Event, must_flush: bool) -> None:
    """The beat thread's loop."""
    while not stopped.wait(BEAT_S):
        file.beat()
        if must_flush:
            file.flush()


def _groups_of(data: bytes) -> list[tuple[str, str, tuple[int, ...]]]:
    found = []
    for index in range(NUM_GROUPS):
        at = AT_GROUPS + index * GROUP.size
        text = data[at : at + GROUP.size].rstrip(b"\0").decode(errors="replace")
        desc, _, rest = text.partition("|")
        name, _, ranks = rest.partition("|")
        found.append((desc, name, expand(ranks)))
    return found


def _collective(data: bytes, number: int, groups: list) -> Collective:
    at = AT_RING + number % NUM_ENTRIES * ENTRY.size
    group, op, peer, seq, num_bytes, t_enter, t_exit, step, phase = ENTRY.unpack_from(data, at)
    desc, name, ranks = groups[group % NUM_GROUPS]
    return Collective(
        group=desc,
        group_id=name,
        members=ranks,
        op=OPS[op % len(OPS)],
        peer=peer,
        seq=seq,
        num_bytes=num_bytes,
        t_enter=t_enter,
        t_exit=t_exit,
        step=step,
        phase=PHASES[phase % len(PHASES)],
    )


def parse(data: bytes) -> Heartbeat | None:
    """What the bytes of a file say; None where they are no heartbeat."""
    if len(data) < SIZE or data[:8] != MAGIC:
        return None
    _, rank, world_size, pid, ticks, token, host, _ = HEAD.unpack_from(data, 0)
    beats, progress, mono, wall, step, micro, phase, waiting, entries, done = STATE.unpack_from(
        data, AT_STATE
    )
    return Heartbeat(
        rank=rank,
        world_size=world_size,
        pid=pid,
        start_ticks=ticks,
        token=token,
        host=host.rstrip(b"\0").decode(errors="replace"),
        beats=beats,
        progress=progress,
        monotonic_s=mono,
        wall_s=wall,
        step=step,
        micro_batch=micro,
        phase=PHASES[phase % len(PHASES)],
        num_steps=done,
        num_entries=entries,
        waiting_entry=waiting - 1,
        data=data,
    )


def read(logs: Path, rank: int, token: int | None = None) -> Heartbeat | None:
    """The heartbeat of a rank of this launch (None: of any); None before it has one."""
    try:
        found = parse(heartbeat_path(logs, rank).read_bytes())
    except OSError:
        return None
    return found if found is not None and token in (None, found.token) else None
