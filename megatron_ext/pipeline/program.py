"""A pipeline schedule as data: for each pipeline rank the list of its actions, in order.

    program = one_f_one_b(pp=2, micro_batches=3)
    rank 0: F0 F1 B0 F2 B1 B2          rank 1: F0 B0 F1 B1 F2 B2

Action(kind, chunk, micro_batch): F forward, B backward (inputs and weights).  The interleaved
order is that of megatron-core: groups of `group` micro-batches pass chunk 0, then chunk
1, ... (PTD-P, arXiv 2104.04473, section 2.2): rank r warms up with (pp-r-1)*2 + (vpp-1)*group
forwards.
"""

from __future__ import annotations

from dataclasses import dataclass

Program = list[list["Action"]]


@dataclass(frozen=True)
class Action:
    """One pass of one micro-batch through one model chunk of a rank."""

    kind: str
    chunk: int
    micro_batch: int

    def __str__(self) -> str:
        return f"{self.kind}{self.micro_batch}" + (f".{self.chunk}" if self.chunk else "")


def program_of(pp: int, vpp: int, micro_batches: int, group: int | None = None) -> Program:
    """The schedule that megatron-core runs for these sizes."""
    if vpp > 1:
        return interleaved(pp, vpp, micro_batches, group or pp)
    return one_f_one_b(pp, micro_batches)


def one_f_one_b(pp: int, micro_batches: int) -> Program:
    """Warm-up of pp-r-1 forwards, then one forward and one backward in turn, then the rest."""
    return [_alternate(*_plain(micro_batches), warmup=pp - rank - 1) for rank in range(pp)]


def interleaved(pp: int, vpp: int, micro_batches: int, group: int) -> Program:
    """Interleaved 1F1B; virtual stage chunk*pp + rank."""
    forwards, backwards = _table(vpp, micro_batches, group)
    warmups = [(pp - rank - 1) * 2 + (vpp - 1) * group for rank in range(pp)]
    if micro_batches <= group:
        warmups = [len(forwards)] * pp
    return [_alternate(forwards, backwards, warmup=count) for count in warmups]


def _plain(micro_batches: int) -> tuple[list[Action], list[Action]]:
    return tuple([Action(kind, 0, n) for n in range(micro_batches)] for kind in "FB")


def _table(vpp: int, micro_batches: int, group: int) -> tuple[list[Action], list[Action]]:
    """The order of forwards and backwards of every rank."""
    forwards, backwards = [], []
    for first in range(0, micro_batches, group):
        members = range(first, min(first + group, micro_batches))
        forwards += [Action("F", chunk, n) for chunk in range(vpp) for n in members]
        backwards += [Action("B", chunk, n) for chunk in reversed(range(vpp)) for n in members]
    return forwards, backwards


def _alternate(forwards: list[Action], backwards: list[Action], warmup: int) -> list[Action]:
    warmup = min(warmup, len(forwards))
    steady = [x for pair in zip(forwards[warmup:], backwards) for x in pair]
    return [*forwards[:warmup], *steady, *backwards[len(forwards) - warmup :]]


def in_flight(program: Program) -> list[list[int]]:
    """[rank][chunk]: most micro-batches whose forward is done and backward is not, per chunk, at
    the moment when the rank holds most chunks' worth."""
    return [_most(actions) for actions in program]


def _most(actions: list[Action]) -> list[int]:
    chunks = max((a.chunk for a in actions), default=0) + 1
    held, best = [0] * chunks, [0] * chunks
    for action in actions:
        held[action.chunk] += 1 if action.kind == "F" else -1
        if sum(held) > sum(best):
            best = list(held)
    return best
